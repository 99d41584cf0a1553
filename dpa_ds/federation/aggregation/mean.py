"""How the updates of a round become the next global adapter.

Another rule is one new file with a class like `WeightedAverage`; `dpa_ds/cli/train.py` says which one runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dpa_ds.adapters.state import AdapterState, flatten, unflatten
from dpa_ds.distributed.leaders import LeaderGroup


@dataclass(frozen=True)
class Shared:
    """What the whole federation shares after a round."""

    adapter: AdapterState
    """The global adapter."""
    reference_mean: torch.Tensor
    """(representations, hidden size) mean state of the clients' reference prompts, as the frozen base encodes them;
    (0, 0) where the method weights nothing by instance."""
    reference_weight: float = 0.0
    """Sum of the weights behind `reference_mean`: of all clients that took part so far."""

    def flatten(self) -> torch.Tensor:
        """One flat fp32 vector: the adapter, the mean states, their weight."""
        return torch.cat([flatten(self.adapter), self.reference_mean.flatten(), torch.tensor([self.reference_weight])])

    def unflatten(self, flat: torch.Tensor) -> "Shared":
        """Inverse of `flatten`, with the shapes of `self`."""
        end = len(flat) - 1
        start = end - self.reference_mean.numel()
        states = flat[start:end].reshape(self.reference_mean.shape).clone()
        return Shared(unflatten(flat[:start], self.adapter), states, float(flat[-1]))

    def counting(self, adapter: AdapterState, states: torch.Tensor, weight: float) -> "Shared":
        """The next one: another adapter, and in the mean also new clients, whose weighted states sum up to `states`."""
        if weight == 0:
            return Shared(adapter, self.reference_mean, self.reference_weight)
        total = self.reference_weight + weight
        reference_mean = (self.reference_mean * self.reference_weight + states.view_as(self.reference_mean)) / total
        return Shared(adapter, reference_mean, total)


@dataclass(frozen=True)
class ClientUpdate:
    """All that leaves a client: its trained global adapter, its mean state, and how many examples stand behind them."""

    client_id: int
    num_examples: int
    adapter: AdapterState
    reference_mean: torch.Tensor | None
    """Of its reference prompts, as `Shared.reference_mean`. They never change: None once they have been counted."""


class Aggregator(Protocol):
    """An aggregation rule."""

    carried: AdapterState | None
    """What this leader keeps for its next aggregation, saved with its first client; None: nothing."""

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: LeaderGroup) -> Shared:
        """The next global adapter and mean states from the `updates` of the clients that this leader hosts.

        A leader none of whose clients were drawn passes no updates and still takes part.
        Collective: all leaders, same keys and shapes.
        """
        ...


def update_weight(update: ClientUpdate, by_num_examples: bool) -> float:
    """Of a client in the average, a whole number."""
    return float(update.num_examples) if by_num_examples else 1.0


class WeightedAverage:
    """FedAvg (McMahan et al. 2017) on A and B separately, as in FedDPA: sum(w * theta) / sum(w).

    The mean states are averaged alike, each client's once: over all clients that took part so far.
    ONE flat all-reduce: 4 bytes a parameter and number of the mean states, and a header of two weights, 8 bytes.
    """

    def __init__(self, by_num_examples: bool) -> None:
        self.by_num_examples = by_num_examples
        self.carried: AdapterState | None = None

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: LeaderGroup) -> Shared:
        """See `Aggregator.aggregate`."""
        num_states = current.reference_mean.numel()
        total = torch.zeros(sum(t.numel() for t in current.adapter.values()) + num_states + 2)
        adapter, states, weights = torch.split(total, [len(total) - num_states - 2, num_states, 2])
        sums = unflatten(adapter, current.adapter)
        for update in updates:
            weight = update_weight(update, self.by_num_examples)
            for key, summed in sums.items():
                summed.add_(update.adapter[key], alpha=weight)
            weights[0] += weight
            if update.reference_mean is not None:
                states.add_(update.reference_mean.flatten(), alpha=weight)
                weights[1] += weight
        federation.all_reduce_(total, "update")
        if weights[0] == 0:  # no client took part
            return current
        adapter.div_(weights[0])  # and with it `sums`
        return current.counting(sums, states, float(weights[1]))
