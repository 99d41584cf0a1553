"""Which ranks train which client: pure integers, so every property is checked on all small cases."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dpa_ds.config.schema import ClusterConfig
from dpa_ds.distributed.topology import Topology, describe_rank, plan, plan_topology
from dpa_ds.errors import ClusterError

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=8)

# job_world_size, num_clients, ranks_per_group, group sizes
PLANS = [
    (1, 1, "auto", (1,)),
    (1, 8, "auto", (1,)),
    (2, 8, "auto", (1, 1)),
    (3, 8, "auto", (1, 1, 1)),
    (8, 8, "auto", (1,) * 8),
    (16, 8, "auto", (2,) * 8),
    (6, 1, "auto", (6,)),
    (4, 8, 1, (1,) * 4),
    (4, 8, 2, (2, 2)),
    (4, 8, 4, (4,)),
    (4, 2, 2, (2, 2)),
    (7, 4, [2, 2, 2, 1], (2, 2, 2, 1)),
    (5, 8, [4, 1], (4, 1)),
]


@pytest.mark.parametrize(("job_world_size", "num_clients", "ranks_per_group", "sizes"), PLANS)
def test_plan(job_world_size: int, num_clients: int, ranks_per_group: object, sizes: tuple[int, ...]) -> None:
    topology = plan_topology(job_world_size, num_clients, ranks_per_group)  # type: ignore[arg-type]
    assert topology == Topology(sizes, num_clients)
    assert topology.job_world_size == job_world_size


def test_plan_of_a_job_that_is_one_of_several_groups() -> None:
    cluster = ClusterConfig(group=2, num_groups=3, rendezvous="n1:1")
    topology = plan(cluster, job_world_size=4, num_clients=7)
    assert topology == Topology((4,), 7, first_group=2, num_groups_elsewhere=2)
    assert topology.clients_of_group(2) == (2, 5)
    assert [topology.group_of_rank(rank) for rank in range(4)] == [2] * 4
    assert plan(ClusterConfig(group=6, rendezvous="n1:1"), 1, 7).num_groups == 7, "one for each client"
    with pytest.raises(ClusterError, match=r"cluster\.group 7 of 7 groups for 7 clients"):
        plan(ClusterConfig(group=7, rendezvous="n1:1"), 1, 7)


def test_plan_of_a_job_of_all_groups() -> None:
    assert plan(ClusterConfig(ranks_per_group=[2, 1]), 3, 5) == Topology((2, 1), 5)


def test_a_rank_is_described_by_what_depends_on_it() -> None:
    assert describe_rank(Topology((2, 1), 5), ["n1", "n1", "n2"], 2) == "rank 2 (n2, group 1, clients 1, 3)"


REFUSED = [
    (
        6,
        4,
        "auto",
        "job has 6 ranks for 4 clients: use a multiple of 4 ranks, or set cluster.ranks_per_group to one of ",
    ),
    (6, 4, "auto", "one of [2, 3, 6], or to a list such as [2, 2, 1, 1]"),
    (6, 4, 4, "job has 6 ranks, not a multiple of cluster.ranks_per_group = 4"),
    (8, 4, 1, "8 rank groups for 4 clients would leave groups idle"),
    (4, 8, [2, 1], "cluster.ranks_per_group [2, 1] adds up to 3 ranks, but the job has 4: start 3 ranks or change"),
    (3, 2, [1, 1, 1], "3 rank groups for 2 clients would leave groups idle"),
    (37, 36, "auto", "one of [37], or to a list of 36 sizes"),
]


@pytest.mark.parametrize(("job_world_size", "num_clients", "ranks_per_group", "message"), REFUSED)
def test_what_does_not_fit_names_the_choices(
    job_world_size: int, num_clients: int, ranks_per_group: object, message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan_topology(job_world_size, num_clients, ranks_per_group)  # type: ignore[arg-type]
    assert message in str(caught.value)


@given(st.integers(1, 24), st.integers(1, 24))
@example(18, 17)
def test_every_remedy_works(job_world_size: int, num_clients: int) -> None:
    """What the message proposes is accepted, and nothing that would be accepted is left out."""
    try:
        plan_topology(job_world_size, num_clients, "auto")
        return
    except ClusterError as error:
        message = str(error)
    listed = message.split("one of [")[1].split("]")[0]
    sizes = {int(size) for size in listed.split(",")}
    for size in range(1, job_world_size + 1):
        if size in sizes:
            plan_topology(job_world_size, num_clients, size)
        else:
            with pytest.raises(ClusterError):
                plan_topology(job_world_size, num_clients, size)
    if "a list such as " in message:
        uneven = [int(size) for size in message.split("a list such as [")[1].rstrip("]").split(",")]
        assert plan_topology(job_world_size, num_clients, uneven).group_sizes == tuple(uneven)


@given(SIZES, st.integers(1, 40))
def test_ranks_and_clients_are_divided_without_rest(sizes: list[int], num_clients: int) -> None:
    topology = Topology(tuple(sizes), num_clients)
    places = [(topology.group_of_rank(r), topology.rank_in_group(r)) for r in range(topology.job_world_size)]
    assert places == [(group, rank) for group, size in enumerate(sizes) for rank in range(size)]
    assert [places[leader] for leader in topology.leaders] == [(group, 0) for group in range(len(sizes))]
    hosted = [client for group in range(len(sizes)) for client in topology.clients_of_group(group)]
    assert sorted(hosted) == list(range(num_clients))
    counts = [len(topology.clients_of_group(group)) for group in range(len(sizes))]
    assert max(counts) - min(counts) <= 1
    for group in range(len(sizes)):
        assert all(client % len(sizes) == group for client in topology.clients_of_group(group))


@given(st.integers(1, 64), st.integers(1, 64))
def test_auto_never_leaves_a_group_idle(job_world_size: int, num_clients: int) -> None:
    try:
        topology = plan_topology(job_world_size, num_clients, "auto")
    except ClusterError:
        assert job_world_size > num_clients
        assert job_world_size % num_clients
        return
    assert all(topology.clients_of_group(group) for group in range(topology.num_groups))
    assert topology.num_groups == min(job_world_size, num_clients)


@pytest.mark.parametrize("global_rank", [-1, 3])
def test_rank_outside_the_job_is_a_programmers_error(global_rank: int) -> None:
    with pytest.raises(AssertionError):
        Topology((2, 1), 2).group_of_rank(global_rank)
