"""The group of the leaders where every rank group has a launcher of its own: groups may be lost, and come back.

Membership is torchft's (0.2.0): a lighthouse, `launch/rendezvous.py`, receives the leaders' heartbeats and reports who
is present; a process group is formed again when that changes; a leader that is behind receives the state of one that is
not. Ours is one rule: every exchange is one torchft step. So two leaders at the same step are at the same exchange, and
a leader that missed how an exchange ended finds its result with the others.

    Membership:  JOINING --all groups came, one waited for too long, or the others run--> FORMED

    one exchange, an attempt at a time:
        COMMITTED         all who are present have the sum
        RESULT_RECEIVED   the others had committed this exchange before this leader knew: they hand the sum over
        FELL_BEHIND       the others have committed later exchanges, too: this leader ends
        FAILED            a leader was lost meanwhile, nobody has the sum: the next attempt is without it
"""

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from dpa_ds.distributed.handover import HandoverTransport
from dpa_ds.distributed.launchers import ANY_PORT, LOOPBACK
from dpa_ds.distributed.leaders import POLL_SECONDS
from dpa_ds.distributed.secret import VARIABLE
from dpa_ds.distributed.store import serve_store
from dpa_ds.distributed.tunnel import LIGHTHOUSE, STORE, Facts, Tunnel, Visitor
from dpa_ds.errors import ClusterError, Preempted

if TYPE_CHECKING:
    from torchft import Manager

EXCHANGE_SECONDS = 60.0
"""Bound on one all-reduce: it begins when all are there, so it is short."""
CONNECT_SECONDS = 30.0
PROBE_SECONDS = 5.0
JOIN_RETRY_SECONDS = 0.5
EXCHANGE_RETRY_SECONDS = 0.05
HANDOVER_MARGIN_BYTES = 1 << 26
"""What a handover may have beside twice the shared state."""


class Membership(Enum):
    """Whether the leaders that this one knows of run rounds."""

    JOINING = auto()
    """Before the first round: groups are waited for."""
    FORMED = auto()
    """Rounds are run by the groups that are present."""


class Outcome(Enum):
    """How an attempt at an exchange ended for this leader."""

    COMMITTED = auto()
    RESULT_RECEIVED = auto()
    FELL_BEHIND = auto()
    FAILED = auto()


@dataclass(frozen=True)
class SyncState:
    """What all leaders start a round from."""

    completed_rounds: int
    shared: torch.Tensor
    """Flat fp32 vector of what is replicated on every leader."""


@dataclass(frozen=True)
class _Handover:
    """What a leader that is behind receives from one that is not."""

    sync_state: SyncState
    membership: Membership
    result: torch.Tensor
    """Sum of the last exchange, followed by the number of clients behind it."""

    def to_dict(self) -> dict[str, Any]:
        """In the types that torchft sends: texts, numbers and tensors."""
        return {
            "completed_rounds": self.sync_state.completed_rounds,
            "shared": self.sync_state.shared,
            "membership": self.membership.name,
            "result": self.result,
        }

    @staticmethod
    def from_dict(received: dict[str, Any]) -> "_Handover":
        sync_state = SyncState(received["completed_rounds"], received["shared"])
        return _Handover(sync_state, Membership[received["membership"]], received["result"])


class ElasticGroup:
    """Leaders that find each other through a rendezvous. Every method: all leaders that are present.

    Args:
        group: number of this rank group.
        rendezvous: host:port of launch/rendezvous.py.
        secret: of the job (`secret.read_secret`).
        facts: what must be equal in all groups that are present.
        num_groups: groups to wait for, `join_seconds` at most, before the first round.
        num_clients: clients that this group hosts.
        min_clients: with fewer clients than these, over the groups present, the run stops.
        timeout_seconds: bound on waiting for the other leaders.
        stop_requested: called while this leader waits; once true, the wait ends with `Preempted`.

    Raises:
        ClusterError: nothing answers at the rendezvous.
    """

    def __init__(
        self,
        group: int,
        rendezvous: str,
        secret: bytes,
        facts: Facts,
        num_groups: int,
        num_clients: int,
        min_clients: int,
        timeout_seconds: float,
        join_seconds: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.bytes_handed: Counter[str] = Counter()
        self._rendezvous = rendezvous
        self._num_groups = num_groups
        self._num_clients = num_clients
        self._min_clients = min_clients
        self._join_deadline = time.monotonic() + join_seconds
        self._stop_requested = stop_requested

        self._membership = Membership.JOINING
        self._sync_state = SyncState(0, torch.zeros(0))
        self._result = torch.zeros(0)
        self._handover: _Handover | None = None

        self._quorum_thread = ThreadPoolExecutor(1, thread_name_prefix="quorum")
        address = split_address(rendezvous)
        visitor = Visitor(LIGHTHOUSE, facts, group=f"group {group}")
        self._tunnel = Tunnel(*address, secret, visitor)
        self._store_tunnel = Tunnel(*address, secret, replace(visitor, target=STORE))
        try:
            host = address_towards(*address)
            bound = min(EXCHANGE_SECONDS, timeout_seconds)
            self._transport = HandoverTransport(host, secret, self._most_handover_bytes, bound)
            self._manager = self._build_manager(f"group_{group}", host)
        except (RuntimeError, OSError) as error:  # TimeoutError among them
            raise self._lost_rendezvous(error) from error

    def _build_manager(self, replica_id: str, host: str) -> "Manager":
        os.environ.setdefault("RUST_LOG", "error")  # read when torchft is first imported
        from torchft import Manager

        from dpa_ds.distributed.leader_process_group import LeaderProcessGroup

        for name in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each lost peer would be a traceback
        exchange = timedelta(seconds=min(EXCHANGE_SECONDS, self.timeout_seconds))
        # torchft wants a store in each replica, for its ranks: there is one, this process.
        self._own_store, store_port = serve_store(ANY_PORT, exchange)
        return Manager(
            pg=LeaderProcessGroup(self._store_tunnel.port, exchange),
            load_state_dict=self._receive_handover,
            state_dict=self._hand_over,
            min_replica_size=1,
            # The state of the others is loaded inside of start_quorum, before this leader adds anything to a sum.
            use_async_quorum=False,
            timeout=exchange,
            quorum_timeout=timedelta(seconds=self.timeout_seconds),
            connect_timeout=timedelta(seconds=min(CONNECT_SECONDS, self.timeout_seconds)),
            rank=0,  # each leader is a replica of one rank: torchft knows nothing of the ranks of our groups
            world_size=1,
            store_addr=LOOPBACK,
            store_port=store_port,
            lighthouse_addr=f"http://{LOOPBACK}:{self._tunnel.port}",
            checkpoint_transport=cast(Any, self._transport),
            replica_id=replica_id,
            hostname=host,
        )

    @property
    def is_coordinator(self) -> bool:
        """Of the leaders present at the last exchange, this one writes what belongs to all."""
        return bool(self._manager.participating_rank() == 0)

    def sync_round(self, mine: SyncState) -> tuple[SyncState, bool]:
        """Agree before a round on who is present, and on the round and shared state that it starts from.

        Args:
            mine: after which round this leader is. One that was away receives what the others have.

        Returns:
            what all start from, and whether the others had been running before this leader joined them.

        Raises:
            ClusterError: as `all_reduce_`.
        """
        while True:
            self._sync_state = mine  # before the exchange: during it, a leader that is behind may ask for it
            is_late = time.monotonic() > self._join_deadline
            totals = self._exchange(torch.tensor([float(is_late), 1.0]), admits_joining=True)
            num_late, num_present = totals.tolist()
            others_run = False
            handover = self._take_handover()
            if handover is not None:
                mine = handover.sync_state
                others_run = handover.membership is Membership.FORMED
            all_came = num_present >= self._num_groups
            # The sums are the same on every leader, so all of them form the group now, or none.
            if all_came or num_late > 0 or others_run:
                self._membership = Membership.FORMED
            if self._membership is Membership.FORMED:
                self._sync_state = mine
                return mine, others_run
            time.sleep(JOIN_RETRY_SECONDS)

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        """Sum the flat CPU tensor `buffer` over the leaders present, in place; its bytes count under `purpose`.

        Leaders that are lost meanwhile are left out: what they handed in counts for all or for none.

        Raises:
            ClusterError: the rendezvous is lost, fewer than `min_clients` clients are left, or the others continued
                without this group.
            Preempted: the job was asked to stop meanwhile.
        """
        assert (buffer.device.type, buffer.dim()) == ("cpu", 1), (buffer.device, buffer.shape)
        self.bytes_handed[purpose] += buffer.numel() * buffer.element_size()
        buffer.copy_(self._exchange(buffer, admits_joining=False))

    def close(self) -> None:
        """Leave the group."""
        self._manager.shutdown(wait=False)
        self._tunnel.close()
        self._store_tunnel.close()

    # ---- one exchange -----------------------------------------------------------------------------------------

    def _exchange(self, buffer: torch.Tensor, admits_joining: bool) -> torch.Tensor:
        """The sum of everybody's `buffer`, once all who are present have it; attempts until then.

        Args:
            admits_joining: leaders that come (back) may join in this exchange.
        """
        failing_since: float | None = None
        while True:
            outcome = self._attempt(buffer, admits_joining)
            if outcome in (Outcome.COMMITTED, Outcome.RESULT_RECEIVED):
                self._check_enough_clients()
                return self._result[:-1]
            if outcome is Outcome.FELL_BEHIND:
                raise ClusterError(
                    "the other groups continued without this one (it was silent for too long): start it again, it "
                    "joins at the next round"
                )
            if failing_since is None:
                failing_since = time.monotonic()
            time.sleep(EXCHANGE_RETRY_SECONDS)
            if time.monotonic() >= failing_since + self.timeout_seconds:
                raise ClusterError(
                    f"the leaders present cannot exchange anything for {self.timeout_seconds:g} s "
                    "(federation.timeout_seconds), though all reach the rendezvous: check the network between their "
                    "hosts (GLOO_SOCKET_IFNAME)"
                )

    def _attempt(self, buffer: torch.Tensor, admits_joining: bool) -> Outcome:
        """One attempt at an exchange; `_result` is its sum where there is one."""
        step = self._manager.current_step()
        self._wait_for_quorum(shrink_only=not admits_joining)
        if not admits_joining:  # a leader that joins keeps what it received for `sync_round`, and takes part
            handover = self._take_handover()
            if handover is not None:
                # It came with the step of the others, which is this one's if they are only one exchange ahead.
                if self._manager.current_step() != step + 1:
                    return Outcome.FELL_BEHIND
                self._result = handover.result
                return Outcome.RESULT_RECEIVED
        num_clients = torch.tensor([float(self._num_clients)], dtype=buffer.dtype)
        total = torch.cat([buffer, num_clients])
        self._manager.allreduce(total, reduce_op=dist.ReduceOp.SUM).wait()
        if not self._manager.should_commit():
            return Outcome.FAILED
        self._result = total
        return Outcome.COMMITTED

    def _check_enough_clients(self) -> None:
        present = round(float(self._result[-1]))
        if self._membership is Membership.FORMED and present < self._min_clients:
            raise ClusterError(
                f"the groups that are left host {present} clients, fewer than federation.min_clients = "
                f"{self._min_clients}: start the lost groups again; the same commands resume from the last complete "
                "round"
            )

    def _wait_for_quorum(self, shrink_only: bool) -> None:
        """Wait until the rendezvous says who is present. In a thread: a signal must end a wait that may take hours."""
        quorum = self._quorum_thread.submit(self._manager.start_quorum, shrink_only=shrink_only)
        while not quorum.done():
            if self._stop_requested():
                raise Preempted("a signal, while this leader waited for the others")
            self._check_admitted()  # torchft would try again until the timeout
            time.sleep(POLL_SECONDS)
        try:
            quorum.result()
        except (RuntimeError, TimeoutError) as error:
            raise self._lost_rendezvous(error) from error

    def _check_admitted(self) -> None:
        if self._tunnel.refusal:
            raise ClusterError(
                f"the rendezvous at {self._rendezvous} refuses this group: {self._tunnel.refusal}. All groups of a run "
                "have one name, one recipe, one code and one base model, and each its own cluster.group; the secret is "
                f"made by launch/rendezvous.py, beside the run's folder, or is {VARIABLE} in the environment of all"
            )

    def _lost_rendezvous(self, error: Exception) -> ClusterError:
        bound = f"federation.timeout_seconds = {self.timeout_seconds:g}"
        with contextlib.suppress(OSError), socket.create_connection(split_address(self._rendezvous), PROBE_SECONDS):
            return ClusterError(
                f"the rendezvous at {self._rendezvous} answers, but within {bound} the other groups did not come: they "
                "continued without this one (it was silent for longer than cluster.heartbeat_timeout_seconds), or are "
                "still in their round; start it again, it joins at the next round"
            )
        reason = str(error).splitlines()[0][:120]
        return ClusterError(
            f"no answer from the rendezvous at {self._rendezvous} within {bound} ({reason}): is launch/rendezvous.py "
            "running there, and do the hosts reach each other? Once it runs, the same commands resume from the last "
            "complete round"
        )

    # ---- what a leader that is behind receives, called by torchft ------------------------------------------------

    def _most_handover_bytes(self) -> int:
        """What is shared has one size on all leaders; a result is no larger, but for the table of the metrics."""
        return 2 * self._sync_state.shared.nbytes + HANDOVER_MARGIN_BYTES

    def _hand_over(self) -> dict[str, Any]:
        return _Handover(self._sync_state, self._membership, self._result).to_dict()

    def _receive_handover(self, received: dict[str, Any]) -> None:
        self._handover = _Handover.from_dict(received)

    def _take_handover(self) -> _Handover | None:
        """What was received since the last call, once."""
        handover = self._handover
        self._handover = None
        return handover


def address_towards(host: str, port: int) -> str:
    """This host's address on the interface that leads to `host`: there the other leaders reach it, too.

    Raises:
        OSError: the name is unknown, or no way leads there.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # chooses the interface, and sends nothing
        probe.connect(address)
        return str(probe.getsockname()[0])


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, or of `[::1]:port`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
