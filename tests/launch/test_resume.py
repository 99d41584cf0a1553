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


def kill_when(command: list[str], is_there: Path) -> None:
    """Start `command`, and SIGKILL all of it as soon as a file is there."""
    with Running(command) as running:
        deadline = time.monotonic() + 60
        while not is_there.exists():
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


def test_damaged_checkpoint_names_the_file_and_its_remedy_works(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: Path
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    shutil.copytree(uninterrupted, run_dir, symlinks=True)  # name and place of a run are its own business
    damaged = run_dir / "rounds" / "round_000003" / "local" / "client_01" / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    more = ["--federation.num_rounds", "3"]

    ended = run_forked([*argv, *more], tmp_path / "output.txt")
    assert ended.returncode == 4, ended.output
    (error,) = ended.errors
    assert f"{damaged} is damaged (checksum differs)" in error
    folder = run_dir / "rounds" / "round_000003"
    assert f"delete {folder} to continue from the round before" in error

    shutil.rmtree(folder)
    ended = run_forked([*argv, *more], tmp_path / "output.txt")
    assert ended.returncode == 0, ended.output
    assert "continues after round 2 of 3" in ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted), tolerance=0.0)
    assert records_of_clients(run_dir) == each_once(3)
