"""Integers only: which rank belongs to which rank group, and which group hosts which client."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from dpa_ds.config.schema import ClusterConfig, RanksPerGroup
from dpa_ds.errors import ClusterError


@dataclass(frozen=True)
class Topology:
    """A job of `sum(group_sizes)` ranks, divided into rank groups of consecutive ranks, which host the clients in turn.

    Launchers number ranks host by host, so consecutive ranks put a group on as few hosts as possible.
    """

    group_sizes: tuple[int, ...]
    """Ranks of each group of this job."""
    num_clients: int
    """Clients of the run, over all groups: group g hosts g, g + num_groups, g + 2 num_groups, ..."""
    first_group: int = 0
    """Number of this job's first group, where other groups have launchers of their own."""
    num_groups_elsewhere: int = 0

    @property
    def num_groups(self) -> int:
        """Number of rank groups of the run; each has one leader."""
        return len(self.group_sizes) + self.num_groups_elsewhere

    @property
    def groups(self) -> range:
        """Numbers of this job's groups."""
        return range(self.first_group, self.first_group + len(self.group_sizes))

    @property
    def job_world_size(self) -> int:
        """Number of ranks of the whole job."""
        return sum(self.group_sizes)

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """Global rank of the rank 0 of each group of this job."""
        return (0, *accumulate(self.group_sizes[:-1]))

    def group_of_rank(self, global_rank: int) -> int:
        """Rank group that `global_rank` belongs to."""
        assert 0 <= global_rank < self.job_world_size, (global_rank, self.job_world_size)
        # The last group whose leader does not come after this rank; groups are a few, so a search needs no bisection.
        group = self.first_group
        for candidate, leader in zip(self.groups, self.leaders, strict=True):
            if leader <= global_rank:
                group = candidate
        return group

    def rank_in_group(self, global_rank: int) -> int:
        """Rank within its group: 0 is the leader."""
        return global_rank - self.leaders[self.group_of_rank(global_rank) - self.first_group]

    def clients_of_group(self, group: int) -> tuple[int, ...]:
        """Clients hosted by `group`, in the order they are trained."""
        return tuple(range(group, self.num_clients, self.num_groups))


def plan(cluster: ClusterConfig, job_world_size: int, num_clients: int) -> Topology:
    """The topology that `cluster` asks for, in a job of all groups or of one.

    Raises:
        ClusterError: the numbers do not fit.
    """
    if cluster.group is not None:
        return plan_one_group(job_world_size, num_clients, cluster.group, cluster.num_groups)
    return plan_topology(job_world_size, num_clients, cluster.ranks_per_group)


def plan_topology(job_world_size: int, num_clients: int, ranks_per_group: RanksPerGroup) -> Topology:
    """Divide `job_world_size` ranks among `num_clients` clients as `cluster.ranks_per_group` asks.

    Raises:
        ClusterError: the numbers do not fit; the message names the choices that do.
    """
    sizes = _group_sizes(job_world_size, num_clients, ranks_per_group)
    if len(sizes) > num_clients:
        raise ClusterError(
            f"{len(sizes)} rank groups for {num_clients} clients would leave groups idle: "
            f"{_choices(job_world_size, num_clients)}"
        )
    return Topology(sizes, num_clients)


def plan_one_group(job_world_size: int, num_clients: int, group: int, num_groups: int | None) -> Topology:
    """A job that is rank group `group` of `num_groups` (None: one for each client).

    Raises:
        ClusterError: there is no such group, or it would have no client.
    """
    if num_groups is None:
        num_groups = num_clients
    if not group < num_groups <= num_clients:
        raise ClusterError(
            f"cluster.group {group} of {num_groups} groups for {num_clients} clients: groups are numbered from 0, and "
            "each hosts at least one client; set cluster.num_groups"
        )
    return Topology((job_world_size,), num_clients, group, num_groups - 1)


def describe_rank(topology: Topology, hosts: Sequence[str], global_rank: int) -> str:
    """What a message calls a rank: its host, its group and the clients that depend on it.

    Args:
        hosts: host of each rank of the job.
    """
    group = topology.group_of_rank(global_rank)
    clients = ", ".join(map(str, topology.clients_of_group(group)))
    return f"rank {global_rank} ({hosts[global_rank]}, group {group}, clients {clients})"


def _group_sizes(job_world_size: int, num_clients: int, ranks_per_group: RanksPerGroup) -> tuple[int, ...]:
    if isinstance(ranks_per_group, list):
        if sum(ranks_per_group) != job_world_size:
            raise ClusterError(
                f"cluster.ranks_per_group {ranks_per_group} adds up to {sum(ranks_per_group)} ranks, but the job has "
                f"{job_world_size}: start {sum(ranks_per_group)} ranks or change the list"
            )
        return tuple(ranks_per_group)
    if ranks_per_group == "auto":
        return _auto_sizes(job_world_size, num_clients)
    if job_world_size % ranks_per_group:
        raise ClusterError(
            f"job has {job_world_size} ranks, not a multiple of cluster.ranks_per_group = {ranks_per_group}: "
            f"{_choices(job_world_size, num_clients)}"
        )
    return (ranks_per_group,) * (job_world_size // ranks_per_group)


def _auto_sizes(job_world_size: int, num_clients: int) -> tuple[int, ...]:
    if job_world_size < num_clients:
        return (1,) * job_world_size
    if job_world_size % num_clients == 0:
        return (job_world_size // num_clients,) * num_clients
    raise ClusterError(
        f"job has {job_world_size} ranks for {num_clients} clients: {_choices(job_world_size, num_clients)}"
    )


def _choices(job_world_size: int, num_clients: int) -> str:
    """The remedies: rank counts that divide evenly, group sizes that fit this job, an uneven list."""
    fitting = []
    for size in range(1, job_world_size + 1):
        num_groups = job_world_size // size
        if job_world_size % size == 0 and num_groups <= num_clients:
            fitting.append(size)
    num_groups = min(num_clients, job_world_size)
    base, num_larger = divmod(job_world_size, num_groups)
    uneven = [base + 1] * num_larger + [base] * (num_groups - num_larger)
    shown = f"a list such as {uneven}" if num_groups <= 16 else f"a list of {num_groups} sizes"
    return f"use a multiple of {num_clients} ranks, or set cluster.ranks_per_group to one of {fitting}, or to {shown}"
