"""How the updates of a round become the next global adapter.

Another rule is one new file with a class like `WeightedAverage`; `dpa_ds/train.py` says which one runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dpa_ds.distributed.federation_group import AdapterState, FederationGroup
from dpa_ds.model.dual_adapter import flatten_state, unflatten_state


@dataclass(frozen=True)
class Shared:
    """What the whole federation shares after a round."""

    adapter: AdapterState
    """The global adapter."""
    mean_states: torch.Tensor
    """(representations, hidden size) mean state of the clients' reference prompts, as the frozen base encodes them;
    (0, 0) where the method weights nothing by instance."""
    states_weight: float = 0.0
    """Sum of the weights behind `mean_states`: of all clients that took part so far."""

    def flatten(self) -> torch.Tensor:
        """One flat fp32 vector: the adapter, the mean states, their weight."""
        return torch.cat([flatten_state(self.adapter), self.mean_states.flatten(), torch.tensor([self.states_weight])])

    def unflatten(self, flat: torch.Tensor) -> "Shared":
        """Inverse of `flatten`, with the shapes of `self`."""
        end = len(flat) - 1
        start = end - self.mean_states.numel()
        states = flat[start:end].reshape(self.mean_states.shape).clone()
        return Shared(unflatten_state(flat[:start], self.adapter), states, float(flat[-1]))

    def counting(self, adapter: AdapterState, states: torch.Tensor, weight: float) -> "Shared":
        """The next one: another adapter, and in the mean also new clients, whose weighted states sum up to `states`."""
        if weight == 0:
            return Shared(adapter, self.mean_states, self.states_weight)
        total = self.states_weight + weight
        mean_states = (self.mean_states * self.states_weight + states.view_as(self.mean_states)) / total
        return Shared(adapter, mean_states, total)


@dataclass(frozen=True)
class ClientUpdate:
    """All that leaves a client: its trained global adapter, its mean state, and how many examples stand behind them."""

    client_id: int
    num_examples: int
    adapter: AdapterState
    mean_states: torch.Tensor | None
    """Of its reference prompts, as `Shared.mean_states`. They never change: None once they have been counted."""


class Aggregator(Protocol):
    """An aggregation rule."""

    carried: AdapterState | None
    """What this leader keeps for its next aggregation, saved with its first client; None: nothing."""

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: FederationGroup) -> Shared:
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

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: FederationGroup) -> Shared:
        """See `Aggregator.aggregate`."""
        num_states = current.mean_states.numel()
        total = torch.zeros(sum(t.numel() for t in current.adapter.values()) + num_states + 2)
        adapter, states, weights = torch.split(total, [len(total) - num_states - 2, num_states, 2])
        sums = unflatten_state(adapter, current.adapter)
        for update in updates:
            weight = update_weight(update, self.by_num_examples)
            for key, summed in sums.items():
                summed.add_(update.adapter[key], alpha=weight)
            weights[0] += weight
            if update.mean_states is not None:
                states.add_(update.mean_states.flatten(), alpha=weight)
                weights[1] += weight
        federation.all_reduce_(total, "update")
        if weights[0] == 0:  # no client took part
            return current
        adapter.div_(weights[0])  # and with it `sums`
        return current.counting(sums, states, float(weights[1]))
