"""Fixed examples per optimizer step, cut into micro-batches that fit a token budget, the same number on every rank.

What a step computes is a function of seed, client, round and phase alone (`step_indices`). Ranks, hosting and
micro-batch budget only decide who computes which part of it (`plan_step`); the loss is normalised by the label
tokens of the whole step (`StepBatch.num_label_tokens`), so the division leaves no trace in the gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from dpa_ds.data.prompts import TokenizedExamples

# What one more micro-batch costs, in tokens. Short of some dozens of tokens a forward and backward pass takes the
# same time whatever its size (kernel launches, reading the weights), so a few padded tokens are cheaper than one
# more pass. 32 keeps at least 85 % real tokens on the authors' data (tests/unit/test_batches.py).
MICRO_BATCH_OVERHEAD_TOKENS = 32

# Labels with this value do not count in the loss (torch's default ignore_index).
IGNORE_INDEX = -100

# Shape of a dummy: two positions, because the loss compares position t with token t + 1.
_DUMMY_LENGTH = 2


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: int64 tensors of shape (batch, seq_len).

    No attention mask: rows are padded on the right and the model is causal, so no token can attend to padding, and
    padding has no label.
    """

    input_ids: torch.Tensor
    """Tokens; padding is the pad token."""
    labels: torch.Tensor
    """Token t at position t (the loss shifts); IGNORE_INDEX on prompt and padding."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an optimizer step. The numbers are those of the whole step, over all ranks."""

    micro_batches: list[MicroBatch]
    """As many on every rank, at least one; dummies where a rank has nothing left to do."""
    num_label_tokens: int
    """Predicted tokens: labels other than IGNORE_INDEX at positions >= 1."""
    num_examples: int
    """Examples of the step."""
    real_tokens: int
    """Tokens without padding."""
    computed_tokens: int
    """Tokens with padding and dummies."""


def num_steps(num_examples: int, batch_size: int, local_epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of one phase, at least 1.

    An epoch has ceil(num_examples / batch_size) steps; part of an epoch is rounded up to whole steps. `max_steps`
    wins over `local_epochs`, and goes on into further epochs if need be.
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


def plan_step(lengths: Sequence[int], world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Who computes what: [rank][micro-batch][position in `lengths`], each position exactly once.

    Every rank gets the same number of micro-batches, at least one; some may be empty (the rank runs a dummy, so
    that collectives match). rows x longest row is at most `token_budget`, except for a single row. Deterministic.
    """
    assert min(len(lengths), world_size) >= 1, (len(lengths), world_size)
    order = np.argsort(np.asarray(lengths), kind="stable")
    ascending = [int(lengths[position]) for position in order]
    chunks = _cut_with_least_padding(ascending, token_budget)
    chunks = _cut_for_ranks(chunks, ascending, world_size)
    chunks.sort(key=lambda chunk: -_cost(chunk, ascending))
    return [
        [[int(order[row]) for row in range(start, stop)] for start, stop in rank_chunks]
        for rank_chunks in _spread(chunks, ascending, world_size)
    ]


def dummy_micro_batch(pad_id: int) -> MicroBatch:
    """A forward pass that adds nothing: shape (1, 2), no label."""
    input_ids = torch.full((1, _DUMMY_LENGTH), pad_id, dtype=torch.int64)
    return MicroBatch(input_ids, torch.full_like(input_ids, IGNORE_INDEX))


def build_step(
    examples: TokenizedExamples, indices: Sequence[int], rank: int, world_size: int, token_budget: int, pad_id: int
) -> StepBatch:
    """Tensors of one rank (within its rank group) for the step that trains on `indices`, and the step's totals."""
    lengths = [examples.length(index) for index in indices]
    plan = plan_step(lengths, world_size, token_budget)
    computed = sum(
        len(rows) * max(lengths[row] for row in rows) if rows else _DUMMY_LENGTH for part in plan for rows in part
    )
    return StepBatch(
        micro_batches=[_collate(examples, [indices[row] for row in rows], pad_id) for rows in plan[rank]],
        num_label_tokens=sum(examples.num_label_tokens(index) for index in indices),
        num_examples=len(indices),
        real_tokens=sum(lengths),
        computed_tokens=computed,
    )


def _steps_per_epoch(num_examples: int, batch_size: int) -> int:
    return math.ceil(num_examples / batch_size)


# A chunk is a half-open range (start, stop) of rows in ascending order of length: its last row is its longest.
_Chunk = tuple[int, int]


def _cost(chunk: _Chunk, ascending: Sequence[int]) -> int:
    """Tokens with padding plus the overhead of a micro-batch; an empty chunk costs the overhead."""
    start, stop = chunk
    padded = (stop - start) * ascending[stop - 1] if stop > start else 0
    return padded + MICRO_BATCH_OVERHEAD_TOKENS


def _cut_with_least_padding(ascending: Sequence[int], token_budget: int) -> list[_Chunk]:
    """The cuts of least total cost, by dynamic programming over the last chunk.

    In sorted order some best division is contiguous: exchanging rows between chunks never shortens a longest row.
    """
    num_rows = len(ascending)
    best = np.zeros(num_rows + 1)
    cut = np.zeros(num_rows + 1, dtype=np.int64)
    for stop in range(1, num_rows + 1):
        longest = ascending[stop - 1]
        first = max(0, stop - max(1, token_budget // longest))
        starts = np.arange(first, stop)
        costs = best[first:stop] + (stop - starts) * longest + MICRO_BATCH_OVERHEAD_TOKENS
        chosen = int(np.argmin(costs))
        best[stop], cut[stop] = costs[chosen], first + chosen
    chunks: list[_Chunk] = []
    stop = num_rows
    while stop > 0:
        chunks.append((int(cut[stop]), stop))
        stop = int(cut[stop])
    return chunks


def _cut_for_ranks(chunks: list[_Chunk], ascending: Sequence[int], world_size: int) -> list[_Chunk]:
    """Cut further until the number is a multiple of `world_size` and the ranks wait least for one another."""
    if world_size == 1:
        return chunks
    fewest = math.ceil(len(chunks) / world_size) * world_size
    # One or two more micro-batches per rank can pay: they even out ranks that hold few and unequal ones.
    candidates = [_split_to(chunks, ascending, fewest + extra * world_size) for extra in range(3)]
    return min(candidates, key=lambda candidate: _lockstep_cost(candidate, ascending, world_size))


def _split_to(chunks: Sequence[_Chunk], ascending: Sequence[int], wanted: int) -> list[_Chunk]:
    """`wanted` chunks: the dearest that can be is cut in two until there are enough; then empty ones are added."""
    result = list(chunks)
    while len(result) < wanted:
        splittable = [chunk for chunk in result if chunk[1] - chunk[0] > 1]
        if not splittable:
            return result + [(0, 0)] * (wanted - len(result))
        dearest = max(splittable, key=lambda chunk: (_cost(chunk, ascending), chunk))
        result.remove(dearest)
        result.extend(_halve(dearest, ascending))
    return result


def _halve(chunk: _Chunk, ascending: Sequence[int]) -> list[_Chunk]:
    """The cut whose dearer side is cheapest, and of those the one with the least padding."""
    start, stop = chunk
    cuts = ([(start, middle), (middle, stop)] for middle in range(start + 1, stop))
    return min(cuts, key=lambda parts: sorted((_cost(part, ascending) for part in parts), reverse=True))


def _lockstep_cost(chunks: Sequence[_Chunk], ascending: Sequence[int], world_size: int) -> int:
    """Cost of a step whose ranks meet in every micro-batch, as under ZeRO-3: the dearest of each meeting counts."""
    return sum(sorted((_cost(chunk, ascending) for chunk in chunks), reverse=True)[::world_size])


def _spread(chunks: Sequence[_Chunk], ascending: Sequence[int], world_size: int) -> list[list[_Chunk]]:
    """Micro-batch k of the ranks are the k-th `world_size` chunks by cost; the dearest goes to the lightest rank.

    Longest processing time first, under the condition that ranks meet over chunks of similar cost.
    """
    ranks: list[list[_Chunk]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for first in range(0, len(chunks), world_size):
        lightest_first = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, chunk in zip(lightest_first, chunks[first : first + world_size], strict=True):
            ranks[rank].append(chunk)
            loads[rank] += _cost(chunk, ascending)
    return ranks


def _collate(examples: TokenizedExamples, indices: Sequence[int], pad_id: int) -> MicroBatch:
    if not indices:
        return dummy_micro_batch(pad_id)
    shape = (len(indices), max(examples.length(index) for index in indices))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    for row, index in enumerate(indices):
        length, prompt_length = examples.length(index), int(examples.prompt_lengths[index])
        input_ids[row, :length] = examples.input_ids(index)
        labels[row, prompt_length:length] = input_ids[row, prompt_length:length]
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(labels))
