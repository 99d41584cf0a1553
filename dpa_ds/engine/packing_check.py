"""Whether examples that are packed in one row get what each gets alone, tried on the model itself.

A layer that mixes along the sequence and is no attention (a convolution, a state space, linear attention), or an
attention that makes its mask without asking, lets a row's examples see one another: losses are off by 1e-4 to 1e-2, and
nothing says so. So two short random sequences go through the model in one row and alone, in milliseconds.
"""

import logging
from collections.abc import Callable
from enum import Enum, auto

import torch

from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch
from dpa_ds.errors import ModelError

logger = logging.getLogger(__name__)

LENGTHS = (9, 6)
"""Tokens of the two sequences."""
PREFIX_LENGTH = 4
"""Of which both have the same, where the model takes a shared prefix."""
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


def choose_rows(forward: Forward, alone: Alone, vocab_size: int, takes_prefix: bool, name: str) -> Rows:
    """Several examples a row where that changes nothing, else one. Collective under ZeRO-3: all ranks of the group.

    Args:
        takes_prefix: whether rows may begin with a prefix that their examples share.
        name: of the model, for messages.

    Raises:
        ModelError: the model returns NaN, or not even a row of one example gives what transformers gives.
    """
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocab_size, (PREFIX_LENGTH,), generator=generator)
    sequences = []
    for length in LENGTHS:
        own = torch.randint(vocab_size, (length - PREFIX_LENGTH,), generator=generator)
        sequences.append(torch.cat([prefix, own]))
    expected = [alone(sequence) for sequence in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in expected):
        raise ModelError(
            f"the base model ({name}) returns NaN or infinity before anything is trained: download it again, or choose "
            "a model.precision of a wider range (bf16 for fp16, fp32 for both)"
        )
    rows = [(sequences, 0), (sequences, PREFIX_LENGTH)][: 1 + takes_prefix]
    if all(_agree(forward, expected, part, shared) for part, shared in rows):
        return Rows.MANY
    if not all(_agree(forward, [logits], [part], 0) for logits, part in zip(expected, sequences, strict=True)):
        raise ModelError(
            f"{name} does not compute under this project's attention what it computes by itself: choose another "
            "model.attention (eager, flash_attention_2), or another model"
        )
    logger.warning(
        f"{name} mixes the examples of a row, so each is computed by itself: right, and slower than with other models"
    )
    return Rows.ONE


def _agree(forward: Forward, expected: list[torch.Tensor], sequences: list[torch.Tensor], prefix: int) -> bool:
    """Whether the packed row gives each of its sequences the logits that it has alone."""
    logits = forward(_pack(sequences, prefix)).float()
    start = prefix
    for alone, sequence in zip(expected, sequences, strict=True):
        wanted = alone[prefix:].float()
        found = logits[start : start + len(sequence) - prefix]
        start += len(sequence) - prefix
        difference = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        if float(difference.max()) > TOLERANCE[alone.dtype]:
            return False
    return True


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
