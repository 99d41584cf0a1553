"""Builds what the ranks stand on: the rank group's own world, and the group of the leaders.

Every rank group is a complete torch.distributed (and DeepSpeed) world of its own; DeepSpeed never learns that
other clients exist. After `build_world`, rank and world size always mean *within the rank group*.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from dpa_ds.config.schema import ClusterConfig, FederationConfig
from dpa_ds.distributed.device import claim_device, use_free_memory_of
from dpa_ds.distributed.elastic import CONNECT_SECONDS, ElasticGroup, split_address
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import LOOPBACK
from dpa_ds.distributed.leaders import LeaderGroup, StaticGroup
from dpa_ds.distributed.secret import read_secret
from dpa_ds.distributed.topology import Topology
from dpa_ds.errors import ClusterError, Preempted

T = TypeVar("T")
CONNECT_RETRY_SECONDS = 0.2


@dataclass
class World:
    """A rank's place in its rank group, the collectives of that group, and on leaders their group."""

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
        """Sum `tensor` (any device) over the group, in place. Collective: all ranks of the group."""
        return self._on_device(tensor, dist.all_reduce)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` (any device) with the leader's. Collective: all ranks of the group."""
        return self._on_device(tensor, partial(dist.broadcast, src=0))

    def broadcast_json(self, value: Any) -> Any:
        """The leader's `value`, as JSON gives it back (a tuple becomes a list), on every rank of the group.

        What the others pass is not looked at. Collective: all ranks of the group.
        """
        text = json.dumps(value).encode() if self.is_leader else b""
        num_bytes = int(self.broadcast_(torch.tensor([len(text)])))
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        if self.is_leader:
            buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.broadcast_(buffer)
        return json.loads(buffer.numpy().tobytes())

    def on_all_ranks(self, condition: bool) -> bool:
        """Whether `condition` holds on every rank of the group. Collective: all ranks of the group."""
        count = self.all_reduce_(torch.tensor([float(condition)]))
        return int(count) == self.world_size

    def on_leader(self, compute: Callable[[], T]) -> T | None:
        """What `compute()` gives on the leader; None on the other ranks, which wait for it.

        Collective: all ranks of the group.

        Raises:
            Preempted: on all ranks of the group, if the leader was asked to stop while it computed.
        """
        result, stopped = None, None
        if self.is_leader:
            try:
                result = compute()
            except Preempted as error:
                stopped = error
        if not self.on_all_ranks(stopped is None):
            raise stopped or Preempted("a signal")
        return result

    def from_leader(self, compute: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """What `compute()` gives on the leader, on every rank of the group.

        Collective: all ranks of the group.

        Args:
            like: a tensor of the shape and dtype of the result.

        Raises:
            Preempted: as `on_leader`.
        """
        result = self.on_leader(compute)
        if result is None:
            result = torch.empty_like(like)
        return self.broadcast_(result)

    def barrier(self) -> None:
        """Wait for all ranks of the group. Collective: all ranks of the group."""
        self.all_reduce_(torch.zeros(1))

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the block on the leader, then on the others: they find what it cached.

        Collective: all ranks of the group.
        """
        if not self.is_leader:
            self.barrier()
        yield
        if self.is_leader:
            self.barrier()

    def close(self) -> None:
        """Tear down the group's world. Collective: all ranks of the group."""
        if isinstance(self.leaders, ElasticGroup):
            self.leaders.close()
        # NCCL wants all ranks to leave at about the same time, and the leader has files to write.
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _on_device(self, tensor: torch.Tensor, collective: Callable[[torch.Tensor], object]) -> torch.Tensor:
        if self.world_size > 1:
            travelling = tensor.to(self.device)  # NCCL moves device memory only
            collective(travelling)
            if travelling is not tensor:
                tensor.copy_(travelling)
        return tensor


def build_world(job: JobStore, topology: Topology, cluster: ClusterConfig, federation_timeout_seconds: float) -> World:
    """Build this rank's group world (torch.distributed and DeepSpeed) and the group of the leaders.

    Collective: every rank of the job.
    """
    import deepspeed

    # JIT-built on CPU, over a minute, only used for inference all-reduces (deepspeed 0.19.8, comm/torch.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world = world_without_collectives(job, topology)
    launch, device = job.launch, world.device
    # DeepSpeed and accelerate read these; LOCAL_RANK stays node-local because it picks the device.
    local_rank = launch.local_rank if device.index is None else device.index
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.world_size), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port))
    if launch.on_one_host and not topology.num_groups_elsewhere:
        keep_gloo_on_this_host(os.environ)
    backend = dist.get_default_backend_for_device(device)
    # While leaders wait for the slowest client, the other ranks of their groups wait for them.
    timeout = timedelta(seconds=cluster.timeout_seconds + federation_timeout_seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"group/{world.group}", job.store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        # NCCL then opens its connections now, on this device, and not on the one that it would guess from the rank.
        device_id=None if device.type == "cpu" else device,
    )
    use_free_memory_of(device, deepspeed.accelerator.get_accelerator())
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    if world.is_leader and not topology.num_groups_elsewhere:
        world.leaders = StaticGroup(
            job.store,
            world.group,
            topology.num_groups,
            federation_timeout_seconds,
            stop_requested=lambda: job.stop_requested,
        )
    return world


def keep_gloo_on_this_host(environ: MutableMapping[str, str]) -> None:
    """Have gloo listen on the loopback interface, unless the user has named another: its peers are all here."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == LOOPBACK for own in addresses):
            environ.setdefault("GLOO_SOCKET_IFNAME", name)


def world_without_collectives(job: JobStore, topology: Topology) -> World:
    """This rank's place and device, and no process group: enough for a group of one rank.

    Raises:
        ClusterError: the host has fewer devices than ranks.
    """
    launch = job.launch
    group = topology.group_of_rank(launch.global_rank)
    return World(
        topology=topology,
        group=group,
        rank=topology.rank_in_group(launch.global_rank),
        world_size=topology.group_sizes[group - topology.first_group],
        device=claim_device(launch, ranks_on_host=job.hosts.count(launch.hostname)),
        leaders=None,
    )


def check_rendezvous(rendezvous: str | None, timeout_seconds: float) -> None:
    """Wait, for a moment, until something answers where the groups are to meet: before anything of a run is written.

    Args:
        rendezvous: host:port; None where all groups are in one job.
        timeout_seconds: `federation.timeout_seconds`.

    Raises:
        ClusterError: nothing answers.
    """
    if rendezvous is None:
        return
    seconds = min(CONNECT_SECONDS, timeout_seconds)
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(split_address(rendezvous), seconds).close()
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no answer from the rendezvous at {rendezvous} within {seconds:g} s ({error}): is "
                    "launch/rendezvous.py running there, and do the hosts reach each other?"
                ) from error
        time.sleep(CONNECT_RETRY_SECONDS)


def join_leaders(
    federation: FederationConfig,
    cluster: ClusterConfig,
    run_dir: Path,
    facts: Mapping[str, str],
    job: JobStore,
    world: World,
) -> World:
    """`world`, where the groups have launchers of their own with the leader joined to the others.

    Late, when everything is loaded: from then on the others wait for this group. Collective: all ranks of the group.

    Args:
        facts: what must be equal in all groups of the run.

    Raises:
        ClusterError: nothing answers at `cluster.rendezvous`, it refuses this group, or there is no secret beside
            `run_dir`.
    """
    topology = world.topology
    if cluster.rendezvous is not None and topology.num_groups_elsewhere and world.is_leader:
        secret = read_secret(run_dir, cluster.timeout_seconds)
        world.leaders = ElasticGroup(
            group=world.group,
            rendezvous=cluster.rendezvous,
            secret=secret,
            facts=facts,
            num_groups=topology.num_groups,
            num_clients=len(topology.clients_of_group(world.group)),
            min_clients=federation.min_clients,
            timeout_seconds=federation.timeout_seconds,
            join_seconds=cluster.timeout_seconds,
            stop_requested=lambda: job.stop_requested,
        )
    return world
