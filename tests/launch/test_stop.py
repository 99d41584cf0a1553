"""Signals, silent ranks and lost hosts: everything is saved and ends in time, and the same command resumes from there."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.launch.processes import (
    PYTHON,
    RUN,
    Ended,
    Running,
    adapters,
    assert_same_adapters,
    beside_python,
    free_port,
    run,
    run_by_hand,
    run_forked,
    start_by_hand,
    wait_for,
)

pytestmark = pytest.mark.launch
DEADLINE_SECONDS = 120.0
GRACE_SECONDS = 20.0
PREEMPTED = 75


@pytest.fixture(scope="module")
def arguments(model: Path, federation: Path) -> Callable[..., list[str]]:
    """Phases long enough to be hit inside, with dropout."""

    def arguments(folder: Path, **overrides: object) -> list[str]:
        settings = {
            "federation__num_rounds": 2,
            "train__max_steps": 60,
            "lora__dropout": 0.1,
            "checkpoint__grace_seconds": GRACE_SECONDS,
            "federation__timeout_seconds": 600,
            "cluster__timeout_seconds": 600,
        }
        return tiny.recipe(model, federation, folder / "runs", **{**settings, **overrides})

    return arguments


@pytest.fixture(scope="module")
def uninterrupted(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing disturbed, by ranks of a group, with two groups."""
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"uninterrupted{ranks}")
        ended = run_by_hand(
            start_by_hand([*RUN, *arguments(folder), "--cluster.ranks_per_group", str(ranks)], 2 * ranks)
        )
        assert [one.returncode for one in ended] == [0] * len(ended), ended[0].output
        runs[ranks] = folder / "runs" / "tiny"
    return runs


def all_ended(ranks: Sequence[Running]) -> list[Ended]:
    return run_by_hand(ranks, DEADLINE_SECONDS)


@pytest.mark.parametrize(
    ("number", "rank", "ranks_per_group"),
    [(signal.SIGTERM, 0, 1), (signal.SIGUSR1, 1, 1), (signal.SIGUSR1, 3, 2), (signal.SIGTERM, 0, 2)],
)
def test_a_signal_on_any_rank_stops_all(
    number: signal.Signals,
    rank: int,
    ranks_per_group: int,
    tmp_path: Path,
    arguments: Callable[..., list[str]],
    uninterrupted: dict[int, Path],
) -> None:
    argv = [*arguments(tmp_path), "--cluster.ranks_per_group", str(ranks_per_group)]
    run_dir = tmp_path / "runs" / "tiny"
    ranks = start_by_hand([*RUN, *argv], 2 * ranks_per_group)
    wait_for(run_dir, "rounds/round_000001.tmp/progress/*/*/state.json", ranks, DEADLINE_SECONDS)
    signalled = time.monotonic()
    os.kill(ranks[rank].process.pid, number)
    ended = all_ended(ranks)
    assert time.monotonic() - signalled < GRACE_SECONDS
    assert [one.returncode for one in ended] == [PREEMPTED] * len(ranks), [one.output for one in ended]
    output = "".join(one.output for one in ended)
    assert output.count("stopped by ") == 1, output
    assert f"{number.name} on rank {rank}" in output or "a signal, while leader" in output
    assert "all is saved, and the same command resumes from there" in output
    assert "Traceback" not in output
    assert "error: " not in output
    saved = [int(path.parent.name) for path in run_dir.glob("rounds/*.tmp/progress/*/*/state.json")]
    assert len(saved) == 2, "the progress of both clients, once"

    ended = all_ended(start_by_hand([*RUN, *argv], 2 * ranks_per_group))
    assert [one.returncode for one in ended] == [0] * len(ended), [one.output for one in ended]
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted[ranks_per_group]), tolerance=0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_deepspeed_launcher(
    number: signal.Signals, tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: dict[int, Path]
) -> None:
    """It sends SIGTERM on to its ranks, waits for them, and exits with 1 itself."""
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    launcher = [beside_python("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *RUN[1:], *argv]
    with Running(launcher) as running:
        wait_for(run_dir, "rounds/round_000001.tmp/progress/*/*/state.json", [running], DEADLINE_SECONDS)
        # The runner waits for launch.py, which has the ranks: a batch system signals them all.
        for process in [running.process, *psutil.Process(running.process.pid).children(recursive=True)]:
            os.kill(process.pid, number)
        ended = running.wait(DEADLINE_SECONDS)
    assert ended.returncode != 0
    assert "all is saved, and the same command resumes from there" in ended.output
    assert ended.num_tracebacks == 0 or number == signal.SIGINT, ended.output
    ended = run([*launcher[:4], str(free_port()), *launcher[5:]], DEADLINE_SECONDS)
    assert ended.returncode == 0, ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted[1]), tolerance=0.0)


def test_a_signal_to_the_first_process_of_deepspeed_alone(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: dict[int, Path]
) -> None:
    """It dies of it and reports it to nobody; the ranks see it, save and end (`Running.wait` asserts that nothing is left)."""
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    launcher = [beside_python("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *RUN[1:], *argv]
    with Running(launcher) as running:
        wait_for(run_dir, "rounds/round_000001.tmp/progress/*/*/state.json", [running], DEADLINE_SECONDS)
        running.process.terminate()
        ended = running.wait(DEADLINE_SECONDS)
        assert "stopped by the end of the deepspeed launcher" in running.output()
    assert ended.num_tracebacks == 0, ended.output
    ended = run([*launcher[:4], str(free_port()), *launcher[5:]], DEADLINE_SECONDS)
    assert ended.returncode == 0, ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted[1]), tolerance=0.0)


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_ranks_whose_launcher_dies_while_they_start(
    seconds: float, tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    """They find out, and do not train on as orphans (killed at once: before their first line of Python)."""
    argv = arguments(tmp_path, federation__num_rounds=10_000)
    launcher = [beside_python("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]

    def by_role(running: Running) -> tuple[list[psutil.Process], list[psutil.Process]]:
        found = running.remaining()
        ranks = [process for process in found if "CROSS_RANK" in process.environ()]
        return ranks, [process for process in found if process not in ranks]

    with Running([*launcher, "launch/run.py", *argv]) as running:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(by_role(running)[0]) < 2:
            assert time.monotonic() < deadline, running.output()
        time.sleep(seconds)
        for process in by_role(running)[1]:
            process.kill()
        ended = running.process.wait(DEADLINE_SECONDS)
        while running.remaining():
            assert time.monotonic() < deadline, running.output()
            time.sleep(0.1)
        assert ended == -signal.SIGKILL
        assert "Traceback" not in running.output(), running.output()


def test_a_signal_to_mpirun(
    tmp_path: Path, arguments: Callable[..., list[str]], uninterrupted: dict[int, Path]
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    with Running([beside_python("mpirun"), "-n", "2", PYTHON, *RUN[1:], *argv]) as running:
        wait_for(run_dir, "rounds/round_000001.tmp/progress/*/*/state.json", [running], DEADLINE_SECONDS)
        running.process.send_signal(signal.SIGUSR1)
        ended = running.wait(DEADLINE_SECONDS)
    assert ended.returncode == PREEMPTED, ended.output
    assert "all is saved" in ended.output
    ended = run_forked([*argv, "--resume", "must"])
    assert ended.returncode == 0, ended.output
    assert_same_adapters(adapters(run_dir), adapters(uninterrupted[1]), tolerance=0.0)


@pytest.mark.parametrize(("rank", "ranks_per_group"), [(1, 1), (3, 2), (0, 1)])
def test_a_stopped_rank_is_named_in_time(
    rank: int, ranks_per_group: int, tmp_path: Path, arguments: Callable[..., list[str]]
) -> None:
    """SIGSTOP: the process is there and its sockets are open, but nothing comes. All other bounds are minutes away."""
    silence = 4
    argv = [*arguments(tmp_path, cluster__heartbeat_timeout_seconds=silence, train__max_steps=4000)]
    argv += ["--cluster.ranks_per_group", str(ranks_per_group)]
    ranks = start_by_hand([*RUN, *argv], 2 * ranks_per_group)
    try:
        wait_for(tmp_path / "runs" / "tiny", "metrics.jsonl", ranks, DEADLINE_SECONDS)
        stopped = time.monotonic()
        os.kill(ranks[rank].process.pid, signal.SIGSTOP)
        others = [one for i, one in enumerate(ranks) if i != rank]
        for one in others:
            one.process.wait(60)
        assert time.monotonic() - stopped < silence + 15
        output = "".join(one.output() for one in others)
        assert {one.process.returncode for one in others} == {3}, output
        assert "(cluster.heartbeat_timeout_seconds)" in output
        assert f"rank {rank} (" in output
        assert f"group {rank // ranks_per_group}, clients {rank // ranks_per_group})" in output
    finally:
        for one in ranks:
            one.__exit__()
