"""Fixed examples per optimizer step, cut into micro-batches that fit a token budget, the same number on every rank.

What a step computes is a function of seed, client, round and phase alone (`step_indices`). Ranks, hosting and
micro-batch budget only decide who computes which part of it (`plan_step`); the loss is normalised by the label
tokens of the whole step (`StepBatch.num_label_tokens`), so the division leaves no trace in the gradient.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from dpa_ds.data.tokenize import TokenizedExamples

# What one more segment costs, in tokens: attention is called once for each. Measured on a CPU with a model of 135 M
# parameters it is one token; on a GPU the launches of its kernels are some dozens, unless attention takes all at once.
SEGMENT_OVERHEAD_TOKENS = 8

# Labels with this value do not count in the loss (torch's default ignore_index).
IGNORE_INDEX = -100

# A prefix that all examples of a step share is placed once if that saves at least this share of its tokens: attention copies it for
# every example.
WORTH_SHARING = 1 / 32

# Length of a dummy: two positions, because the loss compares position t with token t + 1.
_DUMMY_LENGTH = 2


@dataclass(frozen=True)
class BatchingConfig:
    """How the examples of a step become passes. Of no consequence for what is computed, but for dropout's noise."""

    token_budget: int
    """Most tokens of a pass's examples, with padding; a longer example is passed alone."""
    pad_id: int
    prefix_sharing: bool
    """Place what all prompts of a step begin with once a pass. The model's attention must know (`model/packing.py`)."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: examples packed in one row of int64 tensors, shape (tokens,).

    First the prefix that all examples share, then the rest of each. Rests of similar length form a segment, in which all are padded
    on the right to the longest. Attention stays inside an example because it is computed segment by segment; all else of a
    transformer works token by token.
    """

    input_ids: torch.Tensor
    """Tokens; padding is the pad token."""
    position_ids: torch.Tensor
    """Position of a token in its example, from 0."""
    targets: torch.Tensor
    """The token that is to be predicted at a position; IGNORE_INDEX where none counts: prompt, padding, last token."""
    segments: tuple[tuple[int, int], ...]
    """(examples, padded length without the prefix) of the segments, in their order in the row."""
    prefix: int = 0
    """Tokens that all examples share."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimizer step. The numbers are those of the whole step, over all ranks."""

    micro_batches: list[MicroBatch]
    """As many on every rank, at least one; dummies where a rank has nothing left to do."""
    num_label_tokens: int
    """Predicted tokens: targets other than IGNORE_INDEX."""
    num_examples: int
    """Examples of the step."""
    real_tokens: int
    """Tokens of the examples."""
    computed_tokens: int
    """Tokens of all passes: with padding and dummies, a shared prefix once a pass."""


def num_steps(num_examples: int, batch_size: int, local_epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of one phase, at least 1.

    An epoch has ceil(num_examples / batch_size) steps; part of an epoch is rounded up to whole steps. `max_steps`
    wins over `local_epochs`, and continues into further epochs if need be.
    """
    assert min(num_examples, batch_size) >= 1, (num_examples, batch_size)
    if max_steps is not None:
        return max(1, max_steps)
    # Decimal, as written in the recipe: in floats 1.1 epochs of 10 steps would be 12 steps.
    return max(1, math.ceil(Fraction(str(local_epochs)) * _steps_per_epoch(num_examples, batch_size)))


def step_indices(num_examples: int, batch_size: int, num_steps: int, seed: Sequence[int]) -> list[list[int]]:
    """Examples of each optimizer step: a fresh permutation per epoch, its last step holding the rest.

    A pure function of its arguments; `seed` is any number of words >= 0, such as (run seed, round, client, phase).
    """
    steps: list[list[int]] = []
    for epoch in range(math.ceil(num_steps / _steps_per_epoch(num_examples, batch_size))):
        # The count of words goes first because SeedSequence pads with zeros: (1,) and (1, 0) would be one seed.
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([len(seed), *seed, epoch])))
        order = generator.permutation(num_examples).tolist()
        steps.extend(order[start : start + batch_size] for start in range(0, num_examples, batch_size))
    return steps[:num_steps]


def plan_step(lengths: Sequence[int], world_size: int, token_budget: int) -> list[list[list[list[int]]]]:
    """Who computes what: [rank][micro-batch][segment][position in `lengths`], each position exactly once.

    Every rank gets the same number of micro-batches, at least one; some may be empty (the rank runs a dummy, so
    that collectives match). Their tokens with padding are at most `token_budget`, except for a single row. Deterministic.
    """
    assert min(len(lengths), world_size) >= 1, (len(lengths), world_size)
    ranks = [sorted(rows, key=lambda row: (lengths[row], row)) for rows in _share_out(lengths, world_size)]
    count = max(1, math.ceil(max(sum(lengths[row] for row in rows) for rows in ranks) / token_budget))
    count = min(count, max(map(len, ranks)))  # then every row is alone
    while True:
        plan = [[_cut_with_least_padding(run, lengths) for run in _cut_evenly(rows, lengths, count)] for rows in ranks]
        if all(_fits(segments, lengths, token_budget) for micro_batches in plan for segments in micro_batches):
            return plan
        count += 1


def dummy_micro_batch(pad_id: int) -> MicroBatch:
    """A forward pass that adds nothing: two tokens, no target."""
    input_ids = torch.full((_DUMMY_LENGTH,), pad_id, dtype=torch.int64)
    positions = torch.arange(_DUMMY_LENGTH)
    return MicroBatch(input_ids, positions, torch.full_like(input_ids, IGNORE_INDEX), ((1, _DUMMY_LENGTH),))


def build_step(
    examples: TokenizedExamples, indices: Sequence[int], rank: int, world_size: int, batching: BatchingConfig
) -> StepBatch:
    """Tensors of one rank (within its rank group) for the step that trains on `indices`, and the step's totals."""
    prefix = _shared_prefix(examples, indices) if batching.prefix_sharing else 0
    lengths = [examples.length(index) for index in indices]
    plan = plan_step(
        lengths, world_size, batching.token_budget
    )  # with the prefix, which attention copies for each example
    suffix_lengths = [length - prefix for length in lengths]
    passes = [segments for micro_batches in plan for segments in micro_batches]
    return StepBatch(
        micro_batches=[
            _collate(examples, [[indices[row] for row in rows] for rows in segments], prefix, batching.pad_id)
            for segments in plan[rank]
        ],
        num_label_tokens=sum(examples.num_label_tokens(index) for index in indices),
        num_examples=len(indices),
        real_tokens=sum(lengths),
        computed_tokens=sum(
            prefix + _padded(segments, suffix_lengths) if segments else _DUMMY_LENGTH for segments in passes
        ),
    )


def _shared_prefix(examples: TokenizedExamples, indices: Sequence[int]) -> int:
    """Tokens that all prompts begin with; 0 where sharing them is not worth it. At least a prompt's last token stays out
    of it: the first token of the answer is predicted there, another one for each example."""
    longest = max(0, min(int(examples.prompt_lengths[index]) for index in indices) - 1)
    rows = np.stack([examples.input_ids(index)[:longest] for index in indices])
    same = (rows == rows[0]).all(axis=0)
    prefix = longest if same.all() else int(np.argmin(same))
    total = sum(examples.length(index) for index in indices)
    return prefix if prefix * (len(indices) - 1) >= WORTH_SHARING * total else 0


def _steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return math.ceil(num_examples / batch_size)


def _share_out(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Rows of each rank. The longest first, each to the rank with the fewest tokens so far."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        lightest = loads.index(min(loads))
        ranks[lightest].append(row)
        loads[lightest] += lengths[row]
    return ranks


def _cut_evenly(rows: Sequence[int], lengths: Sequence[int], count: int) -> list[Sequence[int]]:
    """`count` runs of consecutive rows with about as many tokens each; empty only where there are fewer rows."""
    if len(rows) <= count:
        return [rows[k : k + 1] for k in range(count)]
    ends = np.cumsum([lengths[row] for row in rows])
    bounds = [0]
    for k in range(1, count):
        nearest = int(np.searchsorted(ends, ends[-1] * k / count)) + 1
        bounds.append(min(max(nearest, bounds[-1] + 1), len(rows) - (count - k)))
    return [rows[start:stop] for start, stop in itertools.pairwise([*bounds, len(rows)])]


def _cut_with_least_padding(rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Segments of rows in ascending order of length, at least total cost, by dynamic programming over the last segment.

    In sorted order some best division is contiguous: exchanging rows between segments never shortens a longest row.
    """
    best, cut = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, dtype=np.int64)
    for stop in range(1, len(rows) + 1):
        costs = best[:stop] + np.arange(stop, 0, -1) * lengths[rows[stop - 1]] + SEGMENT_OVERHEAD_TOKENS
        cut[stop] = np.argmin(costs)
        best[stop] = costs[cut[stop]]
    segments: list[list[int]] = []
    stop = len(rows)
    while stop > 0:
        segments.insert(0, list(rows[cut[stop] : stop]))
        stop = int(cut[stop])
    return segments


def _padded(segments: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return sum(len(rows) * lengths[rows[-1]] for rows in segments)


def _fits(segments: Sequence[Sequence[int]], lengths: Sequence[int], token_budget: int) -> bool:
    return sum(map(len, segments)) <= 1 or _padded(segments, lengths) <= token_budget


def _collate(examples: TokenizedExamples, segments: Sequence[Sequence[int]], prefix: int, pad_id: int) -> MicroBatch:
    if not segments:
        return dummy_micro_batch(pad_id)
    shapes = tuple((len(indices), max(map(examples.length, indices)) - prefix) for indices in segments)
    input_ids = [examples.input_ids(segments[0][0])[:prefix].astype(np.int64)]
    targets = [np.full(prefix, IGNORE_INDEX, dtype=np.int64)]
    for indices, shape in zip(segments, shapes, strict=True):
        ids, wanted = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, index in enumerate(indices):
            own = examples.input_ids(index)[prefix:]
            length, first = len(own), max(1, int(examples.prompt_lengths[index]) - prefix)
            ids[row, :length] = own
            wanted[row, first - 1 : length - 1] = ids[row, first:length]
        input_ids.append(ids.reshape(-1))
        targets.append(wanted.reshape(-1))
    positions = [np.arange(prefix), *(np.tile(np.arange(prefix, prefix + length), rows) for rows, length in shapes)]
    tokens, places, wanted_tokens = (torch.from_numpy(np.concatenate(p)) for p in (input_ids, positions, targets))
    return MicroBatch(tokens, places, wanted_tokens, shapes, prefix)
