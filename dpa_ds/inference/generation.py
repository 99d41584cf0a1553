"""Answers from one batched `generate`: every row with its own mix of the two adapters.

The rows of a batch are decoded as each would be alone (fp32): left padding is masked, and a weight is that of its row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers import GenerationConfig as TransformersGenerationConfig

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.inference.beam_cache import expand_for_beams
from dpa_ds.inference.unfinished import only_open_rows


@torch.no_grad()
def generate(
    adapters: AdapterModel,
    prompts: Sequence[Sequence[int]],
    alphas: torch.Tensor,
    config: GenerationConfig,
    pad_id: int,
    eos_id: int,
    partitioned: bool = False,
    streamer: Any = None,
) -> list[list[int]]:
    """The answer to each prompt, without the end token. One batch: the caller bounds its size.

    Dropout is off afterwards, and the mix is that of the batch: set both again before training.
    Collective where the base is partitioned (ZeRO-3): all ranks of the group, each with its own prompts.

    Args:
        prompts: tokens of each, at least one token.
        alphas: (number of prompts,) weight of the local adapter.
        partitioned: ranks that are done continue with the others, because each token gathers the weights.
        streamer: a transformers streamer; one prompt and one beam only.
    """
    beams = config.num_beams
    weights = alphas.repeat_interleave(beams).cpu()
    model: Any = adapters.base_model
    model.eval()

    def mix_of(rows: torch.Tensor | slice) -> None:
        index = rows if isinstance(rows, slice) else rows.cpu()
        # Ranks of a partitioned base have other weights, and gather the weights of both adapters.
        adapters.set_mix(global_local_mix(weights[index]), compute_all=partitioned)

    # Ranks of a partitioned base run the same passes: one that has prompts of one token only computes padding ahead.
    ids, mask = _padded_left(prompts, pad_id, 2 if partitioned else 1, adapters.device)
    cache = None
    if ids.shape[1] > 1:
        mix_of(slice(None, None, beams))
        cache = _compute_prompts(adapters, ids[:, :-1], mask[:, :-1])
        expand_for_beams(cache, beams, config.max_new_tokens)
    mix_of(slice(None))
    decoding = TransformersGenerationConfig(
        do_sample=False,
        num_beams=beams,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        use_cache=True,
    )

    # Ranks of a partitioned base gather weights together: each computes its rows until all are done.
    with only_open_rows(model, None if partitioned else cache, beams, eos_id, mix_of):
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=decoding,
            synced_gpus=partitioned,
            streamer=streamer,
        )
    return [_until(eos_id, row) for row in tokens[:, ids.shape[1] :].tolist()]


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


def _compute_prompts(adapters: AdapterModel, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
    """Keys and values of the prompts, once each: generate() would compute a copy for each beam. (n, longest - 1) each."""
    model: Any = adapters.base_model
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **adapters.one_logit,
    )
    return cache


def _until(eos_id: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
