"""A rank's second pair of eyes: threads that see signals, silent ranks and failed jobs while the rank itself is busy or blocked.

A rank that waits in a collective runs no Python signal handler and reads no store. Its watch does both, every half second:
a signal on any rank asks all ranks of the job to stop; a rank that is not heard of fails the job; a job that has failed ends this
process even out of a collective that would never return.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpa_ds.distributed.launchers import launchers_above
from dpa_ds.errors import ClusterError, Preempted

if TYPE_CHECKING:
    import torch.distributed as dist

    from dpa_ds.distributed.launchers import Launch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PERIOD_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""How long a rank of a failed job may take to end by itself."""


class Watchdog:
    """Watches over one rank until the process ends.

    Args:
        store: the job's, reached through a connection of the watch's own; None for a job of one rank.
        grace_seconds: after a signal the process has ended within this time.
        heartbeat_timeout_seconds: a rank that is not heard of for so long fails the job.
        describe: global rank -> what a message calls it.
    """

    def __init__(
        self,
        launch: "Launch",
        store: "dist.Store | None",
        grace_seconds: float,
        heartbeat_timeout_seconds: float,
        describe: Callable[[int], str],
    ) -> None:
        self._launch, self._store = launch, store
        self._grace_seconds, self._heartbeat_timeout_seconds, self._describe = (
            grace_seconds,
            heartbeat_timeout_seconds,
            describe,
        )
        self._stop, self._stop_reason, self._stop_deadline = threading.Event(), "", float("inf")
        self._failed_at, self._exit_code, self._over = float("inf"), 1, threading.Event()
        self._threads: list[threading.Thread] = []
        self._heard = time.monotonic()
        """When the store last answered."""

    @property
    def stop_requested(self) -> bool:
        """Somebody asked the job to stop: finish the step, save, and raise `Preempted(stop_reason)`."""
        return self._stop.is_set()

    @property
    def stop_reason(self) -> str:
        """Which signal came, and where."""
        return self._stop_reason

    def start(self) -> None:
        """Take over the signals and begin. Main thread only."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:  # the handler itself has nothing to do: the number arrives through the pipe
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear_signals, args=[reading], name="watch-signals", daemon=True).start()
        for work in (self._guard, *([self._send_heartbeats] if self._store is not None else [])):
            self._threads.append(threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        """The rank is about to leave: nobody need miss it, and nothing ends it any more.

        An interpreter that exits while a thread is in torch's store aborts ("terminate called without an active exception").
        """
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    # ---- signals ----------------------------------------------------------------------------------------------

    def _hear_signals(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 16):
                if number in SIGNALS:
                    name = signal.Signals(number).name
                    self._request_stop(f"{name} on rank {self._launch.global_rank} ({self._launch.hostname})")

    def _request_stop(self, reason: str) -> None:
        if not self._stop.is_set():
            self._stop_reason = reason
            self._stop_deadline = time.monotonic() + self._grace_seconds
            self._stop.set()

    # ---- the job ----------------------------------------------------------------------------------------------

    def _send_heartbeats(self) -> None:
        """Tell the others that this rank lives, and learn what has become of the job."""
        assert self._store is not None
        store, rank, size = self._store.clone(), self._launch.global_rank, self._launch.job_world_size  # type: ignore[attr-defined]
        heartbeats, count, reported = _Heartbeats(size, self._heartbeat_timeout_seconds), 0, False
        while not self._over.is_set():
            count += 1
            try:
                store.set(f"heartbeat/{rank}", str(count))
                if self._stop.is_set() and not reported:
                    store.compare_set("stop", "", self._stop_reason)
                    reported = True
                if not reported and store.check(["stop"]):
                    self._request_stop(store.get("stop").decode())
                if store.check(["failure"]) and self._failed_at == float("inf"):
                    self._exit_code = int(store.get("failure").decode().split()[1])
                    self._failed_at = time.monotonic()
                if rank == 0:
                    self._look_around(store, heartbeats)
            except RuntimeError:  # the store lived on rank 0, which has ended or cannot be reached
                self._fail_soon(ClusterError.exit_code)
                return
            self._heard = time.monotonic()
            self._over.wait(PERIOD_SECONDS)

    def _look_around(self, store: "dist.Store", heartbeats: "_Heartbeats") -> None:
        """Rank 0: fail the job if a rank is silent."""
        silent = heartbeats.silent(
            [
                store.get(key).decode() if store.check([key]) else ""
                for key in map("heartbeat/{}".format, range(heartbeats.size))
            ]
        )
        silent = [rank for rank in silent if not store.check([f"done/{rank}"])]
        if silent and not store.check(["failure"]):
            code = ClusterError.exit_code
            if store.compare_set("failure", "", f"0 {code}").decode() == f"0 {code}":
                named = ", ".join(self._describe(rank) for rank in silent[:8]) + (", ..." if len(silent) > 8 else "")
                self._say(
                    f"error: nothing heard for {self._heartbeat_timeout_seconds:g} s (cluster.heartbeat_timeout_seconds) of {named}: stopped, cut "
                    "off, or its host is down; what was saved is intact, and the same command resumes from there"
                )

    def _guard(self) -> None:
        """End the process where its main thread cannot."""
        before = time.monotonic()
        while not self._over.wait(PERIOD_SECONDS):
            now = time.monotonic()
            left = launchers_above()
            gone = [launcher for launcher in self._launch.launchers if left is not None and launcher not in left]
            if gone:  # killed ones leave their ranks behind: a second start would meet them at work on the same run
                self._request_stop(f"the end of the {gone[0][1]} launcher on {self._launch.hostname}")
            if now - before > 4 * PERIOD_SECONDS:  # this process itself was stopped, or starved: others decide about it
                self._heard = now
            before = now
            if now > self._stop_deadline:
                self._say(
                    f"error: {self._describe(self._launch.global_rank)} did not come to the end of its step within "
                    f"{self._grace_seconds:g} s (checkpoint.grace_seconds) of {self._stop_reason}; what was saved before is "
                    "intact, and the same command resumes from there"
                )
                self._launch.exit(Preempted.exit_code)
            if now > self._failed_at + PATIENCE_SECONDS:
                self._launch.exit(self._exit_code)
            if self._store is not None and now > self._heard + self._heartbeat_timeout_seconds:
                if self._launch.global_rank == 1 or self._launch.local_rank == 0:  # one of each host that is left
                    self._say(
                        f"error: {self._launch.hostname} has lost {self._describe(0)}, which keeps the job's store, for "
                        f"{self._heartbeat_timeout_seconds:g} s (cluster.heartbeat_timeout_seconds): stopped, cut off, or its host is down; "
                        "what was saved is intact, and the same command resumes from there"
                    )
                self._launch.exit(ClusterError.exit_code)

    def _fail_soon(self, code: int) -> None:
        self._exit_code, self._failed_at = code, min(self._failed_at, time.monotonic())

    def _say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _Heartbeats:
    """When each rank's counter last changed, by this process's clock."""

    def __init__(self, size: int, heartbeat_timeout_seconds: float) -> None:
        self.size, self._heartbeat_timeout_seconds = size, heartbeat_timeout_seconds
        self._known = [("", time.monotonic())] * size
        self._looked = time.monotonic()

    def silent(self, counters: list[str]) -> list[int]:
        """Ranks whose counter has stood still for too long."""
        now = time.monotonic()
        if now - self._looked > 4 * PERIOD_SECONDS + 1:  # it is this process that was stopped: start from scratch
            self._known = [(known, now) for known, _ in self._known]
        self._looked = now
        self._known = [
            (counter, now) if counter != known else (known, since)
            for counter, (known, since) in zip(counters, self._known, strict=True)
        ]
        return [rank for rank, (_, since) in enumerate(self._known) if now - since > self._heartbeat_timeout_seconds]
