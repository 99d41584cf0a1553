"""What ranks exchange, on real ranks: facts, decisions, failure, the all-reduce of the leaders."""

import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dpa_ds.config.schema import ClusterConfig
from dpa_ds.distributed.job_store import JobStore, _Hello, _judge
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import build_world, world_without_collectives
from dpa_ds.errors import ClusterError, ConfigError
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
CLUSTER = ClusterConfig(timeout_seconds=30, device="cpu")


def outcome(call: Any, *args: Any) -> str:
    """What `call` returned, or the error that it raised with its exit code."""
    try:
        return str(call(*args))
    except (ClusterError, ConfigError) as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"


# ---- check_consistency -------------------------------------------------------------------------------------------------------


def check(job: JobStore, facts: list[dict[str, str]], errors: list[str | None], timeout_seconds: float = 30.0) -> str:
    rank = job.launch.global_rank
    error = ConfigError(errors[rank]) if errors[rank] else None  # type: ignore[arg-type]
    return outcome(job.check_consistency, facts[rank], error, timeout_seconds)


def test_ranks_that_agree_learn_each_others_hosts(tmp_path: Path) -> None:
    results = run_on_ranks(_hosts_after_check, 3, tmp_path)
    assert all(len(hosts) == 3 for hosts in results)
    assert len({tuple(hosts) for hosts in results}) == 1


def _hosts_after_check(job: JobStore) -> list[str]:
    job.hosts = []
    job.check_consistency({"code": "1"}, None, 30.0)
    return job.hosts


def test_a_fact_that_differs_is_reported_to_all(tmp_path: Path) -> None:
    facts = [{"code": "1", "config": "a"}, {"code": "1", "config": "b"}]
    reported = run_on_ranks(check, 2, tmp_path, facts, [None, None])
    assert reported[0] == reported[1]
    assert reported[0].startswith("ClusterError 3: hosts differ in config: a on ")


def test_error_of_one_rank_reaches_all_with_its_host_and_exit_code(tmp_path: Path) -> None:
    reported = run_on_ranks(check, 2, tmp_path, [{}, {}], [None, "no such recipe"])
    assert reported[0].startswith("ClusterError 2: no such recipe (only on ")
    assert reported[1] == "ConfigError 2: no such recipe"


def test_error_of_all_ranks_is_each_ones_own(tmp_path: Path) -> None:
    reported = run_on_ranks(check, 2, tmp_path, [{}, {}], ["unknown key"] * 2)
    assert reported == ["ConfigError 2: unknown key"] * 2


def test_disagreement_names_every_host_and_value() -> None:
    hellos = [_Hello(host, {"code": code}) for host, code in (("n1", "a"), ("n1", "a"), ("n2", "b"), ("n3", "b"))]
    verdict = _judge(hellos)
    assert "hosts differ in code: a on n1; b on n2, n3; make it equal" in verdict.error
    assert (verdict.exit_code, verdict.hosts) == (3, ["n1", "n1", "n2", "n3"])
    assert _judge(hellos[:2]).error == ""


def wait_for_absent(job: JobStore) -> tuple[str, float]:
    started = time.monotonic()
    if job.launch.global_rank == 1:
        time.sleep(3)  # later than the bound
        return "", 0.0
    return outcome(job.check_consistency, {}, None, 0.5), time.monotonic() - started


def test_rank_that_does_not_arrive_is_named_in_time(tmp_path: Path) -> None:
    reported, seconds = run_on_ranks(wait_for_absent, 2, tmp_path)[0]
    assert reported.startswith("ClusterError 3: rank 0 of 2 waited 0.5 s (cluster.timeout_seconds) in vain for rank 1:")
    assert seconds < 2


OTHER_JOB = (
    "ClusterError 3: another job runs at 127.0.0.1:29500 already, and is not touched: choose another MASTER_PORT"
)


def intrude(job: JobStore) -> tuple[str, list[str], list[str]]:
    """Rank 1 of another job comes to this job's store, after the ranks have agreed; then one of a number unknown here."""
    agreed = outcome(job.check_consistency, {"code": "1"}, None, 30.0)
    if job.launch.global_rank != 0:
        job.finish()
        return agreed, [], []
    refused, exits = [], []

    class Exited(Exception):
        pass

    def noted_exit(launch: Launch, code: int) -> None:
        exits.append(f"rank {launch.global_rank}: {code}")
        raise Exited

    for rank, facts in ((1, {"code": "1"}), (1, {"code": "2"}), (2, {"code": "1"})):
        intruder = JobStore(Launch("env", rank, 3, rank, "127.0.0.1", 29500), job.store)
        refused.append(outcome(intruder.check_consistency, facts, None, 5.0))
        with patch.object(Launch, "exit", noted_exit), suppress(Exited):
            intruder.fail(ClusterError("x"))
    job.finish()  # nobody has written a failure
    return agreed, refused, exits


def test_a_second_job_at_the_same_port_is_refused_and_the_first_untouched(tmp_path: Path) -> None:
    results = run_on_ranks(intrude, 2, tmp_path)
    assert [agreed for agreed, *_ in results] == ["None", "None"]
    _, refused, exits = results[0]
    assert len(refused) == 3
    assert all(text.startswith(OTHER_JOB) for text in refused), refused
    assert exits == ["rank 1: 3", "rank 1: 3", "rank 2: 3"]


# ---- broadcast_from_rank_zero, publish, fail ----------------------------------------------------------------------------------------


def broadcast(job: JobStore) -> tuple[list[Any], int]:
    calls: list[int] = []

    def decision() -> Any:
        calls.append(1)
        return {"rounds": 3, "by": job.launch.global_rank}

    answers = [job.broadcast_from_rank_zero(key, decision) for key in ("first", "second")]
    job.publish(f"from/{job.launch.global_rank}", job.launch.global_rank * 10)
    answers += [job.lookup(f"from/{rank}") for rank in range(job.launch.job_world_size)]
    job.finish()
    return answers, len(calls)


def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    results = run_on_ranks(broadcast, 3, tmp_path)
    expected = [{"rounds": 3, "by": 0}] * 2 + [0, 10, 20]
    assert [answers for answers, _ in results] == [expected] * 3
    assert [calls for _, calls in results] == [2, 0, 0]


def fail_while_others_wait(job: JobStore) -> tuple[str, float]:
    job.store.set_timeout(timedelta(seconds=30))
    started = time.monotonic()
    if job.launch.global_rank == 1:
        time.sleep(0.3)
        job.store.compare_set("failure", "", "1 2")  # what JobStore.fail does before it ends the process
        return "", 0.0
    waits = {0: job.finish, 2: lambda: job.lookup("never")}
    return outcome(waits[job.launch.global_rank]), time.monotonic() - started


def test_failure_ends_every_wait(tmp_path: Path) -> None:
    results = run_on_ranks(fail_while_others_wait, 3, tmp_path)
    for reported, seconds in (results[0], results[2]):
        assert reported == "ClusterError 3: another rank of the job failed"
        assert seconds < 5


def fail(job: JobStore, folder: str, order: list[float]) -> None:
    import os
    import sys

    rank = job.launch.global_rank
    output = os.open(f"{folder}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 2)
    sys.stderr = os.fdopen(2, "w")
    exit_code = os.fork()  # the process that fails ends; this one reports how
    if exit_code == 0:
        time.sleep(order[rank])
        job.fail(ConfigError("wrong") if rank == 1 else ValueError("consequence"))
    _, status = os.waitpid(exit_code, 0)
    return os.waitstatus_to_exitcode(status)  # type: ignore[return-value]


def test_first_to_fail_speaks_and_gives_the_exit_code(tmp_path: Path) -> None:
    codes = run_on_ranks(fail, 3, tmp_path, str(tmp_path), [0.5, 0.0, 0.7])
    assert codes == [2, 2, 2]
    reported = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert reported[1].startswith("[rank 1 on ")
    assert reported[1].endswith("] error: wrong\n")
    assert reported[0] == reported[2] == ""


def fail_after_a_stranger(job: JobStore, text: str) -> str:
    """Exit status of a rank that fails after somebody has written `text` as the failure of the job, and what it says."""
    job.store.set("failure", text)
    said = []
    job._report = lambda error: said.append(str(error))  # type: ignore[method-assign]
    job._outlive_others = lambda: None  # type: ignore[method-assign]

    class Exited(Exception):
        pass

    def noted_exit(launch: Launch, code: int) -> None:
        raise Exited(f"{code} {said}")

    with patch.object(Launch, "exit", noted_exit):
        try:
            job.fail(ClusterError("another rank of the job failed"))
        except Exited as exited:
            return str(exited)
    return "it continues"


@pytest.mark.parametrize("text", ["0 0", "oops", "7 2", "-1 3", "0 999", ""])
def test_a_failure_that_no_rank_wrote_never_ends_with_0(tmp_path: Path, text: str) -> None:
    (ended,) = run_on_ranks(fail_after_a_stranger, 1, tmp_path, text)
    status = ended.split()[0]
    assert status == {"7 2": "2", "": "3"}.get(text, "3")
    if text:
        assert f"no rank of this job wrote '{text}'" in ended


# ---- worlds ------------------------------------------------------------------------------------------------------


def exchange(job: JobStore, sizes: tuple[int, ...]) -> dict[str, Any]:
    world = build_world(job, Topology(sizes, len(sizes)), CLUSTER, 30.0)
    mine = float(10 * world.group + world.rank)
    result: dict[str, Any] = {
        "place": (world.group, world.rank, world.world_size, world.is_leader, world.is_coordinator),
        "sum": world.all_reduce_(torch.tensor([mine])).item(),
        "from leader": world.broadcast_(torch.tensor([mine])).item(),
    }
    if world.leaders is not None:
        buffer = torch.arange(5, dtype=torch.float32) * (world.group + 1)
        world.leaders.all_reduce_(buffer, "update")
        world.leaders.all_reduce_(torch.ones(3, dtype=torch.float64), "metrics")
        world.leaders.all_reduce_(torch.ones(2), "update")
        result |= {"federation": buffer.tolist(), "bytes": dict(world.leaders.bytes_handed)}
    world.close()
    return result


def test_groups_are_worlds_of_their_own_and_leaders_meet(tmp_path: Path) -> None:
    results = run_on_ranks(exchange, 3, tmp_path, (2, 1))
    assert [r["place"] for r in results] == [(0, 0, 2, True, True), (0, 1, 2, False, False), (1, 0, 1, True, False)]
    assert [r["sum"] for r in results] == [1, 1, 10], "no sum crosses a group"
    assert [r["from leader"] for r in results] == [0, 0, 10]
    assert "federation" not in results[1]
    for leader in (results[0], results[2]):
        assert leader["federation"] == [0, 3, 6, 9, 12]
        assert leader["bytes"] == {"update": 5 * 4 + 2 * 4, "metrics": 3 * 8}


NESTED = {"text": "Grüße, 世界", "numbers": [1, -2.5, None, True], "empty": {}}


def say_what_the_leader_says(job: JobStore, sizes: tuple[int, ...]) -> list[Any]:
    world = build_world(job, Topology(sizes, len(sizes)), CLUSTER, 30.0)
    mine = [NESTED, "x" * 100_000, world.group] if world.is_leader else object()  # the others' need not even be JSON
    return [
        world.broadcast_json(mine),
        world.broadcast_json((world.group, world.rank)),
        world.on_all_ranks(True),
        world.on_all_ranks(world.is_leader),
        world.on_all_ranks(False),
    ]


def test_every_rank_of_a_group_has_the_leaders_value(tmp_path: Path) -> None:
    results = run_on_ranks(say_what_the_leader_says, 3, tmp_path, (2, 1))
    for group, rank in ((0, 0), (0, 1), (1, 2)):
        leaders, place, everybody, only_the_leader, nobody = results[rank]
        assert leaders == [NESTED, "x" * 100_000, group]
        assert place == [group, 0], "a tuple comes back as a list, on the leader too"
        assert (everybody, only_the_leader, nobody) == (True, group == 1, False)


def stay_alone(job: JobStore) -> dict[str, Any]:
    import torch.distributed as dist

    world = world_without_collectives(job, Topology((1, 1), 2))
    with world.leader_first():
        world.barrier()
    result = {
        "place": (world.group, world.rank, world.world_size, world.is_leader, world.is_coordinator),
        "sum": world.all_reduce_(torch.tensor([3.0])).item(),
        "value": world.broadcast_json(world.group),
        "from leader": world.from_leader(lambda: torch.tensor([float(world.group)]), torch.zeros(1)).item(),
        "leaders": world.leaders is None,
        "initialized": dist.is_initialized(),
    }
    world.close()
    return result


def test_a_group_of_one_needs_no_process_group(tmp_path: Path) -> None:
    for group, result in enumerate(run_on_ranks(stay_alone, 2, tmp_path)):
        assert result == {
            "place": (group, 0, 1, True, group == 0),
            "sum": 3.0,
            "value": group,
            "from leader": group,
            "leaders": True,
            "initialized": False,
        }


def lose_a_leader(job: JobStore) -> tuple[str, float]:
    world = build_world(job, Topology((1, 1), 2), CLUSTER, 30.0)
    assert world.leaders is not None
    world.leaders.all_reduce_(torch.ones(1), "update")
    if world.group == 1:
        return "", 0.0  # this process ends
    started = time.monotonic()
    return outcome(world.leaders.all_reduce_, torch.ones(1), "update"), time.monotonic() - started


def test_lost_leader_is_noticed_at_once(tmp_path: Path) -> None:
    reported, seconds = run_on_ranks(lose_a_leader, 2, tmp_path)[0]
    assert reported.startswith("ClusterError 3: leader 0 of 2 lost its peers in the update all-reduce")
    assert seconds < 20


def one_after_the_other(job: JobStore, folder: str) -> None:
    world = build_world(job, Topology((3,), 1), CLUSTER, 30.0)
    cached = Path(folder) / "cached"
    with world.leader_first():
        if world.is_leader:
            time.sleep(0.5)
            cached.write_text("")
        else:
            assert cached.exists(), "a follower came before the leader was done"


def test_leader_first(tmp_path: Path) -> None:
    run_on_ranks(one_after_the_other, 3, tmp_path, str(tmp_path))
