"""Sequences whose items are made when they are asked for: what stands behind a million rows without holding them."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
S = TypeVar("S")


class Lazy(Sequence[T]):
    """A sequence that makes an item each time that it is asked for, and keeps none.

    It equals every sequence of equal items, as a tuple equals a tuple.
    """

    @abstractmethod
    def make(self, index: int) -> T:
        """Item `index`, which is in 0..len - 1."""

    def release(self) -> None:
        """Close what is open for reading; the next item opens it again."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.make(number) for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.make(index)

    def __iter__(self) -> Iterator[T]:
        try:
            for index in range(len(self)):
                yield self.make(index)
        finally:
            self.release()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # its items may be anything

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})" if len(self) <= 20 else f"<{len(self)} items>"


class Joined(Lazy[T]):
    """Several sequences as one, in order."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]
        self._last = 0  # part of the item that was made last

    def __len__(self) -> int:
        return self._starts[-1]

    def make(self, index: int) -> T:
        """Item `index` of all parts together."""
        part = bisect_right(self._starts, index) - 1
        if part != self._last:  # only one of thousands of shards is to have its file open
            _release(self._parts[self._last])
            self._last = part
        return self._parts[part][index - self._starts[part]]

    def release(self) -> None:
        """Close every part's files."""
        for part in self._parts:
            _release(part)


class Selected(Lazy[T]):
    """Some items of a sequence, by their numbers there: eight bytes each."""

    def __init__(self, whole: Sequence[T], numbers: npt.NDArray[np.int64]) -> None:
        # Of a selection of a selection there is one level only, however often it is cut.
        self._whole: Sequence[T] = whole
        self._numbers = numbers
        if isinstance(whole, Selected):
            self._whole = whole._whole
            self._numbers = whole._numbers[numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def make(self, index: int) -> T:
        """Item `index` of the selection."""
        return self._whole[int(self._numbers[index])]

    def release(self) -> None:
        """Close the files of the whole."""
        _release(self._whole)


class Mapped(Lazy[T], Generic[S, T]):
    """What a function makes of each item of a sequence."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T]) -> None:
        self._items = items
        self._function = function

    def __len__(self) -> int:
        return len(self._items)

    def make(self, index: int) -> T:
        """What the function makes of item `index`."""
        return self._function(self._items[index])

    def release(self) -> None:
        """Close the items' files."""
        _release(self._items)


def _release(items: Sequence[Any]) -> None:
    if isinstance(items, Lazy):
        items.release()
