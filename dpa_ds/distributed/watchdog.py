"""A rank's second pair of eyes: threads that see signals, silent ranks and failed jobs while the rank is busy.

A rank that waits in a collective runs no Python signal handler and reads no store. Its watchdog does both, every half
second: a signal on any rank asks all ranks of the job to stop; a rank whose heartbeats cease fails the job; a job that
has failed ends this process even out of a collective that would never return.

Three threads: `watch-signals` receives signals; `watch-heartbeats` talks to the job's store; `watch-guard` asks each
monitor whether its time is over.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from dpa_ds.distributed.launchers import launchers_above
from dpa_ds.errors import ClusterError, Preempted, list_some

if TYPE_CHECKING:
    import torch.distributed as dist

    from dpa_ds.distributed.launchers import Launch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PERIOD_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""How long a rank of a failed job may take to end by itself."""
RESUMABLE = "what was saved is intact, and the same command resumes from there"


class Watchdog:
    """Watches over one rank until the process ends.

    Args:
        store: the job's, reached through a connection of the watchdog's own; None for a job of one rank.
        grace_seconds: after a signal the process has ended within this time.
        heartbeat_timeout_seconds: a rank that sends no heartbeat for so long fails the job.
        describe: what a message calls a rank, by its global rank.
    """

    def __init__(
        self,
        launch: "Launch",
        store: "dist.Store | None",
        grace_seconds: float,
        heartbeat_timeout_seconds: float,
        describe: Callable[[int], str],
    ) -> None:
        self._launch = launch
        self._store = store
        self._heartbeat_timeout_seconds = heartbeat_timeout_seconds
        self._describe = describe
        self._stop = _StopRequest(grace_seconds)
        self._failure = _Failure()
        self._contact = _StoreContact()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def stop_requested(self) -> bool:
        """The job was asked to stop: finish the step, save, and raise `Preempted(stop_reason)`."""
        return self._stop.is_made.is_set()

    @property
    def stop_reason(self) -> str:
        """Which signal came, and where."""
        return self._stop.reason

    def start(self) -> None:
        """Take over the signals and begin. Main thread only."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _arrives_through_the_pipe)
        # Not among those that `end` joins: it blocks in a read, and uses no store.
        threading.Thread(target=self._receive_signals, args=[reading], name="watch-signals", daemon=True).start()
        self._start_thread(self._guard, "watch-guard")
        if self._store is not None:
            self._start_thread(self._send_heartbeats, "watch-heartbeats")

    def end(self) -> None:
        """The rank is about to leave: nobody misses it, and nothing ends it any more.

        An interpreter that exits while a thread is in torch's store aborts ("terminate called without an active
        exception").
        """
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _start_thread(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- signals ----------------------------------------------------------------------------------------------

    def _receive_signals(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 16):
                if number in SIGNALS:
                    name = signal.Signals(number).name
                    self._stop.make(f"{name} on rank {self._launch.global_rank} ({self._launch.hostname})")

    # ---- monitors ---------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """End the process where its main thread cannot."""
        monitors = self._build_monitors()
        while not self._over.wait(PERIOD_SECONDS):
            now = time.monotonic()
            for monitor in monitors:
                if not monitor.is_over(now):
                    continue
                if monitor.exit_code is None:
                    self._stop.make(monitor.message)
                    continue
                if monitor.message:
                    say(monitor.message)
                self._launch.exit(monitor.exit_code)

    def _build_monitors(self) -> list["Monitor"]:
        monitors: list[Monitor] = [
            _LauncherMonitor(self._launch),
            _GraceMonitor(self._stop, self._launch.global_rank, self._describe),
            _FailureMonitor(self._failure),
        ]
        if self._store is not None:
            monitors.append(_StoreMonitor(self._contact, self._launch, self._heartbeat_timeout_seconds, self._describe))
        return monitors

    # ---- heartbeats -------------------------------------------------------------------------------------------

    def _send_heartbeats(self) -> None:
        """Show the others that this rank lives, and learn what has become of the job."""
        assert self._store is not None
        # A connection of its own: a store serves one request at a time, and the main thread may wait in one for long.
        store = self._store.clone()  # type: ignore[attr-defined]
        heartbeats = _Heartbeats(self._launch.job_world_size, self._heartbeat_timeout_seconds)
        count = 0
        try:
            while not self._over.is_set():
                count += 1
                store.set(f"heartbeat/{self._launch.global_rank}", str(count))
                self._share_stop(store)
                self._learn_of_failure(store)
                if self._launch.global_rank == 0:
                    self._fail_if_silent(store, heartbeats)
                self._contact.heard_at = time.monotonic()
                self._over.wait(PERIOD_SECONDS)
        except RuntimeError:  # the store lived on rank 0, which has ended or cannot be reached
            self._failure.report(ClusterError.exit_code)

    def _share_stop(self, store: "dist.Store") -> None:
        if not self.stop_requested:
            if store.check(["stop"]):
                self._stop.make(store.get("stop").decode())
        elif not self._stop.is_shared:
            store.compare_set("stop", "", self._stop.reason)
            self._stop.is_shared = True

    def _learn_of_failure(self, store: "dist.Store") -> None:
        if store.check(["failure"]):
            self._failure.report(exit_status_of(store.get("failure").decode()))

    def _fail_if_silent(self, store: "dist.Store", heartbeats: "_Heartbeats") -> None:
        """Rank 0: fail the job if a rank is silent that has not ended well."""
        counters = []
        for rank in range(self._launch.job_world_size):
            key = f"heartbeat/{rank}"
            counters.append(store.get(key).decode() if store.check([key]) else "")
        silent = heartbeats.silent_ranks(counters, time.monotonic())
        silent = [rank for rank in silent if not store.check([f"done/{rank}"])]
        if not silent or store.check(["failure"]):
            return
        mine = f"0 {ClusterError.exit_code}"
        if store.compare_set("failure", "", mine).decode() != mine:
            return  # another rank has failed meanwhile, and said why
        named = list_some([self._describe(rank) for rank in silent])
        say(
            f"error: nothing heard for {self._heartbeat_timeout_seconds:g} s (cluster.heartbeat_timeout_seconds) of "
            f"{named}: stopped, cut off, or its host is down; {RESUMABLE}"
        )


# ---- what the threads know ----------------------------------------------------------------------------------------


@dataclass
class _StopRequest:
    """The wish that the job stops: the first one counts, and its grace time runs from then."""

    grace_seconds: float
    is_made: threading.Event = field(default_factory=threading.Event)
    reason: str = ""
    deadline: float = float("inf")
    is_shared: bool = False
    """The other ranks can read it in the store."""

    def make(self, reason: str) -> None:
        if not self.is_made.is_set():
            self.reason = reason
            self.deadline = time.monotonic() + self.grace_seconds
            self.is_made.set()  # last: who sees it reads the reason


@dataclass
class _Failure:
    """That the job has failed; the first report counts."""

    exit_code: int = 1
    reported_at: float = float("inf")

    def report(self, exit_code: int) -> None:
        if self.reported_at == float("inf"):
            self.exit_code = exit_code
            self.reported_at = time.monotonic()


@dataclass
class _StoreContact:
    heard_at: float = field(default_factory=time.monotonic)
    """When the store last answered."""


class _PauseDetector:
    """Notices that this process itself was stopped or starved: its clock then says nothing about the others."""

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self._last_asked = time.monotonic()

    def was_paused(self, now: float) -> bool:
        """More than `longest_seconds` have gone since the last call."""
        seconds = now - self._last_asked
        self._last_asked = now
        return seconds > self._longest_seconds


class _Heartbeats:
    """When each rank's counter last changed, by this process's clock."""

    def __init__(self, num_ranks: int, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._counters = [""] * num_ranks
        self._changed_at = [time.monotonic()] * num_ranks
        # A second more than in the guard: one look asks the store for every rank.
        self._pauses = _PauseDetector(4 * PERIOD_SECONDS + 1)

    def silent_ranks(self, counters: Sequence[str], now: float) -> list[int]:
        """Ranks whose counter has stood still for too long."""
        was_paused = self._pauses.was_paused(now)
        silent = []
        for rank, counter in enumerate(counters):
            if was_paused or counter != self._counters[rank]:
                self._changed_at[rank] = now
            self._counters[rank] = counter
            if now - self._changed_at[rank] > self._timeout_seconds:
                silent.append(rank)
        return silent


# ---- monitors -----------------------------------------------------------------------------------------------------


class Monitor(Protocol):
    """One reason to end, though the main thread may be busy or blocked."""

    @property
    def exit_code(self) -> int | None:
        """Status that the process ends with at once; None: the job is asked to stop, and saves."""
        ...

    @property
    def message(self) -> str:
        """Line for standard error, or reason to stop; empty if another rank speaks."""
        ...

    def is_over(self, now: float) -> bool:
        """Asked every PERIOD_SECONDS, with the time by the monotonic clock."""
        ...


@dataclass
class _LauncherMonitor:
    """A launcher above this rank has ended. A killed one leaves its ranks: a second start would meet them at work."""

    launch: "Launch"
    exit_code: None = None
    message: str = ""

    def is_over(self, now: float) -> bool:
        alive = launchers_above()
        if alive is None:  # it cannot be found out just now
            return False
        for launcher in self.launch.launchers:
            if launcher not in alive:
                _, name = launcher
                self.message = f"the end of the {name} launcher on {self.launch.hostname}"
                return True
        return False


@dataclass
class _GraceMonitor:
    """The job was asked to stop, and the rank has not ended within `checkpoint.grace_seconds`."""

    stop: _StopRequest
    rank: int
    describe: Callable[[int], str]
    exit_code: int = Preempted.exit_code

    @property
    def message(self) -> str:
        return (
            f"error: {self.describe(self.rank)} did not come to the end of its step within "
            f"{self.stop.grace_seconds:g} s (checkpoint.grace_seconds) of {self.stop.reason}; what was saved before is "
            "intact, and the same command resumes from there"
        )

    def is_over(self, now: float) -> bool:
        return now > self.stop.deadline


@dataclass
class _FailureMonitor:
    """The job has failed, and the rank has not ended by itself. The rank that failed has said why."""

    failure: _Failure
    message: str = ""

    @property
    def exit_code(self) -> int:
        return self.failure.exit_code

    def is_over(self, now: float) -> bool:
        return now > self.failure.reported_at + PATIENCE_SECONDS


class _StoreMonitor:
    """The job's store, on rank 0, has not answered within `cluster.heartbeat_timeout_seconds`."""

    exit_code = ClusterError.exit_code

    def __init__(
        self, contact: _StoreContact, launch: "Launch", timeout_seconds: float, describe: Callable[[int], str]
    ) -> None:
        self._contact = contact
        self._launch = launch
        self._timeout_seconds = timeout_seconds
        self._describe = describe
        self._pauses = _PauseDetector(4 * PERIOD_SECONDS)

    @property
    def message(self) -> str:
        speaks_for_host = self._launch.global_rank == 1 or self._launch.local_rank == 0
        if not speaks_for_host:
            return ""
        return (
            f"error: {self._launch.hostname} has lost {self._describe(0)}, which keeps the job's store, for "
            f"{self._timeout_seconds:g} s (cluster.heartbeat_timeout_seconds): stopped, cut off, or its host is down; "
            f"{RESUMABLE}"
        )

    def is_over(self, now: float) -> bool:
        if self._pauses.was_paused(now):  # then the others decide about this rank
            self._contact.heard_at = now
        return now > self._contact.heard_at + self._timeout_seconds


def _arrives_through_the_pipe(number: int, frame: FrameType | None) -> None:
    """Handler with nothing to do: `set_wakeup_fd` has written the number into the pipe that `watch-signals` reads."""


def say(text: str) -> None:
    """Write a line to standard error, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def exit_status_of(failure: str) -> int:
    """Exit status in `RANK STATUS`, which the first rank to fail wrote. A failure never ends with 0.

    Whoever reaches the store can write there: what is no such text counts as a failure of the cluster.
    """
    read = read_failure(failure)
    return ClusterError.exit_code if read is None else read[1]


def read_failure(failure: str) -> tuple[int, int] | None:
    """The rank and its exit status; None for what no rank writes."""
    match = re.fullmatch(r"(\d{1,9}) (\d{1,3})", failure)
    if match is None or not 0 < int(match[2]) < 256:
        return None
    return int(match[1]), int(match[2])
