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
class ClientUpdate:
    """All that leaves a client: its trained global adapter and how many examples stand behind it."""

    client_id: int
    num_examples: int
    global_state: AdapterState


class Aggregator(Protocol):
    """An aggregation rule."""

    def aggregate(
        self, updates: Sequence[ClientUpdate], current: AdapterState, federation: FederationGroup
    ) -> AdapterState:
        """The next global adapter from the `updates` of the clients that this leader hosts.

        A leader none of whose clients were drawn passes no updates and still takes part.
        Collective: all leaders, same keys and shapes.
        """
        ...


class WeightedAverage:
    """FedAvg (McMahan et al. 2017) on A and B separately, as in FedDPA: sum(w * theta) / sum(w).

    ONE flat all-reduce of [sum w * theta, sum w]: 4 bytes a parameter and a header of 4 bytes.
    """

    def __init__(self, by_num_examples: bool) -> None:
        self.by_num_examples = by_num_examples

    def aggregate(
        self, updates: Sequence[ClientUpdate], current: AdapterState, federation: FederationGroup
    ) -> AdapterState:
        """See `Aggregator.aggregate`."""
        total = torch.zeros(sum(t.numel() for t in current.values()) + 1)
        for update in updates:
            weight = float(update.num_examples) if self.by_num_examples else 1.0
            total[:-1].add_(flatten_state(update.global_state), alpha=weight)
            total[-1] += weight
        federation.all_reduce_(total, "update")
        if total[-1] == 0:  # no client took part
            return current
        return unflatten_state(total[:-1] / total[-1], current)
