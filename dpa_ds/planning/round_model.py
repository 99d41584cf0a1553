"""How long a round takes: rank groups train their clients in turn, the slowest is waited for, leaders reduce. No torch.

A discrete model with three costs that are fitted to measured rounds. It leaves out what ranks cost one another: shared
cores, memory and links inside a host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a client, or a whole group, computes in a round, in all phases."""

    tokens: float
    """Tokens with padding, of all ranks of the group together."""
    steps: float
    """Optimizer steps."""


Group = Sequence[Work]
"""The clients of a rank group."""


@dataclass(frozen=True)
class Costs:
    """What the parts of a round cost with one model on one machine, in seconds."""

    token: float
    """Seconds of a rank for each token that it computes."""
    step: float
    """Seconds of each optimizer step, whatever its size: gradient reduce, gathers, optimizer."""
    round: float
    """Seconds of each round, whatever its clients: saving, the exchange of numbers."""


@dataclass(frozen=True)
class Round:
    """A round as the model has it, in seconds."""

    busy: tuple[float, ...]
    """Seconds that each group trains."""
    reduce: float
    """Seconds of the leaders' all-reduce."""
    seconds: float

    @property
    def waiting(self) -> float:
        """Share of the groups' time in which they wait for the slowest."""
        slowest = max(self.busy)
        if slowest == 0:
            return 0.0
        return 1 - sum(self.busy) / (len(self.busy) * slowest)


@dataclass(frozen=True)
class Point:
    """A measured round."""

    groups: tuple[tuple[Work, ...], ...]
    """The clients of each group."""
    ranks: int
    """Ranks of a group."""
    seconds: float

    @property
    def tokens(self) -> float:
        """Tokens of all clients, padding included."""
        return sum(total_work(group).tokens for group in self.groups)


def total_work(group: Group) -> Work:
    """The work of all clients of a group."""
    tokens = sum(client.tokens for client in group)
    steps = sum(client.steps for client in group)
    return Work(tokens, steps)


def simulate(
    groups: Sequence[Group], ranks: int, costs: Costs, adapter_bytes: float = 0.0, net: float = float("inf")
) -> Round:
    """One round; `net` in bytes/s of a leader, over which a ring sends 2 (G - 1) / G adapters."""
    busy = tuple(_busy_seconds(group, ranks, costs) for group in groups)
    reduce = 2 * adapter_bytes * (len(groups) - 1) / len(groups) / net
    return Round(busy, reduce, max(busy) + reduce + costs.round)


def fit(points: Sequence[Point]) -> Costs:
    """The costs, none negative, of least relative error."""
    # Which group was the slowest depends on the costs, and the costs on it: found in turns, from cost by tokens alone.
    costs = Costs(1.0, 0.0, 0.0)
    for _ in range(10):
        slowest = [_slowest_group(point, costs) for point in points]
        found = _least_squares(points, slowest)
        if found == costs:
            break
        costs = found
    return costs


def predict_without(points: Sequence[Point], left_out: int) -> float:
    """Seconds of a point by the costs that all others give: what a prediction is worth. NaN for a single point."""
    others = [*points[:left_out], *points[left_out + 1 :]]
    if not others:
        return float("nan")
    point = points[left_out]
    return simulate(point.groups, point.ranks, fit(others)).seconds


def _busy_seconds(group: Group, ranks: int, costs: Costs) -> float:
    work = total_work(group)
    return work.tokens / ranks * costs.token + work.steps * costs.step


def _slowest_group(point: Point, costs: Costs) -> Group:
    busy = simulate(point.groups, point.ranks, costs).busy
    return point.groups[int(np.argmax(busy))]


def _least_squares(points: Sequence[Point], slowest: Sequence[Group]) -> Costs:
    """Costs with which the slowest groups take the measured seconds, each point weighing alike."""
    rows = []
    for point, group in zip(points, slowest, strict=True):
        work = total_work(group)
        rows.append((work.tokens / point.ranks, work.steps, 1.0))
    seconds = np.array([point.seconds for point in points])
    # Divided by the measured seconds: what is to be small is the relative error.
    matrix = np.array(rows) / seconds[:, None]
    kept = [0, 1, 2]
    while True:
        # Tokens are thousands where the constant is one: without a common scale rcond cuts off what it should not.
        scale = np.abs(matrix[:, kept]).max(axis=0)
        solved = np.linalg.lstsq(matrix[:, kept] / scale, np.ones(len(rows)), rcond=1e-9)[0]
        if (solved >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(solved))]
    costs = np.zeros(3)
    costs[kept] = np.maximum(solved / scale, 0)
    token, step, constant = (float(cost) for cost in costs)
    return Costs(token, step, constant)
