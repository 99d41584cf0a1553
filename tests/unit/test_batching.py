"""Ranks, hosting and token budget divide a step; they never change what it computes."""

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_for_tests import make_tokenizer

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.batching import (
    IGNORE_INDEX,
    SEGMENT_OVERHEAD_TOKENS,
    BatchingConfig,
    MicroBatch,
    MicroBatchPlan,
    Segment,
    build_step,
    dummy_micro_batch,
    num_steps,
    plan_step,
    step_indices,
)
from dpa_ds.data.formats import build_format
from dpa_ds.data.sources import list_clients, read_client
from dpa_ds.data.tokenize import TokenizedExamples, tokenize_examples

# Not among the tokens of make_examples, so that padding can be recognised.
PAD_ID = 0

AUTHORS_DATA = Path(__file__).parents[2].parent / "shared" / "data" / "feddpa" / "dataset1"


def make_examples(lengths: Sequence[int], prompt_lengths: Sequence[int]) -> TokenizedExamples:
    """Tokens 10, 11, 12 ... : each occurs once, so that its place can be checked."""
    return TokenizedExamples(
        tokens=np.arange(10, 10 + sum(lengths), dtype=np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        spans=np.array([(max(1, p), n) for p, n in zip(prompt_lengths, lengths, strict=True)], dtype=np.int32),
        span_offsets=np.arange(len(lengths) + 1),
        num_dropped=0,
    )


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "local_epochs", "max_steps", "expected"),
    [
        (300, 64, 10.0, None, 50),
        (300, 64, 1.0, None, 5),
        (100, 10, 0.5, None, 5),
        (100, 10, 0.01, None, 1),
        (100, 10, 1.1, None, 11),  # in floats 1.1 x 10 rounds up to 12
        (100, 10, 2.31, None, 24),
        (7, 64, 3.0, None, 3),
        (100, 10, 10.0, 3, 3),
        (100, 10, 0.1, 25, 25),
        (1, 1, 0.0001, None, 1),
    ],
)
def test_num_steps(
    num_examples: int, batch_size: int, local_epochs: float, max_steps: int | None, expected: int
) -> None:
    assert num_steps(num_examples, batch_size, local_epochs, max_steps) == expected


def test_an_epoch_holds_every_example_once_and_its_last_step_the_remainder() -> None:
    steps = step_indices(10, 4, 7, seed=(0, 1, 2, 0))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(chain.from_iterable(steps[:3])) == list(range(10))
    assert sorted(chain.from_iterable(steps[3:6])) == list(range(10))
    assert steps[:3] != steps[3:6]


def test_step_indices_is_a_function_of_every_seed_word() -> None:
    seeds = [(0, 1, 2, 0), (1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1), (0, 1, 2), (0,), (0, 0)]
    orders = [step_indices(50, 50, 1, seed)[0] for seed in seeds]
    assert len({tuple(order) for order in orders}) == len(seeds)
    assert step_indices(50, 50, 1, seeds[0])[0] == orders[0]


def test_a_longer_phase_begins_with_the_same_steps() -> None:
    assert step_indices(30, 8, 20, (5, 1))[:6] == step_indices(30, 8, 6, (5, 1))


@settings(deadline=None, max_examples=300)
@example(lengths=[7], world_size=8, token_budget=1)
@example(lengths=[9] * 64, world_size=3, token_budget=10**6)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=70),
    world_size=st.integers(1, 9),
    token_budget=st.integers(1, 5000),
)
def test_plan_step_holds_its_promises(lengths: list[int], world_size: int, token_budget: int) -> None:
    plan = plan_step(lengths, world_size, token_budget)
    assert len(plan.ranks) == world_size
    assert len({len(rank.micro_batches) for rank in plan.ranks}) == 1
    assert len(plan.ranks[0].micro_batches) >= 1
    micro_batches = [micro_batch for rank in plan.ranks for micro_batch in rank.micro_batches]
    segments = [segment for micro_batch in micro_batches for segment in micro_batch.segments]
    assert sorted(chain.from_iterable(segment.rows for segment in segments)) == list(range(len(lengths)))
    for segment in segments:
        assert segment.rows
        assert segment.padded_length == max(lengths[row] for row in segment.rows)
    for micro_batch in micro_batches:
        assert micro_batch.num_rows <= 1 or padded(lengths, rows_of_segments(micro_batch)) <= token_budget
    for rank in plan.ranks:  # a rank idles only where it has too few rows to go round
        if not all(micro_batch.segments for micro_batch in rank.micro_batches):
            assert all(micro_batch.num_rows <= 1 for micro_batch in rank.micro_batches)
    assert plan == plan_step(lengths, world_size, token_budget)


def rows_of_segments(micro_batch: MicroBatchPlan) -> list[Sequence[int]]:
    return [segment.rows for segment in micro_batch.segments]


def padded(lengths: Sequence[int], segments: Sequence[Sequence[int]]) -> int:
    """Tokens with padding, counted from the examples and not by the plan."""
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in segments)


def least_cost(lengths: Sequence[int]) -> int:
    """Exhaustive: every way to put the rows into segments, not only the contiguous ones."""

    def extend(row: int, parts: list[list[int]]) -> int:
        if row == len(lengths):
            return padded(lengths, parts) + SEGMENT_OVERHEAD_TOKENS * len(parts)
        best = extend(row + 1, [*parts, [row]])
        for number in range(len(parts)):
            best = min(best, extend(row + 1, [*parts[:number], [*parts[number], row], *parts[number + 1 :]]))
        return best

    return extend(0, [])


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6))
def test_segments_are_the_cheapest_of_all(lengths: list[int]) -> None:
    (rank,) = plan_step(lengths, 1, 10**6).ranks
    (micro_batch,) = rank.micro_batches
    segments = rows_of_segments(micro_batch)
    assert padded(lengths, segments) + SEGMENT_OVERHEAD_TOKENS * len(segments) == least_cost(lengths)


def test_a_budget_cuts_a_step_into_equal_micro_batches() -> None:
    (rank,) = plan_step([10] * 30, 1, 110).ranks
    assert [micro_batch.num_tokens for micro_batch in rank.micro_batches] == [100, 100, 100]


def test_two_ranks_share_a_step_that_one_micro_batch_could_hold() -> None:
    plan = plan_step([20] * 64, 2, 4096)
    for rank in plan.ranks:
        (micro_batch,) = rank.micro_batches
        (segment,) = micro_batch.segments
        assert (len(segment.rows), segment.padded_length) == (32, 20)


def test_few_examples_leave_ranks_with_dummies() -> None:
    plan = plan_step([5, 6], 4, 100)
    segments = [micro_batch.segments for rank in plan.ranks for micro_batch in rank.micro_batches]
    assert sorted(segments, key=str) == [(), (), (Segment((0,), 5),), (Segment((1,), 6),)]


def test_loads_of_ranks_are_close() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, size=64).tolist()
    plan = plan_step(lengths, 4, 1024)
    loads = [sum(micro_batch.num_tokens for micro_batch in rank.micro_batches) for rank in plan.ranks]
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_the_longest_example_is_given_away_first() -> None:
    plan = plan_step([10, 10, 10, 10, 40], 2, 1024)
    loads = [sum(micro_batch.num_tokens for micro_batch in rank.micro_batches) for rank in plan.ranks]
    assert loads == [40, 40]


def test_planning_is_fast() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, size=64).tolist()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        plan_step(lengths, 2, 1024)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


def test_build_step_packs_examples_in_one_row() -> None:
    examples = make_examples([3, 5, 40], [2, 2, 39])
    step = build_step(examples, [1, 0, 2], rank=0, world_size=1, batching=BatchingConfig(100, 7, True))
    (micro_batch,) = step.micro_batches
    assert micro_batch.segments == ((2, 5), (1, 40))
    assert micro_batch.input_ids.tolist() == [10, 11, 12, 7, 7, 13, 14, 15, 16, 17, *range(18, 58)]
    assert micro_batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, *range(40)]
    none = IGNORE_INDEX
    assert micro_batch.targets.tolist() == [none, 12, *[none] * 3, none, 15, 16, 17, none, *[none] * 38, 57, none]
    assert {t.dtype for t in (micro_batch.input_ids, micro_batch.position_ids, micro_batch.targets)} == {torch.int64}
    assert (step.num_label_tokens, step.num_examples, step.real_tokens, step.computed_tokens) == (5, 3, 48, 50)


def test_the_first_token_of_an_example_is_never_a_label_token() -> None:
    step = build_step(make_examples([4], [0]), [0], rank=0, world_size=1, batching=BatchingConfig(100, 0, True))
    assert step.num_label_tokens == 3


def test_dummy_has_no_label() -> None:
    dummy = dummy_micro_batch(9)
    assert dummy.input_ids.tolist() == [9, 9]
    assert dummy.targets.tolist() == [IGNORE_INDEX, IGNORE_INDEX]
    assert dummy.segments == ((1, 2),)


def rows_of(batch: MicroBatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, positions and targets of each example of a micro-batch, the shared prefix put back before it."""
    sizes = [batch.prefix, *(length for count, length in batch.segments for _ in range(count))]
    parts = [tensor.split(sizes) for tensor in (batch.input_ids, batch.position_ids, batch.targets)]
    prefixes = [prefix for prefix, *_ in parts]
    return [
        tuple(torch.cat([a, b]) for a, b in zip(prefixes, row, strict=True))  # type: ignore[misc]
        for row in zip(*(suffixes for _, *suffixes in parts), strict=True)
    ]


def labelled_rows(
    examples: TokenizedExamples, indices: list[int], world_size: int, batching: BatchingConfig
) -> Counter[tuple[int, ...]]:
    """What all ranks together train on: (token, target) sequences without padding, and the step's totals."""
    rows: Counter[tuple[int, ...]] = Counter()
    totals = set()
    for rank in range(world_size):
        step = build_step(examples, indices, rank, world_size, batching)
        totals.add((step.num_label_tokens, step.num_examples, step.real_tokens))
        for batch in step.micro_batches:
            for ids, positions, targets in rows_of(batch):
                assert positions.tolist() == list(range(len(ids)))
                if (targets != IGNORE_INDEX).any():
                    is_token = ids != PAD_ID
                    rows[(*ids[is_token].tolist(), *targets[is_token].tolist())] += 1
    assert len(totals) == 1
    num_label_tokens, num_examples, real_tokens = totals.pop()
    rows[("totals", num_label_tokens, num_examples, real_tokens)] = 1  # type: ignore[index]
    return rows


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20),
    shared=st.integers(0, 25),
    world_size=st.integers(1, 5),
    budget=st.integers(1, 400),
)
def test_ranks_budget_and_sharing_do_not_change_what_is_trained(
    lengths: list[int], shared: int, world_size: int, budget: int
) -> None:
    examples = make_examples(lengths, [length // 2 for length in lengths])
    for index in range(len(lengths)):
        beginning = examples.input_ids(index)[:shared]
        beginning[:] = np.arange(1000, 1000 + len(beginning))
    indices = list(range(len(lengths)))
    trained = labelled_rows(examples, indices, world_size, BatchingConfig(budget, PAD_ID, True))
    assert trained == labelled_rows(examples, indices, 1, BatchingConfig(10**6, PAD_ID, False))


@pytest.mark.parametrize(
    ("prompt_lengths", "same", "prefix"),
    [
        ([6, 5, 7], 4, 4),
        ([6, 5, 7], 5, 4),  # the last token of the shortest prompt predicts an answer's first
        ([6, 1, 7], 9, 0),
        ([6, 0, 7], 9, 0),
        ([6, 5, 7], 0, 0),
    ],
)
def test_a_shared_prefix_is_placed_once(prompt_lengths: list[int], same: int, prefix: int) -> None:
    examples = make_examples([10, 10, 10], prompt_lengths)
    for index in range(3):
        examples.input_ids(index)[:same] = np.arange(1000, 1000 + same)
    step = build_step(examples, [0, 1, 2], 0, 1, BatchingConfig(100, PAD_ID, True))
    (batch,) = step.micro_batches
    assert (batch.prefix, step.real_tokens, step.computed_tokens) == (prefix, 30, 30 - 2 * prefix)
    assert batch.segments == ((3, 10 - prefix),)
    assert batch.input_ids[:prefix].tolist() == list(range(1000, 1000 + prefix))


def test_a_prefix_that_saves_next_to_nothing_is_not_shared() -> None:
    examples = make_examples([100] * 4, [50] * 4)
    for shared, prefix in ((4, 0), (5, 5)):  # of 400 tokens 12 and 15; a 32nd is 12.5
        for index in range(4):
            examples.input_ids(index)[:shared] = np.arange(1, 1 + shared)
        (batch,) = build_step(examples, range(4), 0, 1, BatchingConfig(500, 0, True)).micro_batches
        assert batch.prefix == prefix


def test_examples_longer_than_the_budget_make_no_dummies() -> None:
    step = build_step(make_examples([400, 300], [5, 5]), [0, 1], 0, 1, BatchingConfig(50, 0, True))
    assert [batch.segments for batch in step.micro_batches] == [((1, 300),), ((1, 400),)]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=20), world_size=st.integers(1, 5))
def test_totals_count_what_the_tensors_hold(lengths: list[int], world_size: int) -> None:
    examples = make_examples(lengths, [1] * len(lengths))
    steps = [
        build_step(examples, range(len(lengths)), rank, world_size, BatchingConfig(100, 0, True))
        for rank in range(world_size)
    ]
    batches = [batch for step in steps for batch in step.micro_batches]
    assert steps[0].computed_tokens == sum(batch.input_ids.numel() for batch in batches)
    assert steps[0].num_label_tokens == sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)


@pytest.mark.skipif(not AUTHORS_DATA.is_dir(), reason=f"the authors' data is not at {AUTHORS_DATA}")
def test_padding_is_below_five_percent_on_the_authors_data() -> None:
    config = DataConfig(path=str(AUTHORS_DATA))
    clients = [read_client(config, 0, k) for k in range(len(list_clients(config, 0)))]
    tokenizer = make_tokenizer((e.instruction for c in clients for e in c.train), vocab_size=1000)
    tokenized = [tokenize_examples(c.train, build_format(tokenizer, config), 512, c.name) for c in clients]
    for world_size, batch_size, budget in [(w, b, t) for w in (1, 2) for b in (32, 64) for t in (1024, 4096)]:
        real = computed = 0
        for client_id, examples in enumerate(tokenized):
            for indices in step_indices(len(examples), batch_size, 10, (0, 1, client_id, 0)):
                step = build_step(examples, indices, 0, world_size, BatchingConfig(budget, 0, False))
                real, computed = real + step.real_tokens, computed + step.computed_tokens
        assert real / computed >= 0.95
