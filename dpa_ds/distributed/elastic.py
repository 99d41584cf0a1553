"""The group of the leaders where every rank group has a launcher of its own: groups may be lost, and come back.

Membership is torchft's (0.2.0): a lighthouse, `launch/rendezvous.py`, hears the leaders' heartbeats and tells who is present; a
process group is formed again when that changes; a leader that is behind receives the state of one that is not. What is ours is one rule:
every exchange is one torchft step. So two leaders at the same step are at the same exchange, and a leader that missed how an exchange
ended finds its result with the others.
"""

import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dpa_ds.distributed.launchers import reachable_hostname
from dpa_ds.distributed.leaders import POLL_SECONDS
from dpa_ds.errors import ClusterError, Preempted

EXCHANGE_SECONDS = 60.0
"""Bound on one all-reduce: it begins when all are there, so it is short."""
RETRY_SECONDS = 0.5
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class SyncState:
    """What all leaders start a round from."""

    completed_rounds: int
    shared: torch.Tensor
    """Flat fp32 vector: see `Shared.flatten`."""


class ElasticGroup:
    """Leaders that find each other through a rendezvous. Every method: all leaders that are present.

    Args:
        group: number of this rank group.
        rendezvous: host:port of launch/rendezvous.py.
        num_groups: groups to wait for, `join_seconds` at most, before the first round.
        num_clients: clients that this group hosts.
        min_clients: fewer clients than these, over the groups present, and the run stops.
        timeout_seconds: bound on waiting for the other leaders.
        stop_requested: asked while this leader waits; once true, the wait ends with `Preempted`.

    Raises:
        ClusterError: nothing answers at the rendezvous.
    """

    def __init__(
        self,
        group: int,
        rendezvous: str,
        num_groups: int,
        num_clients: int,
        min_clients: int,
        timeout_seconds: float,
        join_seconds: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        os.environ.setdefault("RUST_LOG", "error")  # read when torchft is first imported
        from torchft import Manager, ProcessGroupGloo

        for name in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each lost peer would be a traceback
        self.timeout_seconds = timeout_seconds
        self.bytes_handed: Counter[str] = Counter()
        self._rendezvous, self._num_groups, self._num_clients = rendezvous, num_groups, num_clients
        self._min_clients, self._join_deadline = min_clients, time.monotonic() + join_seconds
        self._stop_requested = stop_requested
        self._agreed = SyncState(0, torch.zeros(0))
        self._is_formed, self._result = False, torch.zeros(0)
        self._received: dict[str, Any] | None = None
        host = reachable_hostname()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quorum")
        exchange = timedelta(seconds=min(EXCHANGE_SECONDS, timeout_seconds))
        try:
            self._manager = Manager(
                pg=ProcessGroupGloo(timeout=exchange),
                load_state_dict=self._receive,
                state_dict=self._state,
                min_replica_size=1,
                use_async_quorum=False,
                timeout=exchange,
                quorum_timeout=timedelta(seconds=timeout_seconds),
                connect_timeout=timedelta(seconds=min(30.0, timeout_seconds)),
                rank=0,
                world_size=1,
                store_addr=host,
                store_port=self._store.port,
                lighthouse_addr=f"http://{rendezvous}",
                replica_id=f"group_{group}",
                hostname=host,
            )
        except (RuntimeError, TimeoutError) as error:
            raise self._lost_rendezvous(error) from error

    @property
    def is_coordinator(self) -> bool:
        """Of the leaders present at the last exchange this is the one that writes what belongs to all."""
        return bool(self._manager.participating_rank() == 0)

    def sync_round(self, mine: SyncState) -> tuple[SyncState, bool]:
        """Agree before a round on who is present, and on the round and shared state that it starts from.

        Args:
            mine: after which round this leader is. One that was away receives what the others have.

        Returns:
            what all start from, and whether the federation had been running before this leader joined it.

        Raises:
            ClusterError: as `all_reduce_`.
        """
        was_running = False
        while True:
            self._agreed = mine
            late = time.monotonic() > self._join_deadline
            totals = self._exchange(torch.tensor([float(late), 1.0]), joinable=True)
            if self._received is not None:
                was_running = bool(self._received["is_formed"])
                mine, self._received = SyncState(self._received["round"], self._received["shared"]), None
            if self._is_formed or was_running or totals[0] or totals[1] >= self._num_groups:
                self._is_formed, self._agreed = True, mine
                return mine, was_running
            time.sleep(RETRY_SECONDS)

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        """Sum the flat CPU tensor `buffer` over the leaders present, in place; its bytes count under `purpose`.

        Without those that are lost meanwhile: what they handed in counts for all or for none.

        Raises:
            ClusterError: the rendezvous is lost, fewer than `min_clients` clients are left, or the others continued without this
                group.
            Preempted: the job was asked to stop meanwhile.
        """
        assert (buffer.device.type, buffer.dim()) == ("cpu", 1), (buffer.device, buffer.shape)
        self.bytes_handed[purpose] += buffer.numel() * buffer.element_size()
        buffer.copy_(self._exchange(buffer, joinable=False))

    def close(self) -> None:
        """Leave."""
        self._manager.shutdown(wait=False)

    # ---- one exchange -----------------------------------------------------------------------------------------

    def _exchange(self, buffer: torch.Tensor, joinable: bool) -> torch.Tensor:
        """The sum of everybody's `buffer`, once all who are present have it.

        Args:
            joinable: leaders that come back may join here.
        """
        failing_since: float | None = None
        while failing_since is None or time.monotonic() < failing_since + self.timeout_seconds:
            step = self._manager.current_step()
            self._wait_for_others(shrink_only=not joinable)
            if self._received is not None and not joinable:
                received, self._received = self._received, None
                if self._manager.current_step() != step + 1:
                    raise ClusterError(
                        "the other groups continued without this one (it was silent for too long): start it again, it joins "
                        "at the next round"
                    )
                return self._accepted(received["result"])  # the others have it: this leader was cut off at the very end
            total = torch.cat([buffer, torch.tensor([float(self._num_clients)], dtype=buffer.dtype)])
            self._manager.allreduce(total, reduce_op=dist.ReduceOp.SUM).wait()
            if self._manager.should_commit():
                return self._accepted(total)
            failing_since = failing_since or time.monotonic()
            time.sleep(RETRY_SECONDS / 10)
        raise ClusterError(
            f"the leaders present cannot exchange anything for {self.timeout_seconds:g} s (federation.timeout_seconds), though "
            "all reach the rendezvous: check the network between their hosts (GLOO_SOCKET_IFNAME)"
        )

    def _accepted(self, total: torch.Tensor) -> torch.Tensor:
        self._result = total
        present = round(float(total[-1]))
        if self._is_formed and present < self._min_clients:
            raise ClusterError(
                f"the groups that are left host {present} clients, fewer than federation.min_clients = {self._min_clients}: "
                "start the lost groups again; the same commands resume from the last complete round"
            )
        return total[:-1]

    def _wait_for_others(self, shrink_only: bool) -> None:
        """Until the rendezvous says who is present. In a thread: a signal must end a wait that may take hours."""
        quorum = self._thread.submit(self._manager.start_quorum, shrink_only=shrink_only)
        while not quorum.done():
            if self._stop_requested():
                raise Preempted("a signal, while this leader waited for the others")
            time.sleep(POLL_SECONDS)
        try:
            quorum.result()
        except (RuntimeError, TimeoutError) as error:
            raise self._lost_rendezvous(error) from error

    def _lost_rendezvous(self, error: Exception) -> ClusterError:
        host, port = self._rendezvous.rsplit(":", 1)
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS):
            return ClusterError(
                f"the rendezvous at {self._rendezvous} answers, but within federation.timeout_seconds = "
                f"{self.timeout_seconds:g} the other groups did not come: they continued without this one (it was silent for "
                "longer than cluster.heartbeat_timeout_seconds), or are still in their round; start it again, it joins at the next round"
            )
        return ClusterError(
            f"no answer from the rendezvous at {self._rendezvous} within federation.timeout_seconds = "
            f"{self.timeout_seconds:g} ({str(error).splitlines()[0][:120]}): is launch/rendezvous.py running there, and do "
            "the hosts reach each other? Once it runs, the same commands resume from the last complete round"
        )

    # ---- what a leader that is behind receives ----------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        agreed = self._agreed
        return {
            "round": agreed.completed_rounds,
            "shared": agreed.shared,
            "is_formed": self._is_formed,
            "result": self._result,
        }

    def _receive(self, state: dict[str, Any]) -> None:
        self._received = state
