"""Sums in fp32: one flat all-reduce of 4 bytes a parameter, and 4 bytes for the weight."""

import torch

from dpa_ds.adapters.state import AdapterState, unflatten
from dpa_ds.config.schema import FederationConfig
from dpa_ds.distributed.leaders import LeaderGroup
from dpa_ds.federation.aggregation.base import LeaderState, Reduced


class Fp32Reduction:
    """The weighted mean of A and of B separately (FedAvg, McMahan et al. 2017): sum(w * theta) / sum(w)."""

    def __init__(self) -> None:
        self.leader_state = LeaderState()
        """Stays empty: nothing is rounded."""

    def summands(self, start: AdapterState) -> "Fp32Summands":
        """An empty sum over adapters with the keys and shapes of `start`."""
        return Fp32Summands(start)


class Fp32Summands:
    """Weighted sum of adapters in one flat buffer, whose last element is the sum of the weights."""

    def __init__(self, like: AdapterState) -> None:
        # One buffer, so that there is one all-reduce: at 4 bytes a parameter its latency is what counts on a
        # fast network.
        num_parameters = sum(tensor.numel() for tensor in like.values())
        self._buffer = torch.zeros(num_parameters + 1)
        self._sums = unflatten(self._buffer[:-1], like)
        """Views of the buffer, one for each parameter."""

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See `Summands.add`."""
        for key, total in self._sums.items():
            total.add_(adapter[key], alpha=weight)
        self._buffer[-1] += weight

    def reduce(self, leaders: LeaderGroup) -> Reduced:
        """See `Summands.reduce`. Collective: all leaders, same keys and shapes."""
        leaders.all_reduce_(self._buffer, "update")
        weight = float(self._buffer[-1])
        if weight:
            self._buffer[:-1].div_(weight)  # in place: the sums become the means
        return Reduced(self._sums, weight)


def build(config: FederationConfig) -> Fp32Reduction:
    """For `federation.compression: fp32`."""
    return Fp32Reduction()
