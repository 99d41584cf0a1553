"""A run that was killed continues where it was; one that is over is reported again; one that is raised goes further."""

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.launch.processes import (
    RUN,
    Ended,
    Forked,
    adapters,
    assert_same_adapters,
    run,
    run_by_hand,
    run_forked,
    start_by_hand,
    wait_for,
)

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def arguments(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The recipe: rounds of about a second, dropout, warm-up and optimizer state that must be restored too."""

    def arguments(folder: Path, **overrides: object) -> list[str]:
        settings = {
            "train__local_epochs": 5.0,
            "train__warmup_ratio": 0.5,
            "train__keep_optimizer_state": True,
            "lora__dropout": 0.1,
        }
        return tiny.recipe(model, federation, folder / "runs", **{**settings, **overrides})

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of three rounds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = run_forked([*arguments(folder), "--federation.num_rounds", "3"])
    assert ended.returncode == 0, ended.output
    return folder / "runs" / "tiny"


def records_of_clients(run_dir: Path) -> list[tuple[int, int]]:
    """(round, client) of every client's record, in the order of the file."""
    return [(record["round"], record["client"]) for record in records(run_dir) if record["kind"] == "client"]


def each_once(num_rounds: int) -> list[tuple[int, int]]:
    return [(server_round, client) for server_round in range(num_rounds + 1) for client in range(2)]


def kill_when(command: list[str], *files: Path) -> None:
    """Start `command`, and SIGKILL all of it as soon as one of the files is there."""
    with Forked(command) as running:
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
        ended = run_forked([*argv, *more])
        assert ended.returncode == 0, ended.output
        return ended

    kill_when([*RUN, *argv], run_dir / "rounds" / "round_000001" / "meta.json")
    assert not (run_dir / "rounds" / "round_000002").exists(), "killed too late to tell anything"

    ended = again()
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

    ended = run_forked(argv)
    assert ended.returncode == 0, ended.output
    assert "continues" not in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted, 2), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(2)
    assert not list(run_dir.glob("**/half"))


@pytest.mark.parametrize("every", [("steps", "1"), ("minutes", "0.0001")])
def test_killed_inside_a_phase(
    every: tuple[str, str], tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """With every step saved, the work of at most a step is done twice; adapters and metrics are those of one run."""
    argv = [*arguments(tmp_path), f"--checkpoint.every_{every[0]}", every[1]]
    run_dir = tmp_path / "runs" / "tiny"
    saved = run_dir / "rounds" / "round_000002.tmp" / "progress" / "client_01"
    number = 1 if every[0] == "steps" else 3  # by time also before the first step
    kill_when([*RUN, *argv], *(saved / f"{n:06d}" / "state.json" for n in (number, number + 1)))
    info = json.loads(next(saved.glob("*/state.json")).read_text())["info"]
    assert info["inside"]["step"] > 0 or info["phase"] > 0, "nothing to restore"

    ended = run_forked(argv)
    assert ended.returncode == 0, ended.output
    assert "continues after round 1 of 2" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted, 2), tolerance=0.0)
    assert not list(run_dir.glob("rounds/**/progress"))
    assert metrics(run_dir) == [record for record in metrics(uninterrupted) if record["round"] <= 2]
    *clients, whole = [record for record in records(run_dir) if record["round"] == 2]
    own_tokens = sum(client["real_tokens"] - client["restored_tokens"] for client in clients)
    assert 0 < own_tokens < sum(client["real_tokens"] for client in clients), "those of the second process"
    assert whole["tokens_per_second"] * whole["seconds/train"] == pytest.approx(own_tokens)


def test_auto_keeps_the_precision_of_the_run_and_bf16_resumes_to_the_bit(
    tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    """Two runs of its own, because the one above is in fp32."""
    for name in ("killed", "new"):
        (tmp_path / name).mkdir()
    argv, run_dir = arguments(tmp_path / "killed", model__precision="bf16"), tmp_path / "killed" / "runs" / "tiny"
    kill_when([*RUN, *argv], run_dir / "rounds" / "round_000001" / "meta.json")
    assert not (run_dir / "rounds" / "round_000002").exists(), "killed too late to tell anything"
    ended = run_forked(arguments(tmp_path / "killed", model__precision="auto"))
    assert ended.returncode == 0, ended.output
    assert "ZeRO stage 1, bf16, cpu" in ended.output
    assert "continues after round 1 of 2" in ended.output

    flags = Path("/proc/cpuinfo").read_text()
    native = "bf16" if "avx512_bf16" in flags or "amx_tile" in flags else "fp32"
    ended = run_forked(arguments(tmp_path / "new", model__precision="auto"))
    assert f"ZeRO stage 1, {native}, cpu" in ended.output
    new = tmp_path / "new" / "runs" / "tiny"
    assert f"precision: {native}" in (new / "config.yaml").read_text()
    if native == "bf16":
        assert_same_adapters(adapters(run_dir), adapters(new), tolerance=0.0)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of clients and rounds without times, and without what tells of an interruption."""
    timed = ("seconds", "tokens_per_second", "restored_tokens")
    return [{key: value for key, value in record.items() if not key.startswith(timed)} for record in records(run_dir)]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_damaged_round_is_quarantined(tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    shutil.copytree(uninterrupted, run_dir, symlinks=True)  # name and place of a run are its own business
    damaged = run_dir / "rounds" / "round_000003" / "local" / "client_01" / "adapter_model.safetensors"
    spoil(damaged)
    more = ["--federation.num_rounds", "3"]

    ended = run_forked([*argv, *more])
    assert ended.returncode == 0, ended.output
    aside = run_dir / "rounds" / "round_000003.damaged"
    assert f"round 3 is damaged and quarantined as {aside}: {damaged} is damaged (checksum differs)" in ended.output
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
    ended = run_forked([*argv, "--federation.num_rounds", "3"])
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
        ("must", False, "holds nothing to resume from, and resume is must"),
    ],
)
def test_resume_can_be_forbidden_or_demanded(
    resume: str, there: bool, message: str, tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    if there:
        shutil.copytree(uninterrupted, run_dir, symlinks=True)
    ended = run_forked([*argv, "--resume", resume, "--federation.num_rounds", "3"])
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


def test_another_layout_starts_the_round_from_scratch(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """Work inside a round is only restored by the same layout, because only then is it exact to the bit."""
    argv = [*arguments(tmp_path), "--checkpoint.every_steps", "1"]
    run_dir = tmp_path / "runs" / "tiny"
    saved = run_dir / "rounds" / "round_000002.tmp" / "progress" / "client_01"
    kill_when([*RUN, *argv], saved / "000001" / "state.json", saved / "000002" / "state.json")
    ended = run_forked([*argv, "--train.micro_batch_tokens", "64"])
    assert ended.returncode == 0, ended.output
    assert "client 1 starts round 2 from scratch: what it had done of it was done with another layout" in ended.output


def test_resumed_on_other_layouts_at_the_border_of_rounds(tmp_path: Path, arguments: Callable[..., list[str]]) -> None:
    """Ranks of a group, number of groups and ZeRO stage may change between rounds: the adapters are the same to 1e-5."""
    settings = {"lora__dropout": 0.0, "train__local_epochs": 2.0}
    layouts = (
        (1, "zero1", "2"),  # one group of one rank
        (2, "zero2", "2"),
        (3, "zero3", "[2, 1]"),  # two groups
        (2, "zero1", "1"),
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    ended = run_forked([*arguments(tmp_path / "one", **settings), "--federation.num_rounds", "4"])
    assert ended.returncode == 0, ended.output
    argv = arguments(tmp_path / "many", **settings)
    for num_rounds, (num_ranks, stage, ranks_per_group) in enumerate(layouts, 1):
        command = [*RUN, *argv, "--federation.num_rounds", str(num_rounds)]
        command += ["--engine.deepspeed_config", f"ds_configs/{stage}.json"]
        command += ["--cluster.ranks_per_group", ranks_per_group] if num_ranks > 1 else []
        for one in run_by_hand(start_by_hand(command, num_ranks)):
            assert one.returncode == 0, one.output
    actual, expected = (adapters(tmp_path / name / "runs" / "tiny") for name in ("many", "one"))
    assert_same_adapters(actual, expected, tolerance=1e-5)


FULL = """\
mount -t tmpfs -o size=8m none {runs}
( until [ -e {run_dir}/rounds/round_000001/meta.json ]; do sleep 0.01; done; cat /dev/zero > {runs}/filler ) 2>/dev/null &
{command}
code=$?
rm {runs}/filler
cp -a {runs}/. {saved}
exit $code
"""


def test_a_full_disk_is_one_error_and_earlier_rounds_are_intact(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    """The file system is a small one of its own, filled by somebody else after the first round."""
    argv, runs, saved = arguments(tmp_path), tmp_path / "runs", tmp_path / "saved"
    argv += ["--federation.num_rounds", "3"]
    script = FULL.format(runs=runs, run_dir=runs / "tiny", saved=saved, command=shlex.join([*RUN, *argv]))
    runs.mkdir(exist_ok=True)
    saved.mkdir()
    alone = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of its own")
    ended = run([*alone, "sh", "-c", script])
    assert ended.returncode == 4, ended.output
    assert len(ended.errors) == 1, ended.output
    assert ended.num_tracebacks == 0, ended.output
    assert f"cannot write {runs}" in ended.errors[0]
    assert "No space left on device" in ended.errors[0]
    assert "make room or choose another output_dir, then run the same command again" in ended.errors[0]

    shutil.copytree(saved, runs, symlinks=True, dirs_exist_ok=True)
    ended = run_forked(argv)
    assert ended.returncode == 0, ended.output
    assert re.search(r"continues after round [12] of 3", ended.output)
    assert_same_adapters(adapters(runs / "tiny"), adapters(uninterrupted), tolerance=0.0)
    assert metrics(runs / "tiny") == metrics(uninterrupted)


def test_two_jobs_at_once_on_one_run_are_refused(tmp_path: Path, arguments: Callable[..., list[str]]) -> None:
    argv = arguments(tmp_path, federation__num_rounds=500, checkpoint__grace_seconds=2)
    run_dir = tmp_path / "runs" / "tiny"
    with Forked([*RUN, *argv]) as first:
        wait_for(run_dir, "rounds/round_000001/meta.json", [first], 60.0)
        ended = run_forked(argv)
        assert ended.returncode == 4, ended.output
        (error,) = ended.errors
        assert f"another job works on {run_dir} (it holds lock): wait for its end or stop it" in error
        assert first.process.poll() is None, first.output()


def test_of_two_jobs_that_begin_one_run_at_once_one_does(tmp_path: Path, arguments: Callable[..., list[str]]) -> None:
    """Whichever it is, its recipe and its results are there, and the other one has changed nothing."""
    argv, run_dir = arguments(tmp_path, checkpoint__grace_seconds=1), tmp_path / "runs" / "tiny"
    rates = ("0.01", "0.02")
    jobs = [Forked([*RUN, *argv, "--train.learning_rate", rate]) for rate in rates]
    ended = run_by_hand(jobs)
    assert sorted(one.returncode for one in ended) == [0, 4], "\n\n".join(one.output for one in ended)
    winner = [one.returncode for one in ended].index(0)
    (error,) = ended[1 - winner].errors
    assert "while this one was starting" in error or "another job works on" in error or "a different run" in error
    assert f"learning_rate: {rates[winner]}" in (run_dir / "config.yaml").read_text()
    assert records_of_clients(run_dir) == each_once(2)
