"""Decoding without the rows that are finished: `generate` itself continues with all rows until the last one is."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from dpa_ds.inference.beam_cache import can_keep_rows, keep_rows

WORTH_COPYING = 7 / 8
"""The cache is copied without finished rows as soon as no more than this share of its rows continues."""


@contextmanager
def only_open_rows(
    model: Any, cache: Cache | None, num_beams: int, eos_id: int, mixes: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """While inside, `model.generate` computes only rows of prompts whose answers can still change; others get logits of 0.

    Which these are: with one beam, those without an end token; with more, those that transformers' `_beam_search` (5.24) still
    searches, reported by its `_check_early_stop_heuristic`. It never returns to a prompt, nor looks at its logits again. A version
    that does not call it computes all rows: slower, with the same answers.

    Args:
        cache: of `expand_for_beams`; one that cannot drop rows keeps them all.
        mixes: reported the rows that are computed from now on, (k,) indices, where they become fewer.
    """
    if cache is None or not can_keep_rows(cache):
        yield
        return
    forward, check = model.forward, model._check_early_stop_heuristic
    before = dict(vars(model))
    open_rows: torch.Tensor | None = None
    computed: torch.Tensor | None = None

    @functools.wraps(forward)
    def forward_open_rows(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal open_rows, computed
        if open_rows is None:  # the last token of each prompt
            open_rows = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
            computed = torch.arange(len(input_ids), device=input_ids.device)
        elif num_beams == 1:
            open_rows &= input_ids[:, -1] != eos_id
        assert computed is not None
        still = open_rows[computed]
        if 0 < int(still.sum()) <= WORTH_COPYING * len(computed):
            keep_rows(cache, still.nonzero()[:, 0])
            computed = computed[still]
            mixes(computed)
        if len(computed) == len(input_ids):
            return forward(*args, input_ids=input_ids, **kwargs)
        for name in ("attention_mask", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][computed]
        output = forward(*args, input_ids=input_ids[computed], **kwargs)
        logits = output.logits.new_zeros(len(input_ids), *output.logits.shape[1:])
        logits[computed] = output.logits
        output.logits = logits
        return output

    @functools.wraps(check)
    def check_and_note(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal open_rows
        unsatisfied: torch.Tensor = check(*args, **kwargs)
        open_rows = unsatisfied[:, 0].repeat_interleave(num_beams)
        return unsatisfied

    model.forward, model._check_early_stop_heuristic = forward_open_rows, check_and_note
    try:
        yield
    finally:
        for name in ("forward", "_check_early_stop_heuristic"):  # the class has them, unless somebody had replaced them
            vars(model).pop(name)
            vars(model).update({name: before[name]} if name in before else {})
