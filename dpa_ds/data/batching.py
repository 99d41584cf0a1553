"""Fixed examples per optimizer step, cut into micro-batches that fit a token budget, the same number on every rank.

What a step computes is a function of seed, client, round and phase alone (`step_indices`). Ranks, hosting and
micro-batch budget only decide who computes which part of it (`plan_step`); the loss is normalised by the label
tokens of the whole step (`StepBatch.num_label_tokens`), so the division leaves no trace in the gradient.

The plan of a step has four levels: StepPlan > RankPlan > MicroBatchPlan > Segment. A segment is a group of examples
of similar length, all padded to the longest; a micro-batch is the segments of one forward pass, packed in one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from dpa_ds.data.tokenize import TokenizedExamples

# What one more segment costs, in tokens, where attention is called once for each. Measured on a CPU with a model of
# 135 M parameters it is one token; on a GPU the launches of its kernels would be some dozens.
SEGMENT_OVERHEAD_TOKENS = 8

# Labels with this value do not count in the loss (torch's default ignore_index).
IGNORE_INDEX = -100

# A shared prefix is placed once a micro-batch if that saves at least this share of the step's tokens. It is not free:
# attention copies its keys and values for every example.
MIN_SAVED_SHARE = 1 / 32

# Length of a dummy: two positions, because the loss compares position t with token t + 1.
_DUMMY_LENGTH = 2


@dataclass(frozen=True)
class BatchingConfig:
    """How the examples of a step become micro-batches. It changes nothing that is computed, except dropout's noise."""

    token_budget: int
    """Most tokens of a micro-batch's examples, with padding; a longer example is a micro-batch of its own."""
    pad_id: int
    prefix_sharing: bool
    """Place the shared prefix of a step's prompts once a micro-batch. The model's attention must support it
    (`PackedAttention.supports_prefix`)."""
    segment_overhead: int = SEGMENT_OVERHEAD_TOKENS
    """What one more segment costs, in tokens."""


@dataclass(frozen=True)
class Segment:
    """Examples of similar length, each padded on the right to the longest."""

    rows: tuple[int, ...]
    """Positions in the step's list of examples, in ascending order of length."""
    padded_length: int
    """Tokens of the longest example, its prefix included."""

    @property
    def num_tokens(self) -> int:
        """Tokens with padding, as if no prefix were shared."""
        return len(self.rows) * self.padded_length


@dataclass(frozen=True)
class MicroBatchPlan:
    """The segments of one forward pass, in their order in the row; none where the rank runs a dummy."""

    segments: tuple[Segment, ...]

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return sum(len(segment.rows) for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens with padding, as if no prefix were shared."""
        return sum(segment.num_tokens for segment in self.segments)

    def computed_tokens(self, prefix: int) -> int:
        """Tokens of the forward pass where `prefix` tokens are placed once instead of once an example."""
        if not self.segments:
            return _DUMMY_LENGTH
        return self.num_tokens - (self.num_rows - 1) * prefix


@dataclass(frozen=True)
class RankPlan:
    """The micro-batches of one rank, in the order in which it runs them."""

    micro_batches: tuple[MicroBatchPlan, ...]


@dataclass(frozen=True)
class StepPlan:
    """Who computes what in one optimizer step: each example of the step is in exactly one segment of one rank."""

    ranks: tuple[RankPlan, ...]
    """By rank within the rank group; all have the same number of micro-batches, at least one."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: examples packed in one row of int64 tensors, shape (tokens,).

    First the prefix that all examples share, then the suffix of each, segment by segment. Attention stays inside an
    example because it is computed segment by segment; all else of a transformer works token by token.
    """

    input_ids: torch.Tensor
    """Tokens; padding is the pad token."""
    position_ids: torch.Tensor
    """Position of a token in its example, from 0."""
    targets: torch.Tensor
    """The token that is to be predicted at a position; IGNORE_INDEX where none counts: outside of answers."""
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
    """Tokens of all micro-batches: with padding and dummies, a shared prefix once a micro-batch."""


def num_steps(num_examples: int, batch_size: int, local_epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of one phase, at least 1.

    An epoch has ceil(num_examples / batch_size) steps; part of an epoch is rounded up to whole steps. `max_steps`
    wins over `local_epochs`, and continues into further epochs if need be.
    """
    assert min(num_examples, batch_size) >= 1, (num_examples, batch_size)
    if max_steps is not None:
        return max(1, max_steps)
    # Decimal, as written in the recipe: in floats 1.1 epochs of 10 steps would be 12 steps.
    epochs = Fraction(str(local_epochs))
    return max(1, math.ceil(epochs * _steps_per_epoch(num_examples, batch_size)))


def step_indices(num_examples: int, batch_size: int, num_steps: int, seed: Sequence[int]) -> list[list[int]]:
    """Examples of each optimizer step: a fresh permutation per epoch, its last step holding the remainder.

    A pure function of its arguments; `seed` is any number of words >= 0, such as (run seed, round, client, phase).
    """
    num_epochs = math.ceil(num_steps / _steps_per_epoch(num_examples, batch_size))
    steps: list[list[int]] = []
    for epoch in range(num_epochs):
        # The count of words goes first because SeedSequence pads with zeros: (1,) and (1, 0) would be one seed.
        words = np.random.SeedSequence([len(seed), *seed, epoch])
        generator = np.random.Generator(np.random.PCG64(words))
        order = generator.permutation(num_examples).tolist()
        for start in range(0, num_examples, batch_size):
            steps.append(order[start : start + batch_size])
    return steps[:num_steps]


def plan_step(
    lengths: Sequence[int], world_size: int, token_budget: int, segment_overhead: int = SEGMENT_OVERHEAD_TOKENS
) -> StepPlan:
    """Divide examples of these lengths among the ranks of a group. Deterministic: every rank computes the same plan.

    Every rank gets the same number of micro-batches, so that collectives match; some may have no segment. The tokens of
    a micro-batch, with padding, are at most `token_budget`, unless it is one example.
    """
    assert min(len(lengths), world_size) >= 1, (len(lengths), world_size)
    rows_of_ranks = _divide_among_ranks(lengths, world_size)
    most_tokens = 0
    most_rows = 0
    for rows in rows_of_ranks:
        most_tokens = max(most_tokens, sum(lengths[row] for row in rows))
        most_rows = max(most_rows, len(rows))
    # The fewest that the tokens ask for without padding; with one row in each, more would not help.
    num_micro_batches = min(math.ceil(most_tokens / token_budget), most_rows)
    while True:
        plans = [_plan_rank(rows, lengths, num_micro_batches, segment_overhead) for rows in rows_of_ranks]
        if all(_fits(plan, token_budget) for plan in plans):
            return StepPlan(tuple(plans))
        num_micro_batches += 1


def build_step(
    examples: TokenizedExamples, indices: Sequence[int], rank: int, world_size: int, batching: BatchingConfig
) -> StepBatch:
    """Tensors of one rank (within its rank group) for the step that trains on `indices`, and the step's totals."""
    lengths = [examples.length(index) for index in indices]
    prefix = 0
    if batching.prefix_sharing:
        prefix = _shared_prefix(examples, indices)
    # The plan counts the prefix in every example: attention copies it for each, so that is what a micro-batch costs.
    plan = plan_step(lengths, world_size, batching.token_budget, batching.segment_overhead)
    micro_batches = []
    for planned in plan.ranks[rank].micro_batches:
        micro_batches.append(_collate(planned, examples, indices, prefix, batching.pad_id))
    computed_tokens = 0
    for rank_plan in plan.ranks:
        for planned in rank_plan.micro_batches:
            computed_tokens += planned.computed_tokens(prefix)
    return StepBatch(
        micro_batches,
        num_label_tokens=sum(examples.num_label_tokens(index) for index in indices),
        num_examples=len(indices),
        real_tokens=sum(lengths),
        computed_tokens=computed_tokens,
    )


def dummy_micro_batch(pad_id: int) -> MicroBatch:
    """A forward pass that adds nothing: two tokens, no target."""
    input_ids = torch.full((_DUMMY_LENGTH,), pad_id, dtype=torch.int64)
    position_ids = torch.arange(_DUMMY_LENGTH)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    return MicroBatch(input_ids, position_ids, targets, segments=((1, _DUMMY_LENGTH),))


def _steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return math.ceil(num_examples / batch_size)


def _divide_among_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Rows of each rank in ascending order of length, with about as many tokens on each rank.

    Ties are in ascending order of the row, on every machine, because Python's sort is stable.
    """
    rows_of_ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    # The longest first, each to the rank with the fewest tokens so far: the short ones then even out what is left.
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        lightest = loads.index(min(loads))
        rows_of_ranks[lightest].append(row)
        loads[lightest] += lengths[row]
    for rows in rows_of_ranks:
        rows.sort(key=lengths.__getitem__)
    return rows_of_ranks


def _plan_rank(rows: Sequence[int], lengths: Sequence[int], num_micro_batches: int, segment_overhead: int) -> RankPlan:
    """`rows` in ascending order of length, in consecutive runs: similar lengths meet, which saves padding."""
    micro_batches = []
    for run in _cut_evenly(rows, lengths, num_micro_batches):
        micro_batches.append(MicroBatchPlan(_cut_with_least_padding(run, lengths, segment_overhead)))
    return RankPlan(tuple(micro_batches))


def _cut_evenly(rows: Sequence[int], lengths: Sequence[int], count: int) -> list[Sequence[int]]:
    """`count` runs of `rows`, in ascending order of length, with about as many tokens each.

    A run is empty only where there are fewer rows than runs.
    """
    if len(rows) <= count:
        return [rows[k : k + 1] for k in range(count)]
    cumulated = np.cumsum([lengths[row] for row in rows])
    runs = []
    start = 0
    for k in range(1, count):
        nearest = int(np.searchsorted(cumulated, cumulated[-1] * k / count)) + 1
        # One row must remain for each run that follows. That leaves one for this run, too: where a row spans the shares
        # of two runs, those after it are as long, hence so few that this bound decides for both.
        stop = min(nearest, len(rows) - (count - k))
        runs.append(rows[start:stop])
        start = stop
    runs.append(rows[start:])
    return runs


def _cut_with_least_padding(rows: Sequence[int], lengths: Sequence[int], segment_overhead: int) -> tuple[Segment, ...]:
    """Segments of rows in ascending order of length, at least total cost, by dynamic programming over the last segment.

    In sorted order some best division is contiguous: exchanging rows between segments never shortens a longest row.
    """
    # best_cost[n] is that of the first n rows; the last of their segments begins at row last_start[n].
    best_cost = np.zeros(len(rows) + 1)
    last_start = np.zeros(len(rows) + 1, dtype=np.int64)
    for stop in range(1, len(rows) + 1):
        num_rows = np.arange(stop, 0, -1)  # of a last segment that begins at row 0, 1, ..., stop - 1
        costs = best_cost[:stop] + num_rows * lengths[rows[stop - 1]] + segment_overhead
        last_start[stop] = np.argmin(costs)
        best_cost[stop] = costs[last_start[stop]]
    segments = []
    stop = len(rows)
    while stop > 0:
        start = int(last_start[stop])
        segments.append(Segment(tuple(rows[start:stop]), lengths[rows[stop - 1]]))
        stop = start
    segments.reverse()
    return tuple(segments)


def _fits(plan: RankPlan, token_budget: int) -> bool:
    return all(part.num_rows <= 1 or part.num_tokens <= token_budget for part in plan.micro_batches)


def _shared_prefix(examples: TokenizedExamples, indices: Sequence[int]) -> int:
    """Number of tokens that all prompts begin with; 0 where sharing them is not worth it."""
    # The token before the first label stays out: at its position the label is predicted, and labels differ.
    longest = min(examples.first_label(index) for index in indices) - 1
    beginnings = np.stack([examples.input_ids(index)[:longest] for index in indices])
    is_shared = (beginnings == beginnings[0]).all(axis=0)
    prefix = longest if is_shared.all() else int(np.argmin(is_shared))
    saved_tokens = prefix * (len(indices) - 1)
    total_tokens = sum(examples.length(index) for index in indices)
    return prefix if saved_tokens >= MIN_SAVED_SHARE * total_tokens else 0


def _collate(
    plan: MicroBatchPlan, examples: TokenizedExamples, indices: Sequence[int], prefix: int, pad_id: int
) -> MicroBatch:
    """Tensors of one micro-batch; row r of the plan is example indices[r]."""
    if not plan.segments:
        return dummy_micro_batch(pad_id)
    any_example = indices[plan.segments[0].rows[0]]
    input_ids = [examples.input_ids(any_example)[:prefix].astype(np.int64)]
    position_ids = [np.arange(prefix)]
    targets = [np.full(prefix, IGNORE_INDEX, dtype=np.int64)]
    shapes = []
    for segment in plan.segments:
        num_rows = len(segment.rows)
        suffix_length = segment.padded_length - prefix
        segment_ids = np.full((num_rows, suffix_length), pad_id, dtype=np.int64)
        segment_targets = np.full((num_rows, suffix_length), IGNORE_INDEX, dtype=np.int64)
        for k, row in enumerate(segment.rows):
            _fill_row(segment_ids[k], segment_targets[k], examples, indices[row], prefix)
        input_ids.append(segment_ids.reshape(-1))
        position_ids.append(np.tile(np.arange(prefix, segment.padded_length), num_rows))
        targets.append(segment_targets.reshape(-1))
        shapes.append((num_rows, suffix_length))
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(input_ids)),
        position_ids=torch.from_numpy(np.concatenate(position_ids)),
        targets=torch.from_numpy(np.concatenate(targets)),
        segments=tuple(shapes),
        prefix=prefix,
    )


def _fill_row(
    row_ids: npt.NDArray[np.int64],
    row_targets: npt.NDArray[np.int64],
    examples: TokenizedExamples,
    index: int,
    prefix: int,
) -> None:
    """Write the suffix of example `index`, and at each position before a label token that token as the target."""
    suffix = examples.input_ids(index)[prefix:]
    row_ids[: len(suffix)] = suffix
    for start, stop in examples.label_spans(index) - prefix:
        row_targets[start - 1 : stop - 1] = suffix[start:stop]
