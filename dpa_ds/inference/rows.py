"""What decoding computes: the logits of the next token of every row, as rows grow and prompts leave.

A row is one beam of one prompt; the rows of a prompt are neighbours.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.inference.beam_cache import expand_for_beams, keep_rows


class Rows(Protocol):
    """Rows of a batch of prompts."""

    def logits(self) -> torch.Tensor:
        """Logits of the last token of every row, (rows, vocabulary)."""

    def append(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """Give each row its token, and with `parents` all that the row `parents[i]` had before."""

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop the rows of all prompts but these, (k,) indices."""


class CachedRows:
    """Prompts together: padded on the left, with a cache of what was computed.

    Args:
        alphas: (number of prompts,) weight of the local adapter.
        in_step: ranks divide the base, and run the same passes.
    """

    def __init__(
        self,
        adapters: AdapterModel,
        prompts: Sequence[Sequence[int]],
        alphas: torch.Tensor,
        num_beams: int,
        max_new_tokens: int,
        pad_id: int,
        in_step: bool,
    ) -> None:
        self._adapters = adapters
        self._model: Any = adapters.base_model
        self._model.eval()
        self._num_beams = num_beams
        self._in_step = in_step
        # Ranks in step run the same passes: one whose prompts have one token only computes padding ahead.
        ids, mask = _padded_left(prompts, pad_id, 2 if in_step else 1, adapters.device)
        self._width = ids.shape[1]
        self._cache = DynamicCache(config=self._model.config)
        if self._width > 1:
            # All but the last token, once for each prompt and not for each beam.
            self._set_mix(alphas)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            self._forward(ids[:, :-1], mask[:, :-1], positions[:, :-1])
            expand_for_beams(self._cache, len(ids), self._num_beams, max_new_tokens)
        self._tokens = ids[:, -1].repeat_interleave(self._num_beams)
        self._positions = mask.sum(dim=1).repeat_interleave(self._num_beams) - 1
        mask = F.pad(mask, (0, max_new_tokens), value=1)
        self._mask = mask.repeat_interleave(self._num_beams, dim=0)
        self._alphas = alphas.repeat_interleave(self._num_beams)
        self._set_mix(self._alphas)

    def logits(self) -> torch.Tensor:
        """See `Rows`."""
        return self._forward(self._tokens[:, None], self._mask[:, : self._width], self._positions[:, None])

    def append(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """See `Rows`."""
        self._tokens = tokens
        self._positions += 1
        self._width += 1
        if parents is not None:
            self._cache.reorder_cache(parents)  # type: ignore[arg-type]

    def keep(self, prompts: torch.Tensor) -> None:
        """See `Rows`."""
        beams = torch.arange(self._num_beams, device=prompts.device)
        kept = (self._num_beams * prompts[:, None] + beams).flatten()
        keep_rows(self._cache, kept)
        self._tokens = self._tokens[kept]
        self._positions = self._positions[kept]
        self._mask = self._mask[kept]
        self._alphas = self._alphas[kept.cpu()]
        self._set_mix(self._alphas)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the last token, (rows, vocabulary). Keys and values of all `ids` are cached."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._adapters.one_logit,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _set_mix(self, alphas: torch.Tensor) -> None:
        """Mix the adapters by row. Ranks in step, whose weights differ, gather both adapters together."""
        self._adapters.set_mix(global_local_mix(alphas), compute_all=self._in_step)


class RecomputedRows:
    """One prompt, all of which is computed again for each new token: nothing is padded or kept.

    Args:
        alpha: weight of the local adapter.
    """

    def __init__(
        self, adapters: AdapterModel, prompt: Sequence[int], alpha: torch.Tensor, num_beams: int, in_step: bool
    ) -> None:
        self._adapters = adapters
        adapters.base_model.eval()
        # One weight for all rows, so that it fits layers of any input.
        adapters.set_mix(global_local_mix(alpha), compute_all=in_step)
        self._ids = torch.tensor([list(prompt)] * num_beams, device=adapters.device)

    def logits(self) -> torch.Tensor:
        """See `Rows`."""
        output = self._adapters.base_model(input_ids=self._ids, use_cache=False, **self._adapters.one_logit)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def append(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """See `Rows`."""
        before = self._ids if parents is None else self._ids[parents]
        self._ids = torch.cat([before, tokens[:, None]], dim=1)

    def keep(self, prompts: torch.Tensor) -> None:
        """See `Rows`: there is one prompt."""


def _padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int, shortest: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (prompts, longest) each, at least `shortest` wide."""
    longest = max(shortest, *map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
