"""Prompts to states: the frozen base, alone or with one adapter, read at its last layer."""

from collections.abc import Sequence

import torch

from dpa_ds.adapters import methods
from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.config.schema import Encoder
from dpa_ds.data.references import Embeddings


@torch.no_grad()
def embed(
    adapters: AdapterModel, encoder: Encoder, prompts: Sequence[Sequence[int]], pad_id: int, batch_tokens: int
) -> Embeddings:
    """State of each prompt, (number of prompts, hidden size) fp32 on CPU: the last layer's, after the final norm.

    Dropout is off afterwards, and the mix is `encoder`'s: set both again before training.
    Collective under ZeRO-3: all ranks of the group, same prompts.

    Args:
        encoder: adapter that is active at full strength.
        prompts: tokens of each, at least one.
        batch_tokens: upper bound on rows x longest row of a forward pass (a single row may exceed it).
    """
    model = adapters.peft_model
    match encoder:
        case "none":
            adapters.set_mix(adapters.no_mix)
        case methods.GLOBAL:
            adapters.set_mix(global_local_mix(0.0))
        case methods.LOCAL:
            adapters.set_mix(global_local_mix(1.0))
    model.eval()
    # Through the whole model, not its inner part: ZeRO-3 resets its prefetching at the outermost module.
    last: list[torch.Tensor] = []
    states: list[dict[str, torch.Tensor]] = [{}] * len(prompts)
    with adapters.base_model.base_model.register_forward_hook(lambda *call: last.append(call[-1].last_hidden_state)):
        for rows in batches([len(prompt) for prompt in prompts], batch_tokens):
            # Padded on the right and without a mask: the model is causal, no token of a prompt looks there.
            lengths = torch.tensor([len(prompts[row]) for row in rows])
            ids = torch.full((len(rows), int(lengths.max())), pad_id)
            for i, row in enumerate(rows):
                ids[i, : lengths[i]] = torch.tensor(prompts[row])
            model(input_ids=ids.to(adapters.device), use_cache=False, **adapters.one_logit)
            for row, hidden, length in zip(rows, last.pop().float().cpu(), lengths.tolist(), strict=True):
                states[row] = {"last_token": hidden[length - 1], "mean": hidden[:length].mean(dim=0)}
    return {
        "last_token": torch.stack([s["last_token"] for s in states]),
        "mean": torch.stack([s["mean"] for s in states]),
    }


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` with padding (a single row may exceed it).

    Longest first: a batch that does not fit the memory fails at the start.
    """
    result: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if result and lengths[result[-1][0]] * (len(result[-1]) + 1) <= batch_tokens:
            result[-1].append(row)
        else:
            result.append([row])
    return result
