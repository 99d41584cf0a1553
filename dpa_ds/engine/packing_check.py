"""How examples may be placed in rows so that each gets what it gets alone, tried on the model itself.

A layer that mixes along the sequence and is no attention (a convolution, a state space, linear attention), or an
attention that makes its mask without asking, lets a row's examples see one another: losses are off by 1e-4 to 1e-2, and
nothing says so. So a few short random sequences go through the model in one row and alone, and where that differs in
padded rows. It takes a second with 135M parameters on one core.
"""

from collections.abc import Callable, Sequence

import torch

from dpa_ds.data.batching import MicroBatch
from dpa_ds.engine.rows import Rows
from dpa_ds.errors import ModelError

LENGTHS = (9, 6, 8, 5, 7)
"""Tokens of the sequences."""
PREFIX_LENGTH = 4
"""Of which all have the same."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest difference of a token's logits, as a share of their norm: above rounding, below a look at the neighbour."""

Forward = Callable[[Rows, MicroBatch], torch.Tensor]
"""Logits of a micro-batch where it has targets, shape (targets, vocabulary)."""
Alone = Callable[[torch.Tensor], torch.Tensor]
"""Logits of one sequence as transformers computes it, (tokens,) -> (tokens, vocabulary)."""


def choose_rows(candidates: Sequence[Rows], forward: Forward, alone: Alone, vocab_size: int, name: str) -> Rows:
    """The first way to place examples that changes none of their logits; the last one is not tried.

    Collective under ZeRO-3: all ranks of the group.

    Args:
        name: of the model, for messages.

    Raises:
        ModelError: the model returns NaN.
    """
    sequences = random_sequences(vocab_size)
    expected = [alone(sequence) for sequence in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in expected):
        raise ModelError(
            f"the base model ({name}) returns NaN or infinity before anything is trained: download it again, or choose "
            "a model.precision of a wider range (bf16 for fp16, fp32 for both)"
        )
    *tried, last = candidates
    for rows in tried:
        if all(_agree(rows, forward, expected, sequences, prefix) for prefix in rows.prefixes):
            return rows
    return last


def random_sequences(vocab_size: int) -> list[torch.Tensor]:
    """Sequences of token ids that begin alike, (tokens,) each."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocab_size, (PREFIX_LENGTH,), generator=generator)
    sequences = []
    for length in LENGTHS:
        own = torch.randint(vocab_size, (length - PREFIX_LENGTH,), generator=generator)
        sequences.append(torch.cat([prefix, own]))
    return sequences


def same_logits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether sequences have the logits that they should have, up to the rounding of their precision.

    In fp32 every token has. In 16 bits a token whose router hesitates may get another expert by rounding alone, which
    no bound tells from a mistake: there half of the tokens must have, and half of the first ones, which see the
    neighbour most.

    Args:
        found, expected: of each sequence, (tokens, vocabulary).
    """
    dtype = expected[0].dtype
    of_sequences = []
    for logits, wanted in zip(found, expected, strict=True):
        difference = (logits.float() - wanted.float()).norm(dim=-1)
        of_sequences.append(difference / wanted.float().norm(dim=-1))
    of_tokens = torch.cat(of_sequences)
    if dtype == torch.float32:
        return float(of_tokens.max()) <= TOLERANCE[dtype]
    of_first_tokens = torch.stack([differences[0] for differences in of_sequences])
    return float(torch.stack([of_tokens.median(), of_first_tokens.median()]).max()) <= TOLERANCE[dtype]


def _agree(
    rows: Rows, forward: Forward, expected: list[torch.Tensor], sequences: list[torch.Tensor], prefix: int
) -> bool:
    """Whether each of the sequences gets the logits that it has alone."""
    assert prefix <= PREFIX_LENGTH, prefix
    logits = forward(rows, rows.trial(sequences, prefix))
    parts = torch.split(logits, [len(sequence) - prefix for sequence in sequences])
    # Without the first: in a packed row it has no neighbour on its left.
    return same_logits(parts[1:], [alone[prefix:] for alone in expected[1:]])
