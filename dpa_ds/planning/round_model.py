"""How long a round takes: rank groups train their clients in turn, the slowest is waited for, leaders reduce. No torch.

A discrete model with three costs that are fitted to measured rounds. It leaves out what ranks cost one another: shared cores, memory
and links inside a host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a client computes in a round, in all its phases."""

    tokens: float
    """Padding included, on all ranks of its group together."""
    steps: float
    """Optimizer steps."""


@dataclass(frozen=True)
class Costs:
    """Of one model on one machine, in seconds."""

    token: float
    """A rank's, for each token that it computes."""
    step: float
    """For each optimizer step, whatever its size: gradient reduce, gathers, optimizer."""
    round: float
    """For each round, whatever its clients: saving, the exchange of numbers."""


@dataclass(frozen=True)
class Round:
    """A round as the model has it, in seconds."""

    busy: tuple[float, ...]
    """Of each group."""
    reduce: float
    """The leaders' all-reduce."""
    seconds: float

    @property
    def waiting(self) -> float:
        """Share of the groups' time in which they wait for the slowest."""
        slowest = max(self.busy)
        return 1 - sum(self.busy) / (len(self.busy) * slowest) if slowest else 0.0


@dataclass(frozen=True)
class Point:
    """A measured round."""

    groups: tuple[tuple[Work, ...], ...]
    """The clients of each group."""
    ranks: int
    """Of a group."""
    seconds: float

    @property
    def tokens(self) -> float:
        """Of all clients, padding included."""
        return sum(one.tokens for group in self.groups for one in group)


def simulate(
    groups: Sequence[Sequence[Work]], ranks: int, costs: Costs, adapter_bytes: float = 0.0, net: float = float("inf")
) -> Round:
    """One round; `net` in bytes/s of a leader, over which a ring sends 2 (G - 1) / G adapters."""
    busy = tuple(sum(one.tokens / ranks * costs.token + one.steps * costs.step for one in group) for group in groups)
    reduce = 2 * adapter_bytes * (len(groups) - 1) / len(groups) / net
    return Round(busy, reduce, max(busy) + reduce + costs.round)


def fit(points: Sequence[Point]) -> Costs:
    """The costs, none negative, of least relative error. Which group was the slowest depends on them: found in turns."""
    costs = Costs(1.0, 0.0, 0.0)
    for _ in range(10):
        slowest = [point.groups[int(np.argmax(simulate(point.groups, point.ranks, costs).busy))] for point in points]
        found = _least_squares(points, slowest)
        if found == costs:
            break
        costs = found
    return costs


def predict_without(points: Sequence[Point], left_out: int) -> float:
    """Seconds of a point by the costs that all others give: what a prediction is worth. NaN for a single point."""
    others = [point for number, point in enumerate(points) if number != left_out]
    if not others:
        return float("nan")
    point = points[left_out]
    return simulate(point.groups, point.ranks, fit(others)).seconds


def _least_squares(points: Sequence[Point], slowest: Sequence[Sequence[Work]]) -> Costs:
    rows = [
        (sum(one.tokens for one in group) / point.ranks, sum(one.steps for one in group), 1.0)
        for point, group in zip(points, slowest, strict=True)
    ]
    matrix = np.array(rows) / np.array([[point.seconds] for point in points])
    kept = [0, 1, 2]
    while True:
        scale = np.abs(matrix[:, kept]).max(axis=0)
        solved = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(rows)), rcond=1e-9)[0]
        if (solved >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(solved))]
    costs = np.zeros(3)
    costs[kept] = np.maximum(solved / scale, 0)
    return Costs(*map(float, costs))
