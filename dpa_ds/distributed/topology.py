"""Integers only: which rank belongs to which rank group, and which group hosts which client."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from dpa_ds.errors import ClusterError


@dataclass(frozen=True)
class Topology:
    """A job of `sum(group_sizes)` ranks, cut into rank groups of consecutive ranks; all groups host `num_clients` clients.

    Launchers number ranks host by host, so consecutive ranks put a group on as few hosts as possible.
    """

    group_sizes: tuple[int, ...]
    """Ranks of each group of this job."""
    num_clients: int
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
        return max(g for g, leader in zip(self.groups, self.leaders, strict=True) if leader <= global_rank)

    def rank_in_group(self, global_rank: int) -> int:
        """Rank within its group: 0 is the leader."""
        return global_rank - self.leaders[self.group_of_rank(global_rank) - self.first_group]

    def group_of_client(self, client_id: int) -> int:
        """Rank group that trains `client_id`, for the whole run."""
        return client_id % self.num_groups

    def clients_of_group(self, group: int) -> tuple[int, ...]:
        """Clients hosted by `group`, in the order they are trained."""
        return tuple(range(group, self.num_clients, self.num_groups))


def plan_topology(
    job_world_size: int, num_clients: int, ranks_per_group: int | list[int] | Literal["auto"]
) -> Topology:
    """Divide `job_world_size` ranks among `num_clients` clients as `cluster.ranks_per_group` asks.

    Raises:
        ClusterError: the numbers do not fit; the message names the choices that do.
    """
    if isinstance(ranks_per_group, list):
        sizes = tuple(ranks_per_group)
        if sum(sizes) != job_world_size:
            raise ClusterError(
                f"cluster.ranks_per_group {list(sizes)} adds up to {sum(sizes)} ranks, but the job has "
                f"{job_world_size}: start {sum(sizes)} ranks or change the list"
            )
    elif ranks_per_group == "auto":
        sizes = _auto_sizes(job_world_size, num_clients)
    else:
        if job_world_size % ranks_per_group:
            raise ClusterError(
                f"job has {job_world_size} ranks, not a multiple of cluster.ranks_per_group = {ranks_per_group}: "
                f"{_choices(job_world_size, num_clients)}"
            )
        sizes = (ranks_per_group,) * (job_world_size // ranks_per_group)
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
    groups = num_clients if num_groups is None else num_groups
    if not group < groups <= num_clients:
        raise ClusterError(
            f"cluster.group {group} of {groups} groups for {num_clients} clients: groups are numbered from 0, and each hosts "
            "at least one client; set cluster.num_groups"
        )
    return Topology((job_world_size,), num_clients, group, groups - 1)


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
    fitting = [
        s for s in range(1, job_world_size + 1) if job_world_size % s == 0 and job_world_size // s <= num_clients
    ]
    groups = min(num_clients, job_world_size)
    base, extra = divmod(job_world_size, groups)
    uneven = [base + 1] * extra + [base] * (groups - extra)
    shown = f"a list such as {uneven}" if groups <= 16 else f"a list of {groups} sizes"
    return f"use a multiple of {num_clients} ranks, or set cluster.ranks_per_group to one of {fitting}, or to {shown}"
