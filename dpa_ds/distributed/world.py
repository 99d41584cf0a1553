"""Builds what the ranks stand on: the rank group's own world, and the federation group of the leaders.

Every rank group is a complete torch.distributed (and DeepSpeed) world of its own; DeepSpeed never learns that
other clients exist. After `build_world`, rank and world size always mean *within the rank group*.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dpa_ds.config.schema import ClusterConfig, RunConfig
from dpa_ds.distributed.elastic import ElasticGroup
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.leaders import LeaderGroup, StaticGroup
from dpa_ds.distributed.topology import Topology
from dpa_ds.errors import ClusterError, Preempted

T = TypeVar("T")


@dataclass
class World:
    """A rank's place in its rank group, the collectives of that group, and (on leaders) the federation group."""

    topology: Topology
    group: int
    """Index of this rank group."""
    rank: int
    """Rank within the group."""
    world_size: int
    """Ranks of the group."""
    device: torch.device
    leaders: LeaderGroup | None
    """Set on the leader only; where groups come and go, once the leader has joined (`elastic_group`)."""

    @property
    def is_leader(self) -> bool:
        """Rank 0 of the group: the only rank that talks to other groups and writes files."""
        return self.rank == 0

    @property
    def is_coordinator(self) -> bool:
        """Leader of the job's first group: the one that reports."""
        return self.rank == 0 and self.group == self.topology.first_group

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any device) over the rank group, in place. Collective: all ranks of the group."""
        return self._on_device(tensor, dist.all_reduce)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` (any device) with the leader's. Collective: all ranks of the group."""
        return self._on_device(tensor, lambda t: dist.broadcast(t, src=0))

    def _on_device(self, tensor: torch.Tensor, collective: Callable[[torch.Tensor], object]) -> torch.Tensor:
        if self.world_size > 1:
            travelling = tensor.to(self.device)  # NCCL moves device memory only
            collective(travelling)
            if travelling is not tensor:
                tensor.copy_(travelling)
        return tensor

    def on_leader(self, compute: Callable[[], T]) -> T | None:
        """What `compute()` gives on the leader; None on the other ranks, which wait for it. Collective: all ranks of the group.

        Raises:
            Preempted: on all ranks of the group, if the leader was asked to stop while it computed.
        """
        result, stopped = None, None
        if self.is_leader:
            try:
                result = compute()
            except Preempted as error:
                stopped = error
        if self.broadcast_(torch.tensor([float(stopped is not None)])):
            raise stopped or Preempted("a signal")
        return result

    def from_leader(self, compute: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """What `compute()` gives on the leader, on every rank of the group. Collective: all ranks of the group.

        Args:
            like: a tensor of the shape and dtype of the result.

        Raises:
            Preempted: as `on_leader`.
        """
        result = self.on_leader(compute)
        return self.broadcast_(torch.empty_like(like) if result is None else result)

    def broadcast_json(self, value: Any) -> Any:
        """The leader's JSON value, on every rank of the group. Collective: all ranks of the group."""
        if self.world_size == 1:
            return value
        text = json.dumps(value).encode() if self.is_leader else b""
        length = int(self.broadcast_(torch.tensor([len(text)])))
        content = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8)
            if self.is_leader
            else torch.empty(length, dtype=torch.uint8)
        )
        return json.loads(bytes(self.broadcast_(content).tolist()))

    def barrier(self) -> None:
        """Wait for all ranks of the group. Collective: all ranks of the group."""
        self.all_reduce_(torch.zeros(1))

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block on the leader, then on the others: they find what it cached. Collective: the group."""
        if not self.is_leader:
            self.barrier()
        yield
        if self.is_leader:
            self.barrier()

    def close(self) -> None:
        """Tear down the group's world. Collective: all ranks of the group."""
        if isinstance(self.leaders, ElasticGroup):
            self.leaders.close()
        self.barrier()  # NCCL wants all ranks to leave at about the same time, and the leader has files to write
        if dist.is_initialized():
            dist.destroy_process_group()


def build_world(job: JobStore, topology: Topology, cluster: ClusterConfig, federation_timeout_seconds: float) -> World:
    """Build this rank's group world (torch.distributed and DeepSpeed) and, among leaders, the federation group.

    Collective: every rank of the job.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # JIT-built on CPU, over a minute, only used for inference all-reduces (deepspeed 0.19.8, comm/torch.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launch = job.launch
    group, rank = topology.group_of_rank(launch.global_rank), topology.rank_in_group(launch.global_rank)
    size = topology.group_sizes[group - topology.first_group]
    # DeepSpeed and accelerate read these; LOCAL_RANK stays node-local because it picks the device.
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    local_rank = launch.local_rank if on_cpu else _device_index(launch.local_rank, accelerator.device_count())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port))
    if not on_cpu:
        accelerator.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # else every rank of a host would use all of its cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.hosts.count(launch.hostname)))
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    # While leaders wait for the slowest client, the other ranks of their groups wait for them.
    timeout = timedelta(seconds=cluster.timeout_seconds + federation_timeout_seconds)
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"group/{group}", job.store), rank=rank, world_size=size, timeout=timeout
    )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    leaders = None
    if rank == 0 and not topology.num_groups_elsewhere:
        leaders = StaticGroup(
            job.store, group, topology.num_groups, federation_timeout_seconds, lambda: job.stop_requested
        )
    device = torch.device(accelerator.current_device_name())
    return World(topology, group, rank, size, device, leaders)


def join_leaders(config: RunConfig, job: JobStore, world: World) -> World:
    """`world`, where the groups have launchers of their own with the leader joined to the others.

    Late, when everything is loaded: from then on the others wait for this group. Collective: all ranks of the group.

    Raises:
        ClusterError: nothing answers at `cluster.rendezvous`.
    """
    topology, cluster = world.topology, config.cluster
    if cluster.rendezvous is not None and topology.num_groups_elsewhere and world.is_leader:
        world.leaders = ElasticGroup(
            group=world.group,
            rendezvous=cluster.rendezvous,
            num_groups=topology.num_groups,
            num_clients=len(topology.clients_of_group(world.group)),
            min_clients=config.federation.min_clients,
            timeout_seconds=config.federation.timeout_seconds,
            join_seconds=cluster.timeout_seconds,
            stop_requested=lambda: job.stop_requested,
        )
    return world


def _device_index(local_rank: int, num_devices: int) -> int:
    """Device of a rank; a launcher that shows each rank only its own device (srun --gpus-per-task) shows one."""
    if num_devices == 1:
        return 0
    if local_rank >= num_devices:
        raise ClusterError(
            f"rank {local_rank} of this host has no device: the host shows {num_devices}; start fewer ranks per host"
        )
    return local_rank
