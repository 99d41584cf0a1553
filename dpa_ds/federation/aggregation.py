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

    def flatten(self) -> torch.Tensor:
        """One flat fp32 vector: the adapter, then the mean states."""
        return torch.cat([flatten_state(self.adapter), self.mean_states.flatten()])

    def unflatten(self, flat: torch.Tensor) -> "Shared":
        """Inverse of `flatten`, with the shapes of `self`."""
        split = flat.numel() - self.mean_states.numel()
        return Shared(unflatten_state(flat[:split], self.adapter), flat[split:].reshape(self.mean_states.shape).clone())


@dataclass(frozen=True)
class ClientUpdate:
    """All that leaves a client: its trained global adapter, its mean state, and how many examples stand behind it."""

    client_id: int
    num_examples: int
    shared: Shared


class Aggregator(Protocol):
    """An aggregation rule."""

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: FederationGroup) -> Shared:
        """The next global adapter and mean states from the `updates` of the clients that this leader hosts.

        A leader none of whose clients were drawn passes no updates and still takes part.
        Collective: all leaders, same keys and shapes.
        """
        ...


class WeightedAverage:
    """FedAvg (McMahan et al. 2017) on A and B separately, as in FedDPA: sum(w * theta) / sum(w); mean states likewise.

    ONE flat all-reduce of [sum w * theta, sum w]: 4 bytes a parameter and mean state, and a header of 4 bytes.
    """

    def __init__(self, by_num_examples: bool) -> None:
        self.by_num_examples = by_num_examples

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: FederationGroup) -> Shared:
        """See `Aggregator.aggregate`."""
        total = torch.zeros(len(current.flatten()) + 1)
        for update in updates:
            weight = float(update.num_examples) if self.by_num_examples else 1.0
            total[:-1].add_(update.shared.flatten(), alpha=weight)
            total[-1] += weight
        federation.all_reduce_(total, "update")
        if total[-1] == 0:  # no client took part
            return current
        return current.unflatten(total[:-1] / total[-1])
