"""All ranks launched together: the store where they meet, what they agree on, and which of them reports a failure."""

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dpa_ds.config.shipped import as_started_here
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.store import connect_store
from dpa_ds.distributed.watchdog import Watchdog, exit_status_of, read_failure
from dpa_ds.errors import ClusterError, DpaError, Preempted, list_some

if TYPE_CHECKING:
    import torch.distributed as dist

JOIN_TIMEOUT_SECONDS = 300.0
PACKAGES = ("torch", "deepspeed", "transformers", "peft")
POLL_SECONDS = 0.05
STORE_SECONDS_AT_END = 3.0
"""How long a failing rank waits for the store and the others: launchers end the others meanwhile."""


class JobStore:
    """All ranks launched together, and the key-value store through which they find each other.

    Collective: every rank of the job constructs it.
    """

    def __init__(
        self, launch: Launch, store: "dist.Store | None" = None, timeout_seconds: float = JOIN_TIMEOUT_SECONDS
    ) -> None:
        self.launch = launch
        self.hosts: list[str] = [launch.hostname]
        self.store = store if store is not None else connect_store(launch, timeout_seconds)
        self.timeout_seconds = timeout_seconds
        """Bound on every wait for other ranks; `cluster.timeout_seconds` once `check_consistency` has begun."""
        self.describe_rank: Callable[[int], str] = self._name_and_host
        """What messages call a rank; see `topology.describe_rank` for more than its host."""
        self._watchdog: Watchdog | None = None
        self._is_member = True
        """False once the store turns out to be another job's: nothing more is written there."""

    def start_watchdog(self, grace_seconds: float, heartbeat_timeout_seconds: float) -> None:
        """From now on notice signals, silent ranks and failures, whatever this rank is doing. Main thread only."""

        def describe(rank: int) -> str:
            return self.describe_rank(rank)  # read when it is needed: it is set once the topology is planned

        store = self.store if self.launch.job_world_size > 1 else None
        self._watchdog = Watchdog(self.launch, store, grace_seconds, heartbeat_timeout_seconds, describe)
        self._watchdog.start()

    @property
    def stop_requested(self) -> bool:
        """The job was asked to stop: save and call `preempt`."""
        return self._watchdog is not None and self._watchdog.stop_requested

    def preempt(self) -> NoReturn:
        """Leave the work, everything being saved.

        Raises:
            Preempted: always.
        """
        if self._watchdog is None:
            raise Preempted("a request to stop")
        raise Preempted(self._watchdog.stop_reason)

    def _name_and_host(self, rank: int) -> str:
        host = self.hosts[rank] if rank < len(self.hosts) else "?"
        return f"rank {rank} ({host})"

    def check_consistency(self, facts: Mapping[str, str], error: DpaError | None, timeout_seconds: float) -> None:
        """Compare `facts` (code version, config, packages) of all ranks before anything is built or written.

        Also carries a rank's own start-up `error` to rank 0, so that it is reported once, with its hosts.
        Collective: every rank of the job, same fact names.

        Raises:
            ClusterError: ranks differ in a fact, did not arrive in time (their ranks are named), or the store is
                another job's.
            DpaError: a rank had an error.
        """
        rank = self.launch.global_rank
        mine = _Hello(self.launch.hostname, dict(facts), nonce=secrets.token_hex(8))
        if error is not None:
            mine = replace(mine, error=str(error), exit_code=error.exit_code)
        self.timeout_seconds = timeout_seconds
        self.store.set_timeout(timedelta(seconds=timeout_seconds))
        text = json.dumps(asdict(mine))
        # Not `set`: where another job runs at this address, its rank of this number has been here.
        if self.store.compare_set(f"hello/{rank}", "", text).decode() != text:
            raise self._other_job()
        if rank == 0:
            self.store.set("verdict", json.dumps(asdict(_judge(self._collect_hellos()))))
        self._wait({"verdict": "rank 0"})
        verdict = _Verdict(**json.loads(self.store.get("verdict")))
        if verdict.nonces[rank : rank + 1] != [mine.nonce]:  # of a job with fewer ranks, or concluded before
            raise self._other_job()
        self.hosts = verdict.hosts
        if verdict.error:
            if error is not None:  # a rank with an error of its own raises that: its type and its text are complete
                raise error
            reported = ClusterError(verdict.error)
            reported.exit_code = verdict.exit_code
            raise reported

    def _other_job(self) -> ClusterError:
        self._is_member = False
        return ClusterError(
            f"another job runs at {self.launch.meeting_place} already, and is not touched: "
            "choose another MASTER_PORT (deepspeed --master_port)"
        )

    def _collect_hellos(self) -> "list[_Hello]":
        keys = self._key_of_each_rank("hello")
        self._wait(keys)
        return [_Hello(**json.loads(self.store.get(key))) for key in keys]

    def _key_of_each_rank(self, name: str) -> dict[str, str]:
        return {f"{name}/{rank}": f"rank {rank}" for rank in range(self.launch.job_world_size)}

    def _wait(self, owners: Mapping[str, str]) -> None:
        """Wait for keys, at most `timeout_seconds`. Polls, so that a rank which failed ends the others' wait.

        Args:
            owners: key -> which rank publishes it, for the message.
        """
        missing = list(owners)
        deadline = time.monotonic() + self.timeout_seconds
        try:
            while True:
                missing = [key for key in missing if not self.store.check([key])]
                if not missing:
                    return
                if self.store.check(["failure"]):
                    raise ClusterError("another rank of the job failed")  # and said why: this one stays silent
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"rank {self.launch.global_rank} of {self.launch.job_world_size} waited "
                        f"{self.timeout_seconds:g} s (cluster.timeout_seconds) in vain for "
                        f"{list_some([owners[key] for key in missing])}: look at the output there"
                    )
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            raise ClusterError("lost the job's store: rank 0 is gone") from error

    def publish(self, key: str, value: Any) -> None:
        """Make the JSON `value` known to the job under `key`, once."""
        self.store.set(f"published/{key}", json.dumps(value))

    def lookup(self, key: str) -> Any:
        """What some rank published under `key`; waits for it, at most `timeout_seconds`."""
        self._wait({f"published/{key}": f"the rank that publishes {key}"})
        return json.loads(self.store.get(f"published/{key}"))

    def broadcast_from_rank_zero(self, key: str, decision: Callable[[], Any]) -> Any:
        """Rank 0 alone computes the JSON value `decision()`; every rank returns it. Collective: all ranks."""
        if self.launch.global_rank == 0:
            self.publish(key, decision())
        return self.lookup(key)

    def fetch_add(self, key: str, amount: int = 1) -> int:
        """Add `amount` to the job's counter `key`, and return what it was before."""
        return int(self.store.add(f"counter/{key}", amount)) - amount

    def barrier(self, key: str) -> None:
        """Wait, at most `timeout_seconds`, until every rank is here; each `key` once.

        Collective: all ranks of the job.
        """
        self.store.set(f"{key}/{self.launch.global_rank}", "")
        self.broadcast_from_rank_zero(f"{key}/all", lambda: self._wait(self._key_of_each_rank(key)))

    def finish(self) -> None:
        """Wait until every rank has come this far: the store lives on rank 0. Collective: all ranks of the job."""
        self._end_watchdog()
        mine = f"done/{self.launch.global_rank}"
        self.store.set(mine, "")
        # An answer, because nobody waits for that of `set`: this process is about to end, and its tunnel with it.
        self.store.check([mine])
        if self.launch.global_rank == 0:
            self._wait(self._key_of_each_rank("done"))

    def stop(self, reason: Preempted) -> NoReturn:
        """End this rank after a signal, when all ranks have saved: a launcher ends the others once one is gone."""
        with contextlib.suppress(ClusterError, RuntimeError):  # a rank that failed has said why
            self.barrier("stopped")
            if self.launch.global_rank == 0:
                sys.stderr.write(f"stopped by {reason}: all is saved, and the same command resumes from there\n")
        self._end_watchdog()
        self._outlive_others()
        self.launch.exit(reason.exit_code)

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank. The first rank of the job to fail reports why and sets the exit code; the others are silent.

        A user's error is one line; anything else is a traceback, from that one rank.
        """
        if isinstance(error, Preempted):
            self.stop(error)
        code = error.exit_code if isinstance(error, DpaError) else 1
        if not self._is_member:
            if self.launch.local_rank == 0:  # else the first rank of the host has found the port taken, and says so
                self._report(error)
            self.launch.exit(code)
        mine = f"{self.launch.global_rank} {code}"
        try:
            self.store.set_timeout(timedelta(seconds=STORE_SECONDS_AT_END))
            first = self.store.compare_set("failure", "", mine).decode()
        except RuntimeError:  # the store lived on rank 0, which is gone and has said why
            first = mine if self.launch.global_rank == 0 else f"0 {ClusterError.exit_code}"
        if first == mine:
            self._report(error)
        elif self.launch.global_rank == 0 and not _is_of_a_rank(first, self.launch.job_world_size):
            self._report(
                ClusterError(f"somebody who is no rank of this job wrote {first[:40]!r} as its failure: {error}")
            )
        self._outlive_others()
        self.launch.exit(exit_status_of(first))

    def _report(self, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        if isinstance(error, DpaError):
            text = f"error: {as_started_here(str(error))}\n"
        if len(self.hosts) > 1:
            text = f"[rank {self.launch.global_rank} on {self.launch.hostname}] {text}"
        sys.stderr.write(text)
        sys.stderr.flush()

    def _end_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.end()

    def _outlive_others(self) -> None:
        """Keep the store, which lives on rank 0, until the others have read why the job ends, or for a moment."""
        deadline = time.monotonic() + STORE_SECONDS_AT_END
        with contextlib.suppress(RuntimeError):
            num_ended = self.store.add("ended", 1)
            if self.launch.global_rank != 0:
                return
            while num_ended < self.launch.job_world_size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                num_ended = self.store.add("ended", 0)


def _is_of_a_rank(failure: str, job_world_size: int) -> bool:
    read = read_failure(failure)
    return read is not None and read[0] < job_world_size


def package_versions() -> str:
    """Of the packages that results depend on."""
    return " ".join(f"{name}-{importlib.metadata.version(name)}" for name in PACKAGES)


def code_fingerprint() -> str:
    """SHA-256 over the source of this package: equal on every host, or the hosts run different code."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Hello:
    """What a rank says about itself as it arrives."""

    host: str
    facts: dict[str, str]
    error: str = ""
    exit_code: int = 0
    nonce: str = ""
    """Drawn by each process: by it a rank knows that a verdict is about itself."""


@dataclass(frozen=True)
class _Verdict:
    """What rank 0 concludes from what all ranks said."""

    hosts: list[str]
    """Host of each rank."""
    error: str = ""
    """What keeps the job from starting; empty if nothing does."""
    exit_code: int = 0
    nonces: list[str] = field(default_factory=list)
    """Of all ranks' hellos."""


def _judge(hellos: Sequence[_Hello]) -> _Verdict:
    """Errors before differences: a rank whose recipe cannot be read has no facts to compare."""
    hosts = [hello.host for hello in hellos]
    nonces = [hello.nonce for hello in hellos]
    wrong = [hello for hello in hellos if hello.error]
    if wrong:
        first = wrong[0]
        text = first.error
        same = [hello.host for hello in wrong if hello.error == first.error]
        if len(same) < len(hellos):
            text += f" (only on {', '.join(dict.fromkeys(same))})"
        return _Verdict(hosts, text, first.exit_code, nonces)
    for name in hellos[0].facts:
        hosts_of_value: dict[str, set[str]] = {}
        for hello in hellos:
            value = hello.facts.get(name, "missing")
            hosts_of_value.setdefault(value, set()).add(hello.host)
        if len(hosts_of_value) > 1:
            values = [f"{value} on {', '.join(sorted(where))}" for value, where in hosts_of_value.items()]
            text = (
                f"hosts differ in {name}: {'; '.join(values)}; make it equal everywhere (a shared folder or the same "
                "checkout)"
            )
            return _Verdict(hosts, text, ClusterError.exit_code, nonces)
    return _Verdict(hosts, nonces=nonces)
