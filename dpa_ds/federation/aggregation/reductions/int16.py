"""Sums in 16 bits a parameter; what rounding leaves over is added to the next update (error feedback).

Error feedback: Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847). Whole numbers, not bf16: sums of bf16
numbers are rounded again at every hop of an all-reduce, and no leader knows what gets lost there. On a grid that all
leaders share, sums are exact.
"""

import torch

from dpa_ds.adapters.state import AdapterState, flatten, unflatten
from dpa_ds.config.schema import FederationConfig
from dpa_ds.distributed.leaders import LeaderGroup
from dpa_ds.federation.aggregation.base import LeaderState, Reduced

LARGEST = 30_000
"""Of a sum over all leaders, before each rounds by half a unit: 16 bits hold it for up to 5,000 leaders."""


class Int16Reduction:
    """The mean of the clients' changes of the global adapter, rounded to a grid of its own for each tensor."""

    def __init__(self) -> None:
        self.leader_state = LeaderState()
        """The rounding error of this leader's last mean change."""

    def summands(self, start: AdapterState) -> "Int16Summands":
        """An empty sum of changes of `start`."""
        return Int16Summands(self, start)


class Int16Summands:
    """Weighted sum of the clients' changes of `start`, flat, in fp32."""

    def __init__(self, reduction: Int16Reduction, start: AdapterState) -> None:
        self._reduction, self._like = reduction, start
        self._start = flatten(start) if start else torch.zeros(0)  # ranks that are no leaders have no adapter
        self._changes = torch.zeros_like(self._start)
        self._weight = 0.0
        self._sizes = torch.tensor([start[key].numel() for key in sorted(start)])

    def add(self, adapter: AdapterState, weight: float) -> None:
        """See `Summands.add`."""
        self._changes.add_(flatten(adapter).sub_(self._start), alpha=weight)
        self._weight += weight

    def reduce(self, leaders: LeaderGroup) -> Reduced:
        """See `Summands.reduce`. Two exchanges: weight and grid; then the numbers, two in an int32.

        Collective: all leaders, same keys and shapes.
        """
        # The grid must be the same on all leaders before anybody rounds to it: hence two exchanges.
        residual = self._residual()
        header = torch.cat([torch.tensor([self._weight]), self._largest(self._changes), self._largest(residual)])
        leaders.all_reduce_(header, "update")
        weight, largest_change, largest_residual = torch.split(header, [1, len(self._sizes), len(self._sizes)])
        if weight == 0:  # no client took part
            return Reduced(self._like, 0.0)

        step = ((largest_change / weight + largest_residual) / LARGEST).repeat_interleave(self._sizes)
        wanted = self._changes.div_(weight).add_(residual)
        numbers = torch.where(step > 0, wanted / step, 0.0).round_()
        buffer = torch.cat([_pack(numbers.int()), torch.tensor([int(self._weight)], dtype=torch.int32)])
        leaders.all_reduce_(buffer, "update")
        # Less than in the header if a rank group with a launcher of its own was lost meanwhile.
        arrived = float(buffer[-1])
        if arrived == 0:
            return Reduced(self._like, 0.0)
        # Only once the numbers have arrived: else the next update would make up for an error that nobody saw.
        self._reduction.leader_state = LeaderState(unflatten(wanted.sub_(numbers * step), self._like))
        mean_change = _unpack(buffer[:-1], len(self._start)) * step * (weight / arrived)
        return Reduced(unflatten(self._start.add_(mean_change), self._like), arrived)

    def _residual(self) -> torch.Tensor:
        kept = self._reduction.leader_state.residual
        return flatten(kept) if kept else torch.zeros_like(self._start)

    def _largest(self, flat: torch.Tensor) -> torch.Tensor:
        """The largest magnitude in each tensor of a flat state, (tensors,)."""
        return torch.stack([part.abs().max() for part in torch.split(flat, self._sizes.tolist())])


def build(config: FederationConfig) -> Int16Reduction:
    """For `federation.compression: int16`."""
    return Int16Reduction()


def _pack(numbers: torch.Tensor) -> torch.Tensor:
    """Two numbers of 16 bits in an int32. Such pairs can be summed: a negative lower half borrows from the
    upper one."""
    lower, upper = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).chunk(2)
    return upper * 2**16 + lower


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of the numbers in sums of `_pack`."""
    lower = (packed + 2**15).bitwise_and(2**16 - 1) - 2**15
    return torch.cat([lower, (packed - lower) >> 16])[:count]
