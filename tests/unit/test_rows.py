"""Ways to place examples in rows: which one is taken, and what a padded pass holds."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch, build_step
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.engine.packing_check import choose_rows
from dpa_ds.engine.rows import PaddedRows, Rows, SingleRows
from dpa_ds.errors import ModelError

VOCAB = 50
LENGTHS = (3, 9, 4, 8, 5, 7, 6, 2)
CPU = torch.device("cpu")


class OtherRows(PaddedRows):
    """Another way, in the place of packed rows."""

    description = "other"


def logits_of(tokens: torch.Tensor) -> torch.Tensor:
    """What a model says of each token for itself: (tokens,) -> (tokens, VOCAB)."""
    return torch.nn.functional.one_hot(tokens, VOCAB).float() + 1


def examples() -> TokenizedExamples:
    tokens = np.arange(1, 1 + sum(LENGTHS), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    spans = np.array([(1, length) for length in LENGTHS], dtype=np.int32)
    return TokenizedExamples(tokens, offsets, spans, np.arange(len(LENGTHS) + 1), 0)


@pytest.mark.parametrize(
    ("leaking", "taken"), [((), OtherRows), ((OtherRows,), PaddedRows), ((OtherRows, PaddedRows), SingleRows)]
)
def test_the_first_way_that_changes_nothing_is_taken(leaking: Sequence[type[Rows]], taken: type[Rows]) -> None:
    def forward(rows: Rows, micro_batch: MicroBatch) -> torch.Tensor:
        assert type(rows) is not SingleRows, "the last way is right by itself"
        own = micro_batch.targets[micro_batch.targets != IGNORE_INDEX]
        return logits_of(own) + 0.1 * torch.rand(len(own), VOCAB) * (type(rows) in leaking)

    found = choose_rows([OtherRows(), PaddedRows(), SingleRows()], forward, logits_of, VOCAB, "A")
    assert type(found) is taken


def test_a_model_of_nan_is_reported() -> None:
    with pytest.raises(ModelError, match=r"the base model \(A\) returns NaN"):
        choose_rows([SingleRows()], lambda *_: torch.zeros(0), lambda ids: logits_of(ids) * torch.nan, VOCAB, "A")


@pytest.mark.parametrize("budget", [1, 10, 20, 1000])
def test_each_padded_pass_is_a_rectangle_within_the_budget(budget: int) -> None:
    """Whatever the budget, every example has its tokens and its targets once."""
    rows, tokens = PaddedRows(), examples()
    step = build_step(tokens, range(len(tokens)), 0, 1, rows.batching(budget, pad_id=0))
    seen, targets = [], []
    for micro_batch in step.micro_batches:
        ids = rows.inputs(micro_batch, CPU)["input_ids"]
        assert ids.numel() <= budget or len(ids) == 1
        seen += ids[ids != 0].tolist()
        targets += micro_batch.targets[micro_batch.targets != IGNORE_INDEX].tolist()
    assert sorted(seen) == tokens.tokens.tolist()
    assert len(targets) == step.num_label_tokens == sum(LENGTHS) - len(LENGTHS)


def test_a_single_row_is_an_example_without_padding() -> None:
    rows, tokens = SingleRows(), examples()
    step = build_step(tokens, range(len(tokens)), 0, 1, rows.batching(1000, pad_id=0))
    shapes = [tuple(rows.inputs(micro_batch, CPU)["input_ids"].shape) for micro_batch in step.micro_batches]
    assert sorted(shapes) == [(1, length) for length in sorted(LENGTHS)]
