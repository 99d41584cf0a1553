"""Answers from one batched decoding: every row with its own mix of the two adapters.

The rows of a batch are decoded as each would be alone (fp32): left padding is masked, and a weight
is that of its row. Prompts whose answers are complete leave the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.distributed.world import World
from dpa_ds.inference.beam_cache import expand_for_beams, keep_rows
from dpa_ds.inference.search import BeamSearch, GreedySearch

WORTH_COPYING = 7 / 8
"""The cache is copied without finished prompts when at most this share of its prompts continues."""


@torch.no_grad()
def generate(
    adapters: AdapterModel,
    prompts: Sequence[Sequence[int]],
    alphas: torch.Tensor,
    config: GenerationConfig,
    pad_id: int,
    eos_id: int,
    world: World | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """The answer to each prompt, without the end token. One batch: the caller bounds its size.

    Dropout is off afterwards, and the mix is that of the batch: set both again before training.
    Collective where `world` has several ranks: all of the group, each with its own prompts.

    Args:
        prompts: tokens of each, at least one token.
        alphas: (number of prompts,) weight of the local adapter.
        world: given where ranks may share the base: they compute every token together.
        streamer: a transformers streamer; one prompt and one beam only.
    """
    assert streamer is None or len(prompts) == config.num_beams == 1
    in_step = world is not None and world.world_size > 1
    rows = _Rows(adapters, prompts, alphas, config, pad_id, in_step)
    search = _begin_search(len(prompts), config, eos_id, adapters.device)
    answers = torch.full((len(prompts), config.max_new_tokens), eos_id)
    computed = torch.arange(len(prompts))  # the prompts that have rows
    if streamer is not None:
        streamer.put(torch.tensor([prompts[0]]))

    for num_tokens in range(1, config.max_new_tokens + 1):
        tokens, parents = search.advance(rows.logits())
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = search.unfinished.cpu()
        done = not unfinished.any()
        if world is not None:
            done = world.on_all_ranks(done)
        if done or num_tokens == config.max_new_tokens:
            break
        rows.append(tokens, parents)
        # None may be left on a rank that waits for others. It computes what it has: they gather
        # the base's weights for each token, with its help.
        if 0 < int(unfinished.sum()) <= WORTH_COPYING * len(computed):
            answers[computed, :num_tokens] = search.answers().cpu()
            kept = unfinished.nonzero()[:, 0]
            search.keep(kept.to(adapters.device))
            rows.keep(kept.to(adapters.device))
            computed = computed[kept]

    answers[computed, :num_tokens] = search.answers().cpu()
    if streamer is not None:
        streamer.end()
    return [_until(eos_id, answer) for answer in answers.tolist()]


def _begin_search(
    num_prompts: int, config: GenerationConfig, eos_id: int, device: torch.device
) -> GreedySearch | BeamSearch:
    if config.num_beams == 1:
        return GreedySearch(num_prompts, eos_id, device)
    return BeamSearch(num_prompts, config.num_beams, config.max_new_tokens, eos_id, device)


class _Rows:
    """What the model computes: a row for each beam of each prompt; a prompt's rows are neighbours."""

    def __init__(
        self,
        adapters: AdapterModel,
        prompts: Sequence[Sequence[int]],
        alphas: torch.Tensor,
        config: GenerationConfig,
        pad_id: int,
        in_step: bool,
    ) -> None:
        self._adapters = adapters
        self._model: Any = adapters.base_model
        self._model.eval()
        self._num_beams = config.num_beams
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
            expand_for_beams(self._cache, self._num_beams, config.max_new_tokens)
        self._tokens = ids[:, -1].repeat_interleave(self._num_beams)
        self._positions = mask.sum(dim=1).repeat_interleave(self._num_beams) - 1
        mask = F.pad(mask, (0, config.max_new_tokens), value=1)
        self._mask = mask.repeat_interleave(self._num_beams, dim=0)
        self._alphas = alphas.repeat_interleave(self._num_beams)
        self._set_mix(self._alphas)

    def logits(self) -> torch.Tensor:
        """Logits of the last token of every row, (rows, vocabulary)."""
        return self._forward(self._tokens[:, None], self._mask[:, : self._width], self._positions[:, None])

    def append(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> None:
        """Give each row its token, and with `parents` all that the row `parents[i]` had before."""
        self._tokens = tokens
        self._positions += 1
        self._width += 1
        if parents is not None:
            self._cache.reorder_cache(parents)  # type: ignore[arg-type]

    def keep(self, prompts: torch.Tensor) -> None:
        """Drop the rows of all prompts but these, (k,) indices."""
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


def _until(eos_id: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
