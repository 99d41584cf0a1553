"""Answers from one batched decoding: every row with its own mix of the two adapters.

The rows of a batch are decoded as each would be alone (fp32): left padding is masked, and a weight
is that of its row. Prompts whose answers are complete leave the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.distributed.world import World
from dpa_ds.inference.decoding_check import Decoding
from dpa_ds.inference.rows import CachedRows, RecomputedRows, Rows
from dpa_ds.inference.search import BeamSearch, GreedySearch, Sampling

WORTH_COPYING = 7 / 8
"""The cache is copied without finished prompts when at most this share of its prompts continues."""


@torch.no_grad()
def generate(
    adapters: AdapterModel,
    prompts: Sequence[Sequence[int]],
    alphas: torch.Tensor,
    config: GenerationConfig,
    pad_id: int,
    end_ids: Sequence[int],
    world: World | None = None,
    streamer: Any = None,
    decoding: Decoding = Decoding.BATCHED,
) -> list[list[int]]:
    """The answer to each prompt, without the end token. The caller bounds the number of prompts.

    Dropout is off afterwards, and the mix is that of the batch: set both again before training.
    Collective where `world` has several ranks: all of the group, each with its own prompts.

    Args:
        prompts: tokens of each, at least one token.
        alphas: (number of prompts,) weight of the local adapter.
        end_ids: tokens each of which ends an answer.
        world: given where ranks may share the base: they compute every token together.
        streamer: a transformers streamer; one prompt and one beam only.
    """
    assert streamer is None or len(prompts) == config.num_beams == 1
    in_step = world is not None and world.world_size > 1
    if streamer is not None:
        streamer.put(torch.tensor([prompts[0]]))
    answers = []
    if decoding is Decoding.BATCHED:
        num_beams, new_tokens = config.num_beams, config.max_new_tokens
        rows = CachedRows(adapters, prompts, alphas, num_beams, new_tokens, pad_id, in_step)
        answers = _search(rows, prompts, config, end_ids, adapters.device, world, streamer)
    else:
        turn = 0
        while not _everywhere(turn >= len(prompts), world):
            index = min(turn, len(prompts) - 1)  # a rank that has no more helps the others with its last
            turn += 1
            one = RecomputedRows(adapters, prompts[index], alphas[index], config.num_beams, in_step)
            answers += _search(one, prompts[index : index + 1], config, end_ids, adapters.device, world, streamer)
    if streamer is not None:
        streamer.end()
    return answers[: len(prompts)]


def describe_decoding(config: GenerationConfig) -> dict[str, str | int]:
    """Settings that decide an answer, for reports. With a temperature there are no beams, and else no sampling."""
    if config.temperature > 0:
        sampling = f"temperature {config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g}"
        return {"sampling": f"{sampling}, seed {config.seed}", "max_new_tokens": config.max_new_tokens}
    return {"beams": config.num_beams, "max_new_tokens": config.max_new_tokens}


def _everywhere(condition: bool, world: World | None) -> bool:
    """Whether `condition` holds on every rank of the group. Collective."""
    return condition if world is None else world.on_all_ranks(condition)


def _search(
    rows: Rows,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    end_ids: Sequence[int],
    device: torch.device,
    world: World | None,
    streamer: Any,
) -> list[list[int]]:
    """The answers to the `prompts`, which `rows` compute. Collective where `world` has several ranks."""
    search = _begin_search(prompts, config, end_ids, device)
    answers = torch.full((len(prompts), config.max_new_tokens), end_ids[0])
    computed = torch.arange(len(prompts))  # the prompts that have rows
    for num_tokens in range(1, config.max_new_tokens + 1):
        tokens, parents = search.advance(rows.logits())
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = search.unfinished.cpu()
        if _everywhere(not unfinished.any(), world) or num_tokens == config.max_new_tokens:
            break
        rows.append(tokens, parents)
        # None may be left on a rank that waits for others. It computes what it has: they gather
        # the base's weights for each token, with its help.
        if 0 < int(unfinished.sum()) <= WORTH_COPYING * len(computed):
            answers[computed, :num_tokens] = search.answers().cpu()
            kept = unfinished.nonzero()[:, 0]
            search.keep(kept.to(device))
            rows.keep(kept.to(device))
            computed = computed[kept]

    answers[computed, :num_tokens] = search.answers().cpu()
    return [_until(end_ids, answer) for answer in answers.tolist()]


def _begin_search(
    prompts: Sequence[Sequence[int]], config: GenerationConfig, end_ids: Sequence[int], device: torch.device
) -> GreedySearch | BeamSearch:
    if config.temperature > 0:
        return Sampling(prompts, config, end_ids, device)
    if config.num_beams == 1:
        return GreedySearch(len(prompts), end_ids, device)
    return BeamSearch(len(prompts), config.num_beams, config.max_new_tokens, end_ids, device)


def _until(end_ids: Sequence[int], tokens: list[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:position]
    return tokens
