"""Rank groups with launchers of their own: one is one run, and each bound holds."""

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.launch.processes import (
    PYTHON,
    RUN,
    Forked,
    Running,
    adapters,
    assert_same_adapters,
    beside_python,
    free_port,
    run_by_hand,
    start_by_hand,
    wait_for,
)

pytestmark = pytest.mark.launch
DEADLINE_SECONDS = 150.0
SILENCE_SECONDS = 3
PREEMPTED = 75
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(model: Path, federation: Path) -> Arguments:
    """Two clients, three rounds with phases of a second or more."""

    def arguments(folder: Path, **overrides: object) -> list[str]:
        settings = {
            "federation__num_rounds": 3,
            "train__max_steps": 60,
            "cluster__heartbeat_timeout_seconds": SILENCE_SECONDS,
            "federation__timeout_seconds": 40,
        }
        return tiny.recipe(model, federation, folder / "runs", **{**settings, **overrides})

    return arguments


@contextmanager
def rendezvous(argv: Sequence[str]) -> Iterator[tuple[str, Running]]:
    """host:port of a running launch/rendezvous.py."""
    port = free_port()
    with Forked([PYTHON, "launch/rendezvous.py", *argv, "--port", str(port)]) as running:
        until_said(running, "rendezvous for tiny at")
        yield f"127.0.0.1:{port}", running


def until_said(running: Running, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in running.output():
        assert running.process.poll() is None, running.output()
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.05)


def start(argv: Sequence[str], group: int, meeting: str) -> Running:
    own = ["--cluster.group", str(group), "--cluster.rendezvous", meeting]
    return Forked([*RUN, *argv, *own], DS_ACCELERATOR="cpu")


def finished(groups: Sequence[Running]) -> list[str]:
    """What they printed; all ended well."""
    ended = run_by_hand(groups, DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [0] * len(ended), "\n\n".join(one.output for one in ended)
    return [one.output for one in ended]


def presence(run_dir: Path) -> dict[int, list[int]]:
    """Clients whose group was present, by round; each client is recorded once a round."""
    rows = [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "client"]
    assert len({(row["round"], row["client"]) for row in rows}) == len(rows)
    return {
        r: [row["client"] for row in rows if row["round"] == r and row["present"]]
        for r in {row["round"] for row in rows}
    }


@pytest.fixture(scope="module")
def undisturbed(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two elastic groups that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    argv = arguments(folder)
    with rendezvous(argv) as (meeting, _):
        outputs = finished([start(argv, group, meeting) for group in range(2)])
    assert "1 more with launchers of their own" in outputs[0]
    assert presence(folder / "runs" / "tiny") == {r: [0, 1] for r in range(4)}
    return folder / "runs" / "tiny"


def under_one_launcher(argv: Sequence[str], num_ranks: int) -> None:
    finished(start_by_hand([*RUN, *argv], num_ranks))


def test_it_equals_the_run_under_one_launcher(tmp_path: Path, arguments: Arguments, undisturbed: Path) -> None:
    under_one_launcher(arguments(tmp_path), 2)
    assert_same_adapters(adapters(tmp_path / "runs" / "tiny"), adapters(undisturbed), tolerance=0.0)


def test_groups_of_unequal_size(tmp_path: Path, arguments: Arguments) -> None:
    """With updates in 16 bits, whose two exchanges a round and carried suffix_lengths are the same here and there."""
    fixed, elastic = tmp_path / "fixed", tmp_path / "elastic"
    fixed.mkdir()
    elastic.mkdir()
    short = {"federation__compression": "int16"}
    under_one_launcher([*arguments(fixed, **short), "--cluster.ranks_per_group", "[2, 1]"], 3)
    argv = arguments(elastic, **short)
    with rendezvous(argv) as (meeting, _):
        own = ["--cluster.group", "0", "--cluster.rendezvous", meeting]
        launcher = [beside_python("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
        finished([Running([*launcher, *RUN[1:], *argv, *own]), start(argv, 1, meeting)])
    assert_same_adapters(adapters(elastic / "runs" / "tiny"), adapters(fixed / "runs" / "tiny"), tolerance=0.0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_group_is_left_out_and_joins_again(how: signal.Signals, tmp_path: Path, arguments: Arguments) -> None:
    """The run is as long as it takes, and is stopped when the group has been back for a round."""
    settings = {"federation__num_rounds": 500, "train__max_steps": 60, "checkpoint__keep_rounds": 500}
    settings["federation__timeout_seconds"] = 15  # how long a group that was left out asks for the others
    settings["checkpoint__every_steps"] = 10
    argv, run_dir = arguments(tmp_path, **settings), tmp_path / "runs" / "tiny"
    with rendezvous(argv) as (meeting, _), start(argv, 0, meeting) as survivor:
        with start(argv, 1, meeting) as lost:
            # Inside a phase: a group that wakes between two rounds has missed nothing, and continues without a new start.
            wait_for(run_dir, "rounds/round_000002.tmp/progress/client_01/*", [survivor, lost], DEADLINE_SECONDS)
            lost.process.send_signal(how)
            # Two rounds: a group that missed the last exchange of one only would be given its result, and continue.
            wait_until(lambda: [presence(run_dir).get(last_round(run_dir) - k) for k in (0, 1)] == [[0], [0]], survivor)
            if how == signal.SIGSTOP:
                lost.process.send_signal(signal.SIGCONT)
                ended = lost.wait(DEADLINE_SECONDS)
                assert ended.returncode == 3, ended.output
                (error,) = ended.errors
                assert "they continued without this one (it was silent for" in error
        alone = last_round(run_dir)
        with start(argv, 1, meeting) as back:
            wait_until(
                lambda: [0, 1] in [presence(run_dir)[r] for r in range(alone, last_round(run_dir))], survivor, back
            )
            for group in (survivor, back):
                group.process.terminate()
            assert [group.wait(DEADLINE_SECONDS).returncode for group in (survivor, back)] == [PREEMPTED, PREEMPTED]
    present = presence(run_dir)
    away = [r for r in sorted(present) if present[r] != [0, 1]]
    assert away == list(range(away[0], away[-1] + 1)), "left once, joined once"
    assert all(present[r] == [0] for r in away)
    assert alone in away
    shared, kept = (
        [round_of(run_dir, r, name) for r in (away[0] - 1, *away)] for name in ("global", "local/client_01")
    )
    for before, after in itertools.pairwise(shared):
        assert not equal(before, after), "the survivor's updates count"
    assert all(equal(kept[0], later) for later in kept[1:]), "an absent client keeps its local adapter"
    assert not equal(kept[0], round_of(run_dir, away[-1] + 1, "local/client_01")), "and continues with it"

    rounds = last_round(run_dir) + 1
    with rendezvous(argv) as (meeting, _):
        again = arguments(tmp_path, **{**settings, "federation__num_rounds": rounds})
        finished([start(again, group, meeting) for group in range(2)])
    assert presence(run_dir)[rounds] == [0, 1]


def test_the_next_coordinator_completes_a_round(tmp_path: Path, arguments: Arguments) -> None:
    """The first is killed when all have saved round 2 and its record is being written; the other one ends the run."""
    argv = arguments(tmp_path, federation__num_rounds=3, train__max_steps=10, checkpoint__keep_rounds=1)
    run_dir = tmp_path / "runs" / "tiny"
    records = run_dir / "metrics.jsonl"
    with rendezvous(argv) as (meeting, _), start(argv, 0, meeting) as lost, start(argv, 1, meeting) as survivor:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not records.exists() or '"round": 2' not in records.read_text():
            assert time.monotonic() < deadline, lost.output()
            time.sleep(0.001)
        lost.process.kill()
        ended = survivor.wait(DEADLINE_SECONDS)
        assert ended.returncode == 0, ended.output
    assert presence(run_dir) == {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [1]}
    assert not list(run_dir.glob("rounds/*.tmp"))
    last = run_dir / "rounds" / "round_000003"
    steps = [json.loads((last / f"local/client_0{k}/state.json").read_text())["info"]["steps_taken"] for k in (0, 1)]
    assert steps == [{"global": 20, "local": 20}, {"global": 30, "local": 30}], "client 0 is as it was after round 2"


def wait_until(condition: Callable[[], bool], *running: Running) -> None:
    """While all of `running` continue."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        outputs = "\n\n".join(one.output()[-2000:] for one in running)
        assert all(one.process.poll() is None for one in running), outputs
        assert time.monotonic() < deadline, outputs
        time.sleep(0.05)


def last_round(run_dir: Path) -> int:
    return max(int(path.parent.name.removeprefix("round_")) for path in run_dir.glob("rounds/round_??????/meta.json"))


def round_of(run_dir: Path, server_round: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "rounds" / f"round_{server_round:06d}" / name / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_without_the_rendezvous_all_stop_and_resume_later(
    tmp_path: Path, arguments: Arguments, undisturbed: Path
) -> None:
    argv, run_dir = arguments(tmp_path), tmp_path / "runs" / "tiny"
    with rendezvous(argv) as (meeting, server):
        groups = [start([*argv, "--federation.timeout_seconds", "15"], group, meeting) for group in range(2)]
        wait_for(run_dir, "rounds/round_000001/meta.json", groups, DEADLINE_SECONDS)
        server.kill()
        ended = run_by_hand(groups, DEADLINE_SECONDS)
        for one in ended:
            assert one.returncode == 3, one.output
            (error,) = one.errors
            assert f"no answer from the rendezvous at {meeting}" in error
            assert one.num_tracebacks == 0, one.output
    with rendezvous(argv) as (meeting, _):
        finished([start(argv, group, meeting) for group in range(2)])
    assert_same_adapters(adapters(run_dir), adapters(undisturbed), tolerance=0.0)
    assert presence(run_dir) == {r: [0, 1] for r in range(4)}


def test_too_few_clients_stop_the_run(tmp_path: Path, arguments: Arguments, undisturbed: Path) -> None:
    argv, run_dir = arguments(tmp_path, federation__min_clients=2), tmp_path / "runs" / "tiny"
    with rendezvous(argv) as (meeting, _):
        groups = [start(argv, group, meeting) for group in range(2)]
        wait_for(run_dir, "rounds/round_000001/meta.json", groups, DEADLINE_SECONDS)
        groups[1].kill()
        ended = groups[0].wait(DEADLINE_SECONDS)
        assert ended.returncode == 3, ended.output
        (error,) = ended.errors
        assert "the groups that are left host 1 clients, fewer than federation.min_clients = 2" in error
        for group in groups:
            group.__exit__()
    with rendezvous(argv) as (meeting, _):
        finished([start(argv, group, meeting) for group in range(2)])
    assert_same_adapters(adapters(run_dir), adapters(undisturbed), tolerance=0.0)


def test_nobody_at_the_rendezvous(tmp_path: Path, arguments: Arguments) -> None:
    argv = arguments(tmp_path, federation__timeout_seconds=3)
    meeting = f"127.0.0.1:{free_port()}"
    with start(argv, 0, meeting) as group:
        ended = group.wait(60)
    assert ended.returncode == 3, ended.output
    (error,) = ended.errors
    assert f"no answer from the rendezvous at {meeting}" in error
    assert "is launch/rendezvous.py running there" in error
    assert not (tmp_path / "runs" / "tiny").exists()


STRANGER = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo

class Poisoned:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
seconds = timedelta(seconds=5)
manager = Manager(
    pg=ProcessGroupGloo(timeout=seconds), load_state_dict=print, state_dict=Poisoned, min_replica_size=1,
    use_async_quorum=False, timeout=seconds, quorum_timeout=seconds, connect_timeout=seconds, rank=0, world_size=1,
    store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=f"http://{sys.argv[1]}", replica_id="stranger",
)
manager.load_state_dict({"step": 1_000_000, "batches_committed": 1})
print("it joins", flush=True)
while True:
    try:
        manager.start_quorum()
        print("it is in", flush=True)
    except Exception as error:
        print("it is out", error, flush=True)
"""


def test_a_stranger_neither_joins_nor_runs_code(tmp_path: Path, arguments: Arguments) -> None:
    """Who knows the rendezvous' address alone: torchft's public Manager, far ahead, with a state that makes a folder
    where it is unpickled. Half a minute, because a run of two groups continues beside it."""
    argv = arguments(tmp_path, federation__num_rounds=2, train__max_steps=20)
    made = tmp_path / "made by the stranger"
    with rendezvous(argv) as (meeting, running):
        with Running([PYTHON, "-c", STRANGER, meeting, str(made)]) as stranger:
            until_said(running, "refused a connection from")
            outputs = finished([start(argv, group, meeting) for group in range(2)])
            assert "it is in" not in stranger.output()
        refused = running.output()
    assert "does not know the job's secret" in refused
    assert not made.exists()
    assert presence(tmp_path / "runs" / "tiny") == {r: [0, 1] for r in range(3)}, outputs
