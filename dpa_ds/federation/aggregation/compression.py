"""An average whose updates travel in 16 bits a parameter; what rounding leaves over goes with the next one.

Error feedback: Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847). Whole numbers, not bf16: sums of bf16 numbers are
rounded again at every hop of an all-reduce, and what gets lost there no leader knows. On a grid that all leaders share, sums are exact.
"""

from collections.abc import Sequence

import torch

from dpa_ds.adapters.state import AdapterState, flatten, unflatten
from dpa_ds.distributed.leaders import LeaderGroup
from dpa_ds.federation.aggregation.mean import ClientUpdate, Shared, update_weight

LARGEST = 30_000
"""Of a sum over all leaders, before each rounds by half a unit: 16 bits hold it for up to 5,000 leaders."""


class CompressedAverage:
    """`WeightedAverage` in half of the bytes, but for a header of 8 bytes a tensor and the mean states.

    Clients' changes of the global adapter are averaged, and rounded to a grid of their own for each tensor.
    """

    def __init__(self, by_num_examples: bool) -> None:
        self.by_num_examples = by_num_examples
        self.carried: AdapterState | None = None

    def aggregate(self, updates: Sequence[ClientUpdate], current: Shared, federation: LeaderGroup) -> Shared:
        """See `Aggregator.aggregate`. Two exchanges: weights, mean states and grid; then the numbers, two in an int32."""
        before = flatten(current.adapter)
        sizes = torch.tensor([current.adapter[key].numel() for key in sorted(current.adapter)])
        changes, states, weights = torch.zeros_like(before), torch.zeros(current.reference_mean.numel()), torch.zeros(2)
        for update in updates:
            weight = update_weight(update, self.by_num_examples)
            changes.add_(flatten(update.adapter).sub_(before), alpha=weight)
            weights[0] += weight
            if update.reference_mean is not None:
                states.add_(update.reference_mean.flatten(), alpha=weight)
                weights[1] += weight
        carried = torch.zeros_like(before) if self.carried is None else flatten(self.carried)
        own_weight = weights[0].clone()
        header = torch.cat([weights, states, _largest(changes, sizes), _largest(carried, sizes)])
        federation.all_reduce_(header, "update")
        weights, states, largest_change, largest_carried = torch.split(header, [2, len(states), len(sizes), len(sizes)])
        if weights[0] == 0:  # no client took part
            return current

        step = ((largest_change / weights[0] + largest_carried) / LARGEST).repeat_interleave(sizes)
        wanted = changes.div_(weights[0]).add_(carried)
        numbers = torch.where(step > 0, wanted / step, 0.0).round_()
        buffer = torch.cat([_pack(numbers.int()), own_weight.int().view(1)])
        federation.all_reduce_(buffer, "update")
        # Less than in the header if a rank group with a launcher of its own was lost meanwhile.
        arrived = float(buffer[-1])
        if arrived == 0:
            return current
        self.carried = unflatten(wanted.sub_(numbers * step), current.adapter)
        mean_change = _unpack(buffer[:-1], len(before)) * step * (weights[0] / arrived)
        return current.counting(unflatten(before.add_(mean_change), current.adapter), states, float(weights[1]))


def _largest(flat: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each tensor of a flat state."""
    return torch.stack([part.abs().max() for part in torch.split(flat, sizes.tolist())])


def _pack(numbers: torch.Tensor) -> torch.Tensor:
    """Two numbers of 16 bits in an int32. Such pairs can be summed: a negative lower half borrows from the upper one."""
    lower, upper = torch.nn.functional.pad(numbers, (0, len(numbers) % 2)).chunk(2)
    return upper * 2**16 + lower


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    lower = (packed + 2**15).bitwise_and(2**16 - 1) - 2**15
    return torch.cat([lower, (packed - lower) >> 16])[:count]
