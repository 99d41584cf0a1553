"""The words of aggregation: what leaves a client, what all clients share, and the parts between the two.

    LocalUpdate -> transforms -> reduction -> rule -> server optimizer -> ServerState

Each part is one choice of the recipe's section `federation`, independent of the others, and one file of the
folder that bears its name. docs/extending.md shows how one is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dpa_ds.adapters.state import AdapterState, flatten, unflatten
from dpa_ds.distributed.leaders import LeaderGroup


@dataclass(frozen=True)
class LocalUpdate:
    """All that leaves a client in a round. It exists on the client's leader only."""

    client_id: int
    num_examples: int
    adapter: AdapterState
    """The global adapter as this client trained it."""
    reference_mean: torch.Tensor | None
    """(representations, hidden size) mean embeddings of its reference prompts, which never change; None where the
    method weights nothing by instance. It leaves the leader once (`ServerState.references_counted`)."""


@dataclass(frozen=True)
class ServerState:
    """What the whole federation shares after a round: the same bits on every leader, empty on all other ranks.

    It is saved under `global/`, and a leader that joins later receives it from the others.
    """

    adapter: AdapterState
    """The global adapter."""
    reference_mean: torch.Tensor
    """(representations, hidden size) mean of the clients' reference means; (0, 0) where the method weights
    nothing by instance."""
    reference_weight: float = 0.0
    """Sum of the aggregation weights behind `reference_mean`: of all clients that took part so far."""
    optimizer: AdapterState = field(default_factory=dict)
    """Tensors of the server optimizer, such as its momentum."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Numbers that a rule or a server optimizer keeps from round to round."""
    references_counted: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """(clients,) 1 for each client whose references are in `reference_mean`, else 0; (0,) where there is none. A
    client's own files do not say it: its leader may be lost after the exchange, and before it saves."""

    @staticmethod
    def empty() -> "ServerState":
        """The server state of a rank that is not a leader."""
        return ServerState({}, torch.zeros(0, 0))

    def flatten(self) -> torch.Tensor:
        """All of it as one flat fp64 vector, which holds every fp32 number exactly."""
        scalars = [self.reference_weight, *(self.scalars[name] for name in sorted(self.scalars))]
        parts = [
            flatten(self.adapter),
            self.reference_mean.flatten(),
            torch.tensor(scalars, dtype=torch.float64),
            self.references_counted,
        ]
        if self.optimizer:
            parts.append(flatten(self.optimizer))
        return torch.cat([part.double() for part in parts])

    def unflatten(self, flat: torch.Tensor) -> "ServerState":
        """Inverse of `flatten`, with the keys and shapes of `self`."""
        sizes = [
            _num_elements(self.adapter),
            self.reference_mean.numel(),
            1 + len(self.scalars),
            len(self.references_counted),
        ]
        adapter, mean, scalars, counted, optimizer = torch.split(flat, [*sizes, len(flat) - sum(sizes)])
        return ServerState(
            adapter=unflatten(adapter.float(), self.adapter),
            reference_mean=mean.float().view_as(self.reference_mean),
            reference_weight=float(scalars[0]),
            optimizer=unflatten(optimizer.float(), self.optimizer),
            scalars=dict(zip(sorted(self.scalars), scalars[1:].tolist(), strict=True)),
            references_counted=counted.float(),
        )


@dataclass(frozen=True)
class LeaderState:
    """What one leader keeps for its next reduction, such as rounding errors. Summed where clients of two
    leaders meet."""

    residual: AdapterState = field(default_factory=dict)

    @staticmethod
    def sum_of(states: Sequence["LeaderState"]) -> "LeaderState":
        """The state of a leader that hosts the clients of several earlier ones: nothing of their residuals is lost."""
        kept = [state.residual for state in states if state.residual]
        if not kept:
            return LeaderState()
        return LeaderState({key: torch.stack([residual[key] for residual in kept]).sum(0) for key in kept[0]})


@dataclass(frozen=True)
class Reduced:
    """What a reduction leaves on every leader: the same bits on all of them."""

    mean: AdapterState
    """Weighted mean of the clients' adapters."""
    weight: float
    """Sum of the clients' weights; 0 where nobody took part."""


@dataclass(frozen=True)
class PseudoGradient:
    """The step that a rule proposes, from the global adapter `start` to `end`.

    Both ends are kept, not their difference alone: in fp32 start + (end - start) need not be `end` to the last bit.
    """

    start: AdapterState
    end: AdapterState

    def delta(self, key: str) -> torch.Tensor:
        """D of Reddi et al. 2021: the mean change of the parameter `key`."""
        return self.end[key] - self.start[key]


Transform = Callable[[LocalUpdate, ServerState], LocalUpdate]
"""What is done to one client's update before it may leave. TrainingError: the update may not leave; its round
is undone."""


class Summands(Protocol):
    """The updates of one leader's clients in one round, summed as they come."""

    def add(self, adapter: AdapterState, weight: float) -> None:
        """Add a client's adapter, `weight` (a whole number) times."""
        ...

    def reduce(self, leaders: LeaderGroup) -> Reduced:
        """The mean over the clients of all leaders. A leader without updates takes part. Collective: all leaders."""
        ...


class Reduction(Protocol):
    """How updates cross between leaders."""

    leader_state: LeaderState

    def summands(self, start: AdapterState) -> Summands:
        """An empty sum for a round that starts from the global adapter `start`."""
        ...


class Rule(Protocol):
    """What the reduced updates amount to."""

    def __call__(self, reduced: Reduced, state: ServerState, server_round: int, seed: int) -> PseudoGradient:
        """A function of its arguments only: every leader computes the same bits."""
        ...


class ServerOptimizer(Protocol):
    """What the server makes of a pseudo-gradient."""

    def initial_tensors(self, adapter: AdapterState) -> AdapterState:
        """Tensors that it keeps in `ServerState.optimizer`, before the first round."""
        ...

    def step(self, state: ServerState, gradient: PseudoGradient, server_round: int) -> ServerState:
        """The next state. A function of its arguments only: every leader computes the same bits."""
        ...


def _num_elements(state: AdapterState) -> int:
    return sum(tensor.numel() for tensor in state.values())
