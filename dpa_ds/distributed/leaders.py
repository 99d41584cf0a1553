"""The thin second group: leaders only, CPU tensors only, every byte counted.

`StaticGroup` is here; `ElasticGroup`, for rank groups that come and go, is in elastic.py.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from dpa_ds.errors import ClusterError, Preempted

POLL_SECONDS = 0.002


class LeaderGroup(Protocol):
    """The leaders of all rank groups, and what they do together."""

    timeout_seconds: float
    bytes_handed: Counter[str]
    """Bytes this leader handed to the group so far, by purpose."""

    @property
    def is_coordinator(self) -> bool:
        """Whether this leader is the one that writes what belongs to all."""
        ...

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        """Sum the flat CPU tensor `buffer` over all leaders, in place, and count its bytes under `purpose`.

        Collective: all leaders, same length and dtype.
        """
        ...


class StaticGroup:
    """All leaders of one job: the loss of one ends them all.

    gloo on CPU tensors: exchanges between groups use no device memory, and NCCL stays within a group.

    Collective: every leader constructs it.

    Args:
        stop_requested: called while this leader waits for the others; once true, the wait ends with `Preempted`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout_seconds: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank = rank
        self.size = size
        self._stop_requested = stop_requested
        self.timeout_seconds = timeout_seconds
        self.bytes_handed: Counter[str] = Counter()
        """Bytes this leader handed to the group so far, by purpose."""
        try:
            self._group = dist.ProcessGroupGloo(
                dist.PrefixStore("leaders", store), rank, size, timedelta(seconds=timeout_seconds)
            )
        except RuntimeError as error:
            raise ClusterError(
                f"leader {rank} of {size} on {socket.gethostname()} cannot reach the other leaders: "
                f"{str(error).splitlines()[0]}; where a host's name is not the address that others reach, set "
                "GLOO_SOCKET_IFNAME to the network interface (with deepspeed in .deepspeed_env)"
            ) from error

    @property
    def is_coordinator(self) -> bool:
        """Whether this is the leader of the first group."""
        return self.rank == 0

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        """See `LeaderGroup.all_reduce_`.

        Raises:
            ClusterError: a leader did not arrive within `federation.timeout_seconds`, or was lost.
            Preempted: the job was asked to stop meanwhile.
        """
        assert (buffer.device.type, buffer.dim()) == ("cpu", 1), (buffer.device, buffer.shape)
        self.bytes_handed[purpose] += buffer.numel() * buffer.element_size()
        try:
            work = self._group.allreduce([buffer])  # type: ignore[attr-defined]
            while not work.is_completed():  # the slowest client may take hours
                if self._stop_requested():
                    raise Preempted(f"a signal, while leader {self.rank} waited for the others")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise ClusterError(
                f"leader {self.rank} of {self.size} lost its peers in the {purpose} all-reduce "
                f"(bound federation.timeout_seconds = {self.timeout_seconds:g}): {str(error).splitlines()[0]}"
            ) from error
