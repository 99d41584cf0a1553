"""Prompts to embeddings: the frozen base, alone or with one adapter, read at its last layer."""

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
    """Embeddings of the prompts, (number of prompts, hidden size) fp32 on CPU: the last layer's, after the final norm.

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
    hidden_states: list[torch.Tensor] = []

    def keep_hidden_states(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden_states.append(inputs[0])
        return (inputs[0][:1, :1],)  # nobody needs the logits: one is computed

    rows_of_batches: list[int] = []
    last_tokens: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    # Where the output head gets them: what is before it has other names, and another nesting, in every family.
    with adapters.base_model.get_output_embeddings().register_forward_pre_hook(keep_hidden_states):
        for batch in batches([len(prompt) for prompt in prompts], batch_tokens):
            # Padded on the right and without a mask: the model is causal, no token of a prompt looks there.
            longest = len(prompts[batch[0]])
            ids = torch.full((len(batch), longest), pad_id)
            for row, i in enumerate(batch):
                ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            model(input_ids=ids.to(adapters.device), use_cache=False)
            rows_of_batches += batch
            # Only these two of each row are kept, and they stay on the device until all batches are computed.
            for i, hidden in zip(batch, hidden_states.pop(), strict=True):
                own = hidden[: len(prompts[i])].float()
                last_tokens.append(own[-1])
                means.append(own.mean(dim=0))
    order = torch.tensor(rows_of_batches).argsort()
    return {"last_token": torch.stack(last_tokens).cpu()[order], "mean": torch.stack(means).cpu()[order]}


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` with padding (a single row may exceed it).

    Longest first: a batch that does not fit the memory fails at the start.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    result: list[list[int]] = []
    for row in longest_first:
        if result and lengths[result[-1][0]] * (len(result[-1]) + 1) <= batch_tokens:
            result[-1].append(row)
        else:
            result.append([row])
    return result
