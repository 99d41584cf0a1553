"""All ranks launched together: the store where they meet, what they agree on, and who tells of a failure."""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.watchdog import Watchdog
from dpa_ds.errors import ClusterError, DpaError, Preempted

if TYPE_CHECKING:
    import torch.distributed as dist

JOIN_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.05
STORE_SECONDS_AT_END = 3.0
"""How long a failing rank bothers with the store: launchers end the others meanwhile."""


class JobStore:
    """All ranks launched together, and the key-value store through which they find each other.

    Collective: every rank of the job constructs it.
    """

    def __init__(self, launch: Launch, store: "dist.Store | None" = None) -> None:
        self.launch = launch
        self.hosts: list[str] = [launch.hostname]
        self.store = store if store is not None else _job_store(launch)
        self.timeout_seconds = JOIN_TIMEOUT_SECONDS
        """Bound on every wait for other ranks; `cluster.timeout_seconds` once `agree` has begun."""
        self.describe_rank: Callable[[int], str] = self._name_and_host
        """What messages call a rank; the topology knows more."""
        self._watchdog: Watchdog | None = None

    def start_watchdog(self, grace_seconds: float, heartbeat_timeout_seconds: float) -> None:
        """From now on hear signals, silent ranks and failures, whatever this rank is doing. Main thread only."""
        store = self.store if self.launch.job_world_size > 1 else None
        self._watchdog = Watchdog(
            self.launch, store, grace_seconds, heartbeat_timeout_seconds, lambda rank: self.describe_rank(rank)
        )
        self._watchdog.start()

    @property
    def stop_requested(self) -> bool:
        """A signal asked the job to stop: save and call `preempt`."""
        return self._watchdog is not None and self._watchdog.stop_requested

    def preempt(self) -> NoReturn:
        """Leave the work, everything being saved.

        Raises:
            Preempted: always.
        """
        raise Preempted(self._watchdog.stop_reason if self._watchdog else "asked to stop")

    def _name_and_host(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank] if len(self.hosts) > rank else '?'})"

    def check_consistency(self, facts: Mapping[str, str], error: DpaError | None, timeout_seconds: float) -> None:
        """Compare `facts` (code version, config, packages) of all ranks before anything is built or written.

        Also carries a rank's own start-up `error` to rank 0, so that it is reported once, with its hosts.
        Collective: every rank of the job, same fact names.

        Raises:
            ClusterError: ranks differ in a fact, or did not arrive in time (their ranks are named).
            DpaError: a rank had an error.
        """
        mine: dict[str, Any] = {"host": self.launch.hostname, "facts": dict(facts), "error": None}
        if error is not None:
            mine |= {"error": str(error), "exit_code": error.exit_code}
        self.timeout_seconds = timeout_seconds
        self.store.set_timeout(timedelta(seconds=timeout_seconds))
        self.store.set(f"hello/{self.launch.global_rank}", json.dumps(mine))
        if self.launch.global_rank == 0:
            hellos = self._collect_hellos()
            verdict = {**_first_disagreement(hellos), "hosts": [hello["host"] for hello in hellos]}
            self.store.set("verdict", json.dumps(verdict))
        self._wait({"verdict": "rank 0"})
        verdict = json.loads(self.store.get("verdict"))
        self.hosts = verdict["hosts"]
        if "error" in verdict:
            reported = ClusterError(verdict["error"])
            reported.exit_code = verdict["exit_code"]
            raise error or reported

    def _collect_hellos(self) -> list[dict[str, Any]]:
        keys = self._key_of_each_rank("hello")
        self._wait(keys)
        return [json.loads(self.store.get(key)) for key in keys]

    def _key_of_each_rank(self, name: str) -> dict[str, str]:
        return {f"{name}/{rank}": f"rank {rank}" for rank in range(self.launch.job_world_size)}

    def _wait(self, owners: Mapping[str, str]) -> None:
        """Wait for keys, at most `timeout_seconds`. Polls, so that a rank which failed ends the others' wait.

        Args:
            owners: key -> who is to publish it, for the message.
        """
        missing, deadline = list(owners), time.monotonic() + self.timeout_seconds
        try:
            while missing := [key for key in missing if not self.store.check([key])]:
                if self.store.check(["failure"]):
                    raise ClusterError("another rank of the job failed")  # and said why: this one stays silent
                if time.monotonic() > deadline:
                    named = ", ".join(owners[key] for key in missing[:8]) + (", ..." if len(missing) > 8 else "")
                    raise ClusterError(
                        f"rank {self.launch.global_rank} of {self.launch.job_world_size} waited {self.timeout_seconds:g} s "
                        f"(cluster.timeout_seconds) in vain for {named}: look at the output there"
                    )
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            raise ClusterError("lost the job's store: rank 0 is gone") from error

    def publish(self, key: str, value: Any) -> None:
        """Make the JSON `value` known to the job under `key`, once."""
        self.store.set(f"published/{key}", json.dumps(value))

    def lookup(self, key: str) -> Any:
        """What some rank published under `key`; waits for it, at most `cluster.timeout_seconds`."""
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
        """Wait, at most `timeout_seconds`, until every rank is here; `key` once. Collective: all ranks of the job."""
        self.store.set(f"{key}/{self.launch.global_rank}", "")
        self.broadcast_from_rank_zero(f"{key}/all", lambda: self._wait(self._key_of_each_rank(key)))

    def finish(self) -> None:
        """Wait until every rank has come this far: the store lives on rank 0. Collective: all ranks of the job."""
        self._end_watch()
        self.store.set(f"done/{self.launch.global_rank}", "")
        if self.launch.global_rank == 0:
            self._wait(self._key_of_each_rank("done"))

    def stop(self, reason: Preempted) -> NoReturn:
        """End this rank after a signal, when all ranks have saved: a launcher ends the others once one is gone."""
        with contextlib.suppress(ClusterError, RuntimeError):  # a rank that failed has said why
            self.barrier("stopped")
            if self.launch.global_rank == 0:
                sys.stderr.write(f"stopped by {reason}: all is saved, and the same command resumes from there\n")
        self._end_watch()
        self._outlive_others()
        self.launch.exit(reason.exit_code)

    def _end_watch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.end()

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank; the first rank of the job to fail tells why, the others are silent.

        A user's error is one line; anything else is a traceback, from that one rank.
        """
        if isinstance(error, Preempted):
            self.stop(error)
        code = error.exit_code if isinstance(error, DpaError) else 1
        mine = f"{self.launch.global_rank} {code}"
        try:
            self.store.set_timeout(timedelta(seconds=STORE_SECONDS_AT_END))
            first = self.store.compare_set("failure", "", mine).decode()
        except RuntimeError:  # the store lived on rank 0, which is gone and has said why
            first = mine if self.launch.global_rank == 0 else "0 3"
        if first == mine:
            where = f"[rank {self.launch.global_rank} on {self.launch.hostname}] " if len(self.hosts) > 1 else ""
            text = f"error: {error}\n" if isinstance(error, DpaError) else "".join(traceback.format_exception(error))
            sys.stderr.write(where + text)
            sys.stderr.flush()
        self._outlive_others()
        self.launch.exit(int(first.split()[1]))

    def _outlive_others(self) -> None:
        """Keep the store, which lives on rank 0, until the others have read why the job fails, or for a moment."""
        deadline = time.monotonic() + STORE_SECONDS_AT_END
        with contextlib.suppress(RuntimeError):
            ended = self.store.add("ended", 1)
            while self.launch.global_rank == 0 and ended < self.launch.job_world_size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                ended = self.store.add("ended", 0)


def code_fingerprint() -> str:
    """SHA-256 over the source of this package: equal on every host, or the hosts run different code."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _job_store(launch: Launch) -> "dist.Store":
    import torch.distributed as dist  # takes a second, which --help need not wait for

    if launch.job_world_size == 1:
        return dist.HashStore()
    # Under torchrun the agent serves a store at this address; a second server there would fail to bind.
    serves = launch.global_rank == 0 and not launch.agent_store
    timeout = timedelta(seconds=JOIN_TIMEOUT_SECONDS)
    try:
        store = dist.TCPStore(
            launch.master_addr, launch.master_port, None, serves, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise ClusterError(
            f"rank {launch.global_rank} cannot {'serve' if serves else 'reach'} the job's store at "
            f"{launch.master_addr}:{launch.master_port}: {str(error).splitlines()[0]}; "
            "choose another MASTER_PORT (deepspeed --master_port)"
        ) from error
    # A restarted torchrun attempt must not read the keys of the one before.
    return dist.PrefixStore(f"dpa_ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _first_disagreement(hellos: list[dict[str, Any]]) -> dict[str, Any]:
    """`error` and `exit_code` of what keeps the job from starting; empty if nothing does."""
    wrong = [hello for hello in hellos if hello["error"]]
    if wrong:
        same = [hello["host"] for hello in wrong if hello["error"] == wrong[0]["error"]]
        where = f" (only on {', '.join(dict.fromkeys(same))})" if len(same) < len(hellos) else ""
        return {"error": wrong[0]["error"] + where, "exit_code": wrong[0]["exit_code"]}
    for name in hellos[0]["facts"]:
        values: dict[str, set[str]] = defaultdict(set)
        for hello in hellos:
            values[hello["facts"].get(name, "missing")].add(hello["host"])
        if len(values) > 1:
            listed = "; ".join(f"{value} on {', '.join(sorted(hosts))}" for value, hosts in values.items())
            return {
                "error": f"hosts differ in {name}: {listed}; make it equal everywhere (a shared folder or the same "
                "checkout)",
                "exit_code": ClusterError.exit_code,
            }
    return {}
