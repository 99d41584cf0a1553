"""What is noticed about a client's rows before they are trained on: rows given twice, and test rows among them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint64]
"""A number for the texts of each row: equal texts have equal numbers, others but for chance (1 in 10^13 of a million
rows). They stay in the memory of the group that read the rows: they would tell who guesses a text that it is there."""


@dataclass(frozen=True)
class DataQuality:
    """Counts of one client's rows."""

    num_duplicates: int
    """Training rows of which the same texts came before."""
    num_leaked: int
    """Different texts to be scored on that are trained on, too."""
    leaked_place: str | None
    """File and row of the first training row among them."""


def assess(train: Digests, scored: Digests, place: Callable[[int], str]) -> DataQuality:
    """Compare the rows that a client trains on with one another, and with those that it is `scored` on.

    Args:
        scored: each once.
        place: file and row of a training row, by its number.
    """
    num_duplicates = len(train) - len(np.unique(train))
    is_leaked = np.isin(train, scored)
    leaked_place = None
    if is_leaked.any():
        leaked_place = place(int(np.argmax(is_leaked)))
    return DataQuality(num_duplicates, int(np.isin(scored, train).sum()), leaked_place)
