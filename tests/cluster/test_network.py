"""Faults of a real network between hosts: found within their bounds, survived, and restored exactly."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.cluster.hosts import Hosts
from tests.launch.processes import (
    PYTHON,
    RUN,
    Ended,
    Running,
    adapters,
    assert_same_adapters,
    free_port,
    run_by_hand,
    start_by_hand,
    wait_for,
)
from tests.launch.test_elastic import last_round, presence, wait_until

pytestmark = pytest.mark.cluster
DEADLINE_SECONDS = 150.0
SILENCE_SECONDS = 3.0
TIMEOUT_SECONDS = 20.0
AT_END_SECONDS = 15.0
"""From finding a fault to the end of all processes: PATIENCE_SECONDS of the watch, and of the store, on a busy machine."""
PREEMPTED = 75
PORT = "29600"
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(model: Path, federation: Path) -> Arguments:
    """Two clients, phases of some seconds, with dropout."""

    def arguments(folder: Path, **overrides: object) -> list[str]:
        settings = {
            "train__max_steps": 100,
            "lora__dropout": 0.1,
            "checkpoint__every_steps": 20,
            "cluster__heartbeat_timeout_seconds": SILENCE_SECONDS,
            "federation__timeout_seconds": TIMEOUT_SECONDS,
        }
        return tiny.recipe(model, federation, folder / "runs", **{**settings, **overrides})

    return arguments


def start_job(hosts: Hosts, argv: Sequence[str]) -> list[Running]:
    """One job: rank 0 on n1, rank 1 on n2."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": hosts.address(1), "MASTER_PORT": str(free_port())}
    return [Running(hosts.on(r + 1, [*RUN, *argv]), **common, RANK=str(r), LOCAL_RANK="0") for r in range(2)]


@pytest.mark.parametrize("ranks_per_group", [1, 2])
def test_a_cut_link_stops_one_job_on_both_sides_in_time(
    ranks_per_group: int, hosts: Hosts, tmp_path: Path, arguments: Arguments
) -> None:
    """Two groups, and one group across the hosts. Once the link is back the same command resumes, exact to the bit."""
    (tmp_path / "undisturbed").mkdir()
    layout = ["--cluster.ranks_per_group", str(ranks_per_group)]
    ended = run_by_hand(start_by_hand([*RUN, *arguments(tmp_path / "undisturbed"), *layout], 2), DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [0, 0], ended[0].output
    argv, run_dir = [*arguments(tmp_path), *layout], tmp_path / "runs" / "tiny"
    ranks = start_job(hosts, argv)
    wait_for(run_dir, "rounds/round_000002.tmp/progress/*/*/state.json", ranks, DEADLINE_SECONDS)
    hosts.unplug(2)
    cut = time.monotonic()
    try:
        ended = run_by_hand(ranks, DEADLINE_SECONDS)
    finally:
        hosts.plug(2)
    seconds = time.monotonic() - cut
    print(f"both sides had ended {seconds:.1f} s after the cut")
    assert seconds < SILENCE_SECONDS + AT_END_SECONDS
    assert [one.returncode for one in ended] == [3, 3], "\n\n".join(one.output for one in ended)
    assert all(one.num_tracebacks == 0 for one in ended)
    (here,), (there,) = (one.errors for one in ended)
    assert f"nothing heard for {SILENCE_SECONDS:g} s (cluster.heartbeat_timeout_seconds) of rank 1 (n2, group" in here
    assert "n2 has lost rank 0 (n1, group 0, clients 0" in there

    ended = run_by_hand(start_job(hosts, argv), DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [0, 0], ended[0].output
    undisturbed = tmp_path / "undisturbed" / "runs" / "tiny"
    assert_same_adapters(adapters(run_dir), adapters(undisturbed), tolerance=0.0)


def start_group(hosts: Hosts, argv: Sequence[str], group: int) -> Running:
    """A job of its own on host n(group + 1)."""
    own = ["--cluster.group", str(group), "--cluster.rendezvous", f"{hosts.address(1)}:{PORT}"]
    return Running(hosts.on(group + 1, [*RUN, *argv, *own]))


@pytest.mark.parametrize("dies", [False, True])
def test_a_group_whose_host_is_cut_off_is_left_out_and_joins_again(
    dies: bool, hosts: Hosts, tmp_path: Path, arguments: Arguments
) -> None:
    """The host of one group loses its link, or its power; the other continues, and the group joins when the host is back."""
    argv = arguments(tmp_path, federation__num_rounds=500, train__max_steps=40)
    run_dir = tmp_path / "runs" / "tiny"
    rendezvous = Running(hosts.on(1, [PYTHON, "launch/rendezvous.py", *argv, "--port", PORT]))
    with rendezvous, start_group(hosts, argv, 0) as survivor:
        with start_group(hosts, argv, 1) as lost:
            wait_for(run_dir, "rounds/round_000001/meta.json", [survivor, lost], DEADLINE_SECONDS)
            hosts.unplug(2)
            cut = time.monotonic()
            try:
                if dies:
                    lost.kill()
                wait_until(lambda: presence(run_dir).get(last_round(run_dir)) == [0], survivor)
                survived_after = time.monotonic() - cut
                ended = None if dies else lost.wait(DEADLINE_SECONDS)
            finally:
                hosts.plug(2)
        print(f"the survivor's next round was complete {survived_after:.1f} s after the cut")
        assert survived_after < TIMEOUT_SECONDS + AT_END_SECONDS
        if ended is not None:
            refused(ended, f"no answer from the rendezvous at {hosts.address(1)}:{PORT}")
            assert ended.seconds < DEADLINE_SECONDS
        alone = last_round(run_dir)
        with start_group(hosts, argv, 1) as back:
            wait_until(
                lambda: [0, 1] in [presence(run_dir)[r] for r in range(alone, last_round(run_dir))], survivor, back
            )
            for group in (survivor, back):
                for process in group.remaining():
                    with suppress(psutil.Error):
                        if "launch/run.py" in process.cmdline():
                            process.terminate()
            assert all("all is saved" in group.wait(DEADLINE_SECONDS).output for group in (survivor, back))


def refused(ended: Ended, message: str) -> None:
    assert ended.returncode == 3, ended.output
    (error,) = ended.errors
    assert message in error
    assert ended.num_tracebacks == 0, ended.output
