"""Whether prompts are answered in a batch as each is alone, tried on the model itself.

A batch is padded on the left, and its cache is divided among beams. Models whose layers keep a state instead of keys
and values may read the padding, or have a cache that cannot be divided. So two short random prompts take two steps in a
batch, and alone without a cache.
"""

import logging
from enum import Enum, auto

import torch

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.engine.packing_check import random_sequences, same_logits
from dpa_ds.errors import ModelError
from dpa_ds.inference.rows import CachedRows

logger = logging.getLogger(__name__)

WEIGHTS = (0.25, 0.75)
"""Of the local adapter, for the two prompts."""


class Decoding(Enum):
    """How prompts are answered."""

    BATCHED = auto()
    """Together, with a cache of keys and values."""
    ALONE = auto()
    """One after another, each computed from scratch for every token."""


@torch.no_grad()
def choose_decoding(adapters: AdapterModel, pad_id: int, in_step: bool) -> Decoding:
    """Together where that changes no prompt's logits, else alone. Collective where ranks are in step.

    The mix is that of the last prompt afterwards: set it again.

    Args:
        in_step: the ranks of a group divide the base, and compute every token together.
    """
    adapters.base_model.eval()
    sequences = random_sequences(adapters.vocab_size)[:2]
    prompts = [sequence[:-1].tolist() for sequence in sequences]
    try:
        found = _together(adapters, prompts, [int(sequence[-1]) for sequence in sequences], pad_id, in_step)
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        if in_step:  # the engine is in the middle of a pass, so nothing else can be tried
            raise ModelError(
                f"{type(adapters.base_model).__name__} cannot answer while ranks divide it ({error}): evaluate with "
                "--evaluation.sharding never"
            ) from error
        logger.debug(f"a batch of prompts: {error}")
        found = None
    if found is not None and same_logits(found, _alone(adapters, sequences, in_step)):
        return Decoding.BATCHED
    name = type(adapters.base_model).__name__
    logger.warning(f"{name} cannot answer prompts together, so each is answered by itself: right, and much slower")
    return Decoding.ALONE


def _together(
    adapters: AdapterModel, prompts: list[list[int]], continued: list[int], pad_id: int, in_step: bool
) -> list[torch.Tensor]:
    """Logits after each prompt, and after it and its token of `continued`, by the second of two beams that changed
    places: (2, vocabulary) for each prompt."""
    rows = CachedRows(adapters, prompts, torch.tensor(WEIGHTS), 2, len(continued), pad_id, in_step)
    first = rows.logits()
    tokens = torch.tensor(continued, device=adapters.device).repeat_interleave(2)
    rows.append(tokens, torch.tensor([1, 0, 3, 2], device=adapters.device))
    second = rows.logits()
    return [torch.stack([first[row], second[row]]) for row in (1, 3)]


def _alone(adapters: AdapterModel, sequences: list[torch.Tensor], in_step: bool) -> list[torch.Tensor]:
    expected = []
    for sequence, weight in zip(sequences, WEIGHTS, strict=True):
        adapters.set_mix(global_local_mix(weight), compute_all=in_step)
        logits = adapters.base_model(input_ids=sequence[None].to(adapters.device), use_cache=False).logits
        expected.append(logits[0, -2:])
    return expected
