"""Sequences that make their items behave as tuples of the same items."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.data.lazy import Joined, Lazy, Mapped, Selected


class Open(Lazy[int]):
    """Counts how often it is closed."""

    def __init__(self, items: Sequence[int]) -> None:
        self._items = items
        self.num_released = 0

    def __len__(self) -> int:
        return len(self._items)

    def make(self, index: int) -> int:
        return self._items[index]

    def release(self) -> None:
        self.num_released += 1


parts = st.lists(st.lists(st.integers(), max_size=4), max_size=4)


@given(parts, st.integers(-20, 20), st.integers(-20, 20))
def test_joined_parts_are_one_sequence(items: list[list[int]], start: int, stop: int) -> None:
    flat = tuple(item for part in items for item in part)
    joined = Joined([Open(part) for part in items])
    assert joined == flat
    assert flat == joined
    assert tuple(joined) == flat
    assert joined != (*flat, 1)
    assert tuple(joined[start:stop]) == flat[start:stop]
    for index in range(-len(flat), len(flat)):
        assert joined[index] == flat[index]
    for index in (len(flat), -len(flat) - 1):
        with pytest.raises(IndexError):
            joined[index]


@given(st.lists(st.integers(), min_size=1), st.data())
def test_a_selection_of_a_selection(items: list[int], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(items) - 1), min_size=1))
    again = data.draw(st.lists(st.integers(0, len(numbers) - 1)))
    selected = Selected(Selected(items, np.array(numbers)), np.array(again, dtype=np.int64))
    assert selected == [items[numbers[index]] for index in again]
    assert Mapped(selected, str) == [str(item) for item in selected]


def test_what_was_read_to_its_end_is_closed() -> None:
    files = [Open([1, 2]), Open([3])]
    assert list(Mapped(Joined(files), str)) == ["1", "2", "3"]
    assert [file.num_released for file in files] == [2, 1]  # as the next one was begun, and at the end
    iterator = iter(files[0])
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert files[0].num_released == 3


def test_an_item_is_made_when_it_is_asked_for() -> None:
    made = []
    mapped = Mapped(range(10**9), lambda item: made.append(item) or item)
    assert (len(mapped), mapped[-1], made) == (10**9, 10**9 - 1, [10**9 - 1])
