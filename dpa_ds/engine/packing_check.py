"""Whether examples that are packed in one row get what each gets alone, tried on the model itself.

A layer that mixes along the sequence and is no attention (a convolution, a state space, linear attention), or an
attention that makes its mask without asking, lets a row's examples see one another: losses are off by 1e-4 to 1e-2, and
nothing says so. So a few short random sequences go through the model in one row and alone. It takes a second with 135M
parameters on one core.
"""

import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto

import torch

from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch
from dpa_ds.errors import ModelError

logger = logging.getLogger(__name__)

LENGTHS = (9, 6, 8, 5, 7)
"""Tokens of the sequences."""
PREFIX_LENGTH = 4
"""Of which all have the same, where the model takes a shared prefix."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest difference of a token's logits, as a share of their norm: above rounding, below a look at the neighbour."""

Forward = Callable[[MicroBatch], torch.Tensor]
"""Logits of a packed row, shape (tokens, vocabulary)."""
Alone = Callable[[torch.Tensor], torch.Tensor]
"""Logits of one sequence as transformers computes it, (tokens,) -> (tokens, vocabulary)."""


class Rows(Enum):
    """What a row may hold."""

    MANY = auto()
    """Several examples."""
    ONE = auto()
    """One example: with several they see one another."""


def choose_rows(forward: Forward, alone: Alone, vocab_size: int, supports_prefix: bool, name: str) -> Rows:
    """Several examples a row where that changes nothing, else one. Collective under ZeRO-3: all ranks of the group.

    Args:
        supports_prefix: whether rows may begin with a prefix that their examples share.
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
    prefixes = (0, PREFIX_LENGTH) if supports_prefix else (0,)
    if all(_agree(forward, expected, sequences, prefix) for prefix in prefixes):
        return Rows.MANY
    logger.warning(
        f"{name} mixes the examples of a row, so each is computed by itself: right, and slower than with other models"
    )
    return Rows.ONE


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


def _agree(forward: Forward, expected: list[torch.Tensor], sequences: list[torch.Tensor], prefix: int) -> bool:
    """Whether the packed row gives each of its sequences the logits that it has alone."""
    logits = forward(_pack(sequences, prefix))
    own = [len(sequence) - prefix for sequence in sequences]
    parts = torch.split(logits, [prefix, *own])[1:]
    # Without the first: it has no neighbour on its left.
    return same_logits(parts[1:], [alone[prefix:] for alone in expected[1:]])


def _pack(sequences: list[torch.Tensor], prefix: int) -> MicroBatch:
    suffixes = [sequence[prefix:] for sequence in sequences]
    input_ids = torch.cat([sequences[0][:prefix], *suffixes])
    positions = [torch.arange(prefix), *(torch.arange(prefix, len(sequence)) for sequence in sequences)]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.cat(positions),
        targets=torch.full_like(input_ids, IGNORE_INDEX),
        segments=tuple((1, len(suffix)) for suffix in suffixes),
        prefix=prefix,
    )
