"""Who takes part in a round: known to every rank without asking."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.distributed.topology import Topology
from dpa_ds.federation.sampling import sample_clients

TOPOLOGIES = st.builds(
    lambda groups, more: Topology((1,) * groups, groups + more), st.integers(1, 6), st.integers(0, 20)
)
FRACTIONS = st.floats(0.01, 1.0)
SEEDS, ROUNDS = st.integers(0, 2**31), st.integers(1, 1000)


@given(TOPOLOGIES, FRACTIONS, SEEDS, ROUNDS, st.booleans())
def test_pure_sorted_and_without_repetition(
    topology: Topology, fraction: float, seed: int, server_round: int, stratify: bool
) -> None:
    drawn = sample_clients(topology, fraction, seed, server_round, stratify)
    assert drawn == sample_clients(topology, fraction, seed, server_round, stratify)
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(range(topology.num_clients))
    assert all(type(client) is int for client in drawn)


@pytest.mark.parametrize(
    ("num_clients", "fraction", "number"),
    [(8, 1.0, 8), (8, 0.5, 4), (8, 0.25, 2), (8, 0.01, 1), (10, 0.25, 3), (10, 0.15, 2), (40, 0.1, 4), (1, 0.3, 1)],
)
def test_number_of_participants(num_clients: int, fraction: float, number: int) -> None:
    for server_round in range(1, 6):
        assert len(sample_clients(Topology((1,), num_clients), fraction, 0, server_round)) == number


@given(SEEDS, ROUNDS)
def test_fraction_one_is_everyone(seed: int, server_round: int) -> None:
    assert sample_clients(Topology((1, 1, 1), 8), 1.0, seed, server_round) == tuple(range(8))
    assert sample_clients(Topology((1, 1, 1), 8), 1.0, seed, server_round, True) == tuple(range(8))


@given(st.integers(1, 6), st.integers(1, 6), FRACTIONS, SEEDS)
def test_stratified_draws_equally_from_every_group(groups: int, per_group: int, fraction: float, seed: int) -> None:
    topology = Topology((1,) * groups, groups * per_group)
    for server_round in range(1, 4):
        drawn = sample_clients(topology, fraction, seed, server_round, stratify_by_group=True)
        counts = Counter(client % topology.num_groups for client in drawn)
        assert len(counts) == groups, "no group idles"
        assert len(set(counts.values())) == 1


def test_layout_does_not_matter_unless_stratified() -> None:
    """A run resumed on other ranks draws the same clients."""
    for server_round in range(1, 20):
        one, four = (sample_clients(Topology((1,) * n, 12), 0.25, 7, server_round) for n in (1, 4))
        assert one == four


@pytest.mark.parametrize("stratify", [False, True])
def test_every_client_has_its_turn_equally_often(stratify: bool) -> None:
    topology = Topology((1, 1), 8)
    rounds = [sample_clients(topology, 0.25, 3, r, stratify) for r in range(1, 1201)]
    counts = Counter(client for drawn in rounds for client in drawn)
    assert set(counts) == set(range(8))
    # 1200 draws with probability 1/4: mean 300, standard deviation 15.
    assert all(225 < count < 375 for count in counts.values()), counts


def test_rounds_and_seeds_differ() -> None:
    topology = Topology((1,), 20)
    by_round = {sample_clients(topology, 0.25, 0, r) for r in range(1, 51)}
    by_seed = {sample_clients(topology, 0.25, seed, 1) for seed in range(50)}
    assert len(by_round) > 45  # of 15,504 choices
    assert len(by_seed) > 45
