"""What a watchdog concludes, by an invented clock: each monitor's question, its message and its exit code."""

import time

import pytest

from dpa_ds.distributed import watchdog
from dpa_ds.distributed.launchers import Launch

FAR_FUTURE = time.monotonic() + 1e6
LAUNCH = Launch("env", 1, 4, 1, "n1", 1, launchers=((17, "torchrun"),))


def describe(rank: int) -> str:
    return f"rank {rank} (n1)"


def test_grace_ends_after_a_stop_was_requested() -> None:
    stop = watchdog._StopRequest(grace_seconds=20.0)
    monitor = watchdog._GraceMonitor(stop, 1, describe)
    assert not monitor.is_over(FAR_FUTURE)
    stop.make("SIGTERM on rank 2")
    assert not monitor.is_over(time.monotonic() + 19)
    assert monitor.is_over(time.monotonic() + 21)
    assert monitor.exit_code == 75
    assert "rank 1 (n1) did not come to the end of its step within 20 s" in monitor.message
    assert "(checkpoint.grace_seconds) of SIGTERM on rank 2" in monitor.message
    stop.make("SIGINT on rank 3")
    assert stop.reason == "SIGTERM on rank 2", "the first counts"


def test_a_failed_job_is_left_after_a_moment_without_a_word() -> None:
    failure = watchdog._Failure()
    monitor = watchdog._FailureMonitor(failure)
    assert not monitor.is_over(FAR_FUTURE)
    failure.report(4)
    failure.report(3)
    assert not monitor.is_over(time.monotonic() + watchdog.PATIENCE_SECONDS - 1)
    assert monitor.is_over(time.monotonic() + watchdog.PATIENCE_SECONDS + 1)
    assert (monitor.exit_code, monitor.message) == (4, "")


def test_a_store_that_is_silent_ends_the_rank_unless_it_was_asleep_itself() -> None:
    contact = watchdog._StoreContact()
    monitor = watchdog._StoreMonitor(contact, LAUNCH, 10.0, describe)
    start = contact.heard_at
    awake = [monitor.is_over(start + tenth / 10) for tenth in range(200)]
    assert awake == [False] * 101 + [True] * 99
    assert not monitor.is_over(start + 60), "this process slept for 40 seconds"
    assert monitor.exit_code == 3
    assert "has lost rank 0 (n1), which keeps the job's store, for 10 s" in monitor.message


def test_one_rank_of_a_host_speaks() -> None:
    def speaks(global_rank: int, local_rank: int) -> bool:
        launch = Launch("env", global_rank, 4, local_rank, "n1", 1)
        return watchdog._StoreMonitor(watchdog._StoreContact(), launch, 10.0, describe).message != ""

    assert [speaks(rank, rank % 2) for rank in (1, 2, 3)] == [True, True, False]


def test_the_end_of_a_launcher_asks_the_job_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = watchdog._LauncherMonitor(LAUNCH)
    for above, is_over in (([(17, "torchrun")], False), (None, False), ([], True)):
        monkeypatch.setattr(watchdog, "launchers_above", lambda above=above: above)
        assert monitor.is_over(0.0) == is_over
    assert monitor.exit_code is None
    assert monitor.message.startswith("the end of the torchrun launcher on ")


def test_silent_ranks() -> None:
    heartbeats = watchdog._Heartbeats(3, 5.0)
    start = time.monotonic()

    def look_after(seconds: float, *counters: str) -> list[int]:
        return heartbeats.silent_ranks(counters, start + seconds)

    assert look_after(2, "1", "1", "") == []
    assert look_after(4, "2", "1", "") == []
    assert look_after(6, "3", "1", "") == [2], "never heard of"
    assert look_after(8, "4", "1", "1") == [1]
    assert look_after(30, "4", "1", "1") == [], "it was this process that slept"
    assert look_after(33, "5", "1", "1") == []
    assert look_after(35.5, "6", "1", "1") == [1, 2]
