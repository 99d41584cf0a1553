"""The threads of a rank's watchdog, where nothing else is at work."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.distributed import watchdog
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank


def _finish_and_list_threads(job: Any) -> list[str]:
    job.start_watchdog(grace_seconds=30, heartbeat_timeout_seconds=30)
    job.finish()
    return [thread.name for thread in threading.enumerate()]


def test_no_thread_uses_the_store_when_the_interpreter_exits(tmp_path: Path) -> None:
    """torch's bindings abort in a thread that wants the GIL of an interpreter that is gone."""
    for names in run_on_ranks(_finish_and_list_threads, 2, tmp_path):
        assert [name for name in names if name.startswith("watch-")] == ["watch-signals"], "it ran"


def _rank_0_is_late(job: Any) -> str:
    watchdog.PERIOD_SECONDS = 0.05
    job.start_watchdog(grace_seconds=30, heartbeat_timeout_seconds=0.5)
    job.barrier("start")
    if job.launch.global_rank == 0:
        time.sleep(2.0)
    job.finish()
    return str(job.store.get("failure").decode()) if job.store.check(["failure"]) else ""


def test_a_rank_that_is_done_is_not_missed(tmp_path: Path) -> None:
    assert run_on_ranks(_rank_0_is_late, 2, tmp_path) == ["", ""]
