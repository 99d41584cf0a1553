"""A LoRA layer that computes all active adapters as one low-rank product.

PEFT's own layer (0.21) computes each adapter for itself: A, B, scaling and sum, the last two in
passes over (tokens, out_features). They cost more than the arithmetic, which is memory-bound. Here
the A are stacked in rows, the B in columns:

    h = W0 x + [B_1 B_2 ...] diag(weights) [A_1; A_2; ...] x

PEFT makes it by its documented way to register modules of one's own ("dynamic dispatch of custom
modules").
"""

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper
from transformers.pytorch_utils import Conv1D

_16_BIT = (torch.bfloat16, torch.float16)


class MixedLora(lora.Linear):
    """`peft.tuners.lora.Linear` with another forward pass; neither merging nor PEFT's mixed batches are for it."""

    def mix(self, names: Sequence[str], weights: torch.Tensor) -> None:
        """Have the adapters `names` take part; with none the frozen layer answers alone.

        Args:
            weights: fp32 on the layer's device, shape (batch or 1, 1, sum of the adapters' ranks):
                an adapter's weight stands once for each of its ranks.
        """
        self._active_adapter = list(names)  # set_adapter() would switch requires_grad as well
        self._weights = weights
        self.forget_stacked()

    def forget_stacked(self) -> None:
        """The weights of an adapter have changed: what was stacked of them is no longer true."""
        self._stacked: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x of shape (..., in_features) -> (..., out_features)."""
        names = self._active_adapter
        if not names:
            return torch.as_tensor(self.base_layer(x, *args, **kwargs))
        frozen = self._frozen_matrix() if x.dtype in _16_BIT else None
        if frozen is not None:
            return self._rounded_once(x, frozen, *self._low_rank(x, names))
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        low, stacked_b = self._low_rank(x, names)
        # One pass over (tokens, out_features) adds the product to the frozen layer's output.
        flat = result.flatten(0, -2)
        if torch.is_grad_enabled():
            flat = torch.addmm(flat, low.flatten(0, -2), stacked_b.T)
        else:  # over it: torch.addmm would copy it first, which is one launch more for each layer and token
            flat.addmm_(low.flatten(0, -2), stacked_b.T)
        return flat.view_as(result)

    def _low_rank(self, x: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(weights) A x of shape (..., ranks), and B of shape (out_features, ranks), of all `names` together."""
        if self._drops_inputs(names[0]):
            # Each adapter drops inputs of its own, as PEFT's layers do: there is no common input to multiply.
            products = [F.linear(self.lora_dropout[name](x), _weight(self.lora_A[name])) for name in names]
            low = torch.cat(products, dim=-1)
            stacked_b = _cat([_weight(self.lora_B[name]) for name in names], dim=1)
        else:
            stacked_a, stacked_b = self._stack(names)
            low = F.linear(x, stacked_a)
        # Weighted in fp32, since the weights are: in bf16 a weight would be rounded to 8 bits. In place, so that the
        # product is rounded to 16 bits as it is written, and not by a pass of its own.
        low.mul_(self._weights_for(x))
        return low, stacked_b

    def _frozen_matrix(self) -> torch.Tensor | None:
        """W0, shape (in_features, out_features); None where the frozen layer computes by more than this matrix."""
        # Not their subclasses, such as those of quantised layers, which have a forward pass of their own.
        layer = self.base_layer
        if type(layer) is torch.nn.Linear:
            return layer.weight.T
        return layer.weight if type(layer) is Conv1D else None

    def _rounded_once(
        self, x: torch.Tensor, frozen: torch.Tensor, low: torch.Tensor, stacked_b: torch.Tensor
    ) -> torch.Tensor:
        """The layer in 16 bit: (..., in_features) -> (..., out_features).

        A young adapter's product is a thousandth of the frozen layer's output, less than the last bit that bf16 keeps
        of it. Added to an output that was rounded already, most of it would be lost (PEFT 0.21 does so). Here W0 x is
        added to the product while it still has 32 bits, and the sum is rounded once.
        """
        flat = torch.mm(low.flatten(0, -2), stacked_b.T).addmm_(x.flatten(0, -2), frozen)
        bias: torch.Tensor | None = getattr(self.base_layer, "bias", None)
        if bias is not None:
            flat.add_(bias)
        return flat.view(*x.shape[:-1], -1)

    def _weights_for(self, x: torch.Tensor) -> torch.Tensor:
        """The weights, (batch or 1, 1, ranks), in a shape that multiplies A x: (..., ranks).

        Most layers get (batch, seq_len, in_features). DeepSeek's `kv_b_proj` gets one dimension more; the layers of
        experts get the tokens of all rows in one dimension, (batch * seq_len, in_features).
        """
        if x.dim() == 3:
            return self._weights
        by_row = self._weights[:, 0]
        if x.dim() == 2:
            return by_row.repeat_interleave(len(x) // len(by_row), dim=0)
        return by_row.view(len(by_row), *[1] * (x.dim() - 2), by_row.shape[-1])

    def _stack(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """All A in rows and all B in columns; while nothing trains, stacked once and not for every token."""
        if self._stacked is not None and not torch.is_grad_enabled():
            return self._stacked
        stacked = (
            _cat([_weight(self.lora_A[name]) for name in names], dim=0),
            _cat([_weight(self.lora_B[name]) for name in names], dim=1),
        )
        # Kept where weights stay: not in training, and not under ZeRO-3, which empties them after each layer.
        self._stacked = None
        if not torch.is_grad_enabled() and not hasattr(_weight(self.lora_A[names[0]]), "ds_id"):
            self._stacked = stacked
        return stacked

    def uncalled_weights(self) -> list[torch.Tensor]:
        """What the forward pass reads of modules that it does not call: A and B of every adapter, the frozen layer."""
        weights: list[torch.Tensor] = list(self.base_layer.parameters(recurse=False))
        for name in self.lora_A:
            weights += [_weight(self.lora_A[name]), _weight(self.lora_B[name])]
        return weights

    def _drops_inputs(self, name: str) -> bool:
        return self.training and isinstance(self.lora_dropout[name], torch.nn.Dropout)


class MixedParameter:
    """The adapters of a parameter that its module reads itself, such as all experts of a layer of Mixtral.

    PEFT (0.21) adds scaling * B A of each active adapter to the parameter while the module runs. So all rows of a pass
    have one mix.
    """

    def __init__(self, wrapper: ParamWrapper) -> None:
        self._wrapper = wrapper

    def mix(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Have these adapters take part, with weights of shape (batch or 1,) on the CPU.

        Raises:
            NotImplementedError: rows have weights of their own.
        """
        self._wrapper._active_adapter = list(weights)  # set_adapter() would switch requires_grad as well
        for name, of_rows in weights.items():
            if not bool((of_rows == of_rows[0]).all()):
                raise NotImplementedError("experts in one parameter have one mix for all rows")
            self._wrapper.scaling[name] = float(of_rows[0])


def with_mixed_layers(config: peft.LoraConfig) -> peft.LoraConfig:
    """`config`, made to place `MixedLora` on linear layers."""
    config._register_custom_module({torch.nn.Linear: MixedLora, Conv1D: MixedLora})
    return config


def _weight(linear: torch.nn.Module) -> torch.Tensor:
    assert isinstance(linear, torch.nn.Linear)
    return linear.weight


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    if len(tensors) == 1:  # torch.cat would copy it
        return tensors[0]
    return torch.cat(tensors, dim)
