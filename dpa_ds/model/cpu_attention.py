"""On a CPU, attention of a base in 16 bit is computed in fp32.

torch's flash attention for CPUs (2.13) has a backward pass in bf16 that takes 1.5 to 3 times as long as the one in fp32
on short rows, with the same arithmetic: it is the one part of a training step that bf16 makes slower. Keys, queries and
values have few elements beside what the linear layers read, so converting them costs little; the softmax also keeps
more bits.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' scaled dot-product attention: (batch, heads, seq_len, head_dim) -> (batch, seq_len, heads, ...)."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
    return output.to(query.dtype), None


def compute_attention_in_fp32() -> None:
    """Have every model of this process that asks transformers for `sdpa` use the function of this file."""
    AttentionInterface.register("sdpa", sdpa)
