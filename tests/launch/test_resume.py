"""A run that was killed goes on where it was; one that is over is told again; one that is raised goes further."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.processes import RUN, Ended, Running, adapters, assert_same_adapters, run, run_forked

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def arguments(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The recipe: rounds of about a second, dropout and optimizer state that must be taken up again too."""

    def arguments(folder: Path, **overrides: object) -> list[str]:
        settings = {"train__local_epochs": 5.0, "lora__dropout": 0.1, "train__keep_optimizer_state": True}
        return tiny.recipe(model, federation, folder / "runs", **settings, **overrides)

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of three rounds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run_forked([*arguments(folder), "--federation.num_rounds", "3"], folder / "output.txt")
    assert ended.returncode == 0, ended.output
    return folder / "runs" / "tiny"


def records_of_clients(run_dir: Path) -> list[tuple[int, int]]:
    """(round, client) of every client's record, in the order of the file."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["round"], record["client"]) for record in records if record["kind"] == "client"]


def each_once(num_rounds: int) -> list[tuple[int, int]]:
    return [(server_round, client) for server_round in range(num_rounds + 1) for client in range(2)]


def kill_when(command: list[str], *files: Path) -> None:
    """Start `command`, and SIGKILL all of it as soon as one of the files is there."""
    with Running(command) as running:
        deadline = time.monotonic() + 60
        while not any(file.exists() for file in files):
            assert running.process.poll() is None, running.output()
            assert time.monotonic() < deadline, running.output()
            time.sleep(0.001)
        running.process.kill()  # at once: what is on disk now is what the next start finds


def test_killed_resumed_repeated_and_extended(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"

    def again(*more: str) -> Ended:
        ended = run_forked([*argv, *more], tmp_path / "output.txt")
        assert ended.returncode == 0, ended.output
        return ended

    kill_when([*RUN, *argv], run_dir / "rounds" / "round_000001" / "meta.json")
    assert not (run_dir / "rounds" / "round_000002").exists(), "killed too late to tell anything"

    ended = run([*RUN, *argv])
    assert ended.returncode == 0, ended.output
    assert "continues after round 1 of 2" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted, 2), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(2)

    before = {path: path.stat().st_mtime_ns for path in (run_dir / "rounds").rglob("*")}
    ended = again()
    assert "continues after round 2 of 2" in ended.output
    assert "held-out loss fell for" in ended.output
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "rounds").rglob("*")} == before, "nothing was trained"
    assert records_of_clients(run_dir) == each_once(2)

    ended = again("--federation.num_rounds", "3")
    assert "continues after round 2 of 3" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(3)


def test_killed_before_the_first_round_is_complete(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """Round 0, the state before training, is recorded again and not twice; half-written files are swept away."""
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    kill_when([*RUN, *argv], run_dir / "metrics.jsonl")
    assert not (run_dir / "rounds" / "round_000001").exists(), "killed too late to tell anything"
    leftover = run_dir / "rounds" / "round_000001.tmp"
    leftover.mkdir(parents=True, exist_ok=True)
    (leftover / "half").write_text("")

    ended = run_forked(argv, tmp_path / "output.txt")
    assert ended.returncode == 0, ended.output
    assert "continues" not in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted, 2), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(2)
    assert not list(run_dir.glob("**/half"))


def test_killed_inside_a_phase(tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path) -> None:
    """With every step saved, the work of at most a step is done twice; adapters and metrics are those of one run."""
    argv = [*arguments(tmp_path), "--checkpoint.every_steps", "1"]
    run_dir = tmp_path / "runs" / "tiny"
    saved = run_dir / "rounds" / "round_000002.tmp" / "progress" / "client_01"
    kill_when([*RUN, *argv], saved / "000001" / "state.json", saved / "000002" / "state.json")
    info = json.loads(next(saved.glob("*/state.json")).read_text())["info"]
    assert info["inside"]["step"] > 0 or info["phase"] > 0, "nothing to take up again"

    ended = run_forked(argv, tmp_path / "output.txt")
    assert ended.returncode == 0, ended.output
    assert "continues after round 1 of 2" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted, 2), tolerance=0.0)
    assert not list(run_dir.glob("rounds/**/progress"))
    assert metrics(run_dir) == [record for record in metrics(uninterrupted) if record["round"] <= 2]


def metrics(run_dir: Path) -> list[dict[str, object]]:
    """Records of clients and rounds without times."""
    timed = ("seconds", "tokens_per_second")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith(timed)} for record in records]


def test_damaged_round_is_set_aside(tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    shutil.copytree(uninterrupted, run_dir, symlinks=True)  # name and place of a run are its own business
    damaged = run_dir / "rounds" / "round_000003" / "local" / "client_01" / "adapter_model.safetensors"
    spoil(damaged)
    more = ["--federation.num_rounds", "3"]

    ended = run_forked([*argv, *more], tmp_path / "output.txt")
    assert ended.returncode == 0, ended.output
    aside = run_dir / "rounds" / "round_000003.damaged"
    assert f"round 3 is damaged and set aside as {aside}: {damaged} is damaged (checksum differs)" in ended.output
    assert "continues after round 2 of 3" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(3)
    assert aside.is_dir()


def test_no_whole_round_is_left(tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path) -> None:
    """Training from the beginning would be a surprise: it is refused."""
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    shutil.copytree(uninterrupted, run_dir, symlinks=True)
    for path in run_dir.glob("rounds/*/global/adapter_model.safetensors"):
        spoil(path)
    ended = run_forked([*argv, "--federation.num_rounds", "3"], tmp_path / "output.txt")
    assert ended.returncode == 4, ended.output
    (error,) = ended.errors
    assert f"no complete round of {run_dir} is whole: restore one, or delete the folder" in error


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("resume", "there", "message"),
    [
        ("never", True, "holds results (up to round 3), and resume is never"),
        ("must", False, "holds nothing to go on from, and resume is must"),
    ],
)
def test_resume_can_be_forbidden_or_demanded(
    resume: str, there: bool, message: str, tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    if there:
        shutil.copytree(uninterrupted, run_dir, symlinks=True)
    ended = run_forked([*argv, "--resume", resume, "--federation.num_rounds", "3"], tmp_path / "output.txt")
    assert ended.returncode == 4, ended.output
    (error,) = ended.errors
    assert message in error


def test_files_of_a_round(uninterrupted: Path) -> None:
    """A manifest of everything; safetensors and JSON only; nothing of the size of the base."""
    folder = uninterrupted / "rounds" / "round_000003"
    manifest = json.loads((folder / "meta.json").read_text())
    assert sorted(manifest["states"]) == [
        "global/state.json", "local/client_00/state.json", "local/client_01/state.json",
    ]  # fmt: skip
    assert set(manifest["versions"]) == {"dpa_ds", "torch", "deepspeed", "transformers", "peft"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert sorted(path.name for path in uninterrupted.glob("rounds/*")) == ["round_000002", "round_000003"]


def test_another_layout_begins_the_round_anew(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """Work inside a round is only taken up by the same layout, because only then is it exact to the bit."""
    argv = [*arguments(tmp_path), "--checkpoint.every_steps", "1"]
    run_dir = tmp_path / "runs" / "tiny"
    saved = run_dir / "rounds" / "round_000002.tmp" / "progress" / "client_01"
    kill_when([*RUN, *argv], saved / "000001" / "state.json", saved / "000002" / "state.json")
    ended = run_forked([*argv, "--train.micro_batch_tokens", "64"], tmp_path / "output.txt")
    assert ended.returncode == 0, ended.output
    assert "client 1 begins round 2 anew: what it had done of it was done with another layout" in ended.output
