"""Partitions are true partitions, reproducible, and say what to do when impossible."""

from collections.abc import Iterable
from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ds.data.partition import Labels, partition_by_column, partition_dirichlet, partition_iid
from dpa_ds.errors import DataError


def lists(parts: Iterable[npt.NDArray[np.int64]]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def assert_true_partition(parts: list[list[int]], num_rows: int) -> None:
    assert sorted(chain.from_iterable(parts)) == list(range(num_rows))
    assert all(part == sorted(part) for part in parts)


def test_by_column_sorts_values_and_keeps_row_order() -> None:
    parts = partition_by_column(Labels.of(["b", "a", "b", "c", "a"]))
    assert list(zip(parts, lists(parts.values()), strict=True)) == [("a", [1, 4]), ("b", [0, 2]), ("c", [3])]


@given(st.lists(st.text(max_size=3)))
def test_by_column_is_a_partition(values: list[str]) -> None:
    assert_true_partition(lists(partition_by_column(Labels.of(values)).values()), len(values))
    labels = Labels.of(values)
    assert [labels.names[code] for code in labels.codes] == values


@settings(deadline=None)
@given(num_rows=st.integers(1, 200), data=st.data(), seed=st.integers(0, 2**32))
def test_iid_is_a_partition_of_equal_parts(num_rows: int, data: st.DataObject, seed: int) -> None:
    num_clients = data.draw(st.integers(1, num_rows))
    parts = lists(partition_iid(num_rows, num_clients, seed))
    assert_true_partition(parts, num_rows)
    assert len(parts) == num_clients
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == lists(partition_iid(num_rows, num_clients, seed))


def test_iid_depends_on_the_seed() -> None:
    assert lists(partition_iid(100, 4, 0)) != lists(partition_iid(100, 4, 1))


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=40, max_size=120), st.integers(1, 5), st.integers(0, 2**32))
def test_dirichlet_is_a_partition_without_empty_clients(labels: list[str], num_clients: int, seed: int) -> None:
    parts = lists(partition_dirichlet(Labels.of(labels), num_clients, 1.0, seed))
    assert_true_partition(parts, len(labels))
    assert len(parts) == num_clients
    assert all(parts)
    assert parts == lists(partition_dirichlet(Labels.of(labels), num_clients, 1.0, seed))


def largest_label_share(concentration: float) -> float:
    labels = [str(row % 8) for row in range(2400)]
    parts = lists(partition_dirichlet(Labels.of(labels), 8, concentration, seed=0))
    return float(np.mean([max(np.bincount([row % 8 for row in part])) / len(part) for part in parts]))


def test_smaller_concentration_means_more_skew() -> None:
    # 8 balanced labels: a share of 1/8 is no skew at all.
    assert largest_label_share(1000.0) < 0.16
    assert largest_label_share(0.1) > 0.5


def test_dirichlet_redraws_until_nobody_is_empty() -> None:
    # Alone, a draw succeeds in 3 of 100 cases here.
    parts = lists(partition_dirichlet(Labels.of(["a"] * 300 + ["b"] * 300), 10, 0.1, seed=1))
    assert all(parts)
    assert_true_partition(parts, 600)


def test_impossible_partitions_name_the_remedy() -> None:
    with pytest.raises(DataError, match=r"3 examples cannot be divided among 4 clients.*between 1 and 3"):
        partition_iid(3, 4, 0)
    with pytest.raises(DataError, match="0 clients"):
        partition_iid(3, 0, 0)
    with pytest.raises(DataError, match=r"each of 20 clients.*raise data.partition.concentration \(now 0.001\)"):
        partition_dirichlet(Labels.of(["a"] * 100), 20, 0.001, 0)
