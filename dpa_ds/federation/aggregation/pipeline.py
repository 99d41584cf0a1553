"""The recipe's choices put together: from the updates of a round to the next server state."""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from dpa_ds.config.schema import FederationConfig
from dpa_ds.distributed.leaders import LeaderGroup
from dpa_ds.federation.aggregation.base import (
    LocalUpdate,
    Reduced,
    Reduction,
    Rule,
    ServerOptimizer,
    ServerState,
    Transform,
)
from dpa_ds.federation.aggregation.transforms import build_transforms


@dataclass(frozen=True)
class ReducedRound:
    """What all leaders know once the updates of a round have crossed."""

    updates: Reduced
    references: torch.Tensor
    """Flat: what `_References` of all leaders add up to."""


class _References:
    """Reference means that are counted for the first time, as one flat buffer that leaders add up.

    (weighted sum of the means, sum of the weights, a 1 for each client that was counted); empty where the method
    weights nothing by instance.
    """

    def __init__(self, state: ServerState, buffer: torch.Tensor | None = None) -> None:
        sizes = [state.reference_mean.numel(), 1, len(state.references_counted)]
        if state.reference_mean.numel() == 0:
            sizes = [0, 0, 0]
        self.buffer = torch.zeros(sum(sizes)) if buffer is None else buffer
        self.sum, self.weight, self.counted = torch.split(self.buffer, sizes)

    def add(self, client_id: int, reference_mean: torch.Tensor, weight: float) -> None:
        """Count the references of a client."""
        self.sum.add_(reference_mean.flatten(), alpha=weight)
        self.weight.add_(weight)
        self.counted[client_id] = 1.0


class Accumulator:
    """The updates of the clients that one leader hosts, in one round: each is added as its client ends, and
    forgotten."""

    def __init__(self, reduction: Reduction, weighs_examples: bool, state: ServerState) -> None:
        self._summands = reduction.summands(state.adapter)
        self._weighs_examples = weighs_examples
        self._counted_before = state.references_counted
        self._references = _References(state)

    def add(self, update: LocalUpdate) -> None:
        """Count the update of one client. Leaders only."""
        weight = float(update.num_examples) if self._weighs_examples else 1.0
        self._summands.add(update.adapter, weight)
        if update.reference_mean is not None and not self._counted_before[update.client_id]:
            self._references.add(update.client_id, update.reference_mean, weight)

    def reduce(self, leaders: LeaderGroup) -> ReducedRound:
        """Exchange the sums. A leader none of whose clients took part does so, too. Collective: all leaders."""
        updates = self._summands.reduce(leaders)
        # Apart from the updates, because a rule or a compression has no business with it: 4 (2 H + 1 + C) bytes.
        if len(self._references.buffer):
            leaders.all_reduce_(self._references.buffer, "references")
        return ReducedRound(updates, self._references.buffer)


@dataclass(frozen=True)
class Aggregation:
    """Transforms, reduction, rule and server optimizer of a run."""

    transforms: tuple[Transform, ...]
    reduction: Reduction
    rule: Rule
    server_optimizer: ServerOptimizer
    weighs_examples: bool
    """A client counts as often as it has examples, not once."""
    seed: int

    def accumulator(self, state: ServerState) -> Accumulator:
        """An empty sum for a round that starts from `state`."""
        return Accumulator(self.reduction, self.weighs_examples, state)

    def step(self, state: ServerState, reduced: ReducedRound | None, server_round: int) -> ServerState:
        """The server state after a round; `state` itself where nobody took part, and on ranks that are no leaders."""
        # Nobody's round was fit to count: a rule would divide by zero, and an optimizer take a step of momentum alone.
        if reduced is None or reduced.updates.weight == 0:
            return state
        gradient = self.rule(reduced.updates, state, server_round, self.seed)
        state = self.server_optimizer.step(state, gradient, server_round)
        return _with_references(state, _References(state, reduced.references))


def build_aggregation(config: FederationConfig, seed: int) -> Aggregation:
    """The parts that the recipe names."""
    return Aggregation(
        transforms=build_transforms(config),
        reduction=_build("reductions", config.compression, config),
        rule=_build("rules", config.aggregation, config),
        server_optimizer=_build("server_optimizers", config.server_optimizer, config),
        weighs_examples=config.aggregation_weights == "num_examples",
        seed=seed,
    )


def _build(kind: str, name: str, config: FederationConfig) -> Any:
    """The part `name`: the file of that name in the folder `kind`. So the next one is one file and one Literal."""
    return import_module(f"{__package__}.{kind}.{name}").build(config)


def _with_references(state: ServerState, new: _References) -> ServerState:
    """`state`, with new clients in the mean of all reference means."""
    weight = float(new.weight.sum())
    if weight == 0:
        return state
    total = state.reference_weight + weight
    mean = (state.reference_mean * state.reference_weight + new.sum.view_as(state.reference_mean)) / total
    counted = state.references_counted + new.counted
    return replace(state, reference_mean=mean, reference_weight=total, references_counted=counted)
