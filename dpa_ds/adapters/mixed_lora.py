"""A LoRA layer that computes all active adapters as one low-rank product.

PEFT's own layer (0.21) computes each adapter for itself: A, B, scaling and sum, the last two in passes over
(tokens, out_features). They cost more than the arithmetic, which is memory-bound. Here the A lie below one another, the B side by side:

    h = W0 x + [B_g B_l] diag(weights) [A_g; A_l] x

PEFT makes it by its documented way to register modules of one's own ("dynamic dispatch of custom modules").
"""

from collections.abc import Mapping
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners import lora
from transformers.pytorch_utils import Conv1D


class MixedLora(lora.Linear):
    """`peft.tuners.lora.Linear` with another forward pass; neither merging nor PEFT's mixed batches are for it."""

    def mix(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Have the adapters in `weights` take part, each times its weight: fp32, () or one per instance, (batch, 1, 1)."""
        self._active_adapter = list(weights)  # set_adapter() would switch requires_grad as well
        rows = [weight.expand(*weight.shape[:-1], self.r[name]) for name, weight in weights.items()]
        self._weights = torch.cat(rows, dim=-1) if rows else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x of shape (..., in_features) -> (..., out_features)."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        names = self._active_adapter
        if self._weights is None:
            return result
        rows = [_weight(self.lora_A[name]) for name in names]
        if self.training and isinstance(self.lora_dropout[names[0]], torch.nn.Dropout):  # each drops inputs of its own
            inputs = (self.lora_dropout[name](x) for name in names)
            low = torch.cat([F.linear(one, a) for one, a in zip(inputs, rows, strict=True)], dim=-1)
        else:
            low = F.linear(x, _cat(rows, 0))
        low = (low * self._weights).to(low.dtype)
        columns = _cat([_weight(self.lora_B[name]) for name in names], 1)
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), columns.T).view_as(result)

    def adapter_weights(self) -> list[torch.Tensor]:
        """A and B of every adapter, which belong to modules that the forward pass does not call."""
        return [_weight(half[name]) for name in self.lora_A for half in (self.lora_A, self.lora_B)]


def with_mixed_layers(config: peft.LoraConfig) -> peft.LoraConfig:
    """`config`, made to place `MixedLora` on linear layers."""
    config._register_custom_module({torch.nn.Linear: MixedLora, Conv1D: MixedLora})
    return config


def _weight(linear: torch.nn.Module) -> torch.Tensor:
    assert isinstance(linear, torch.nn.Linear)
    return linear.weight


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
