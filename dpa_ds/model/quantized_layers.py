"""Linear layers whose frozen weights have 8 or 4 bits: bitsandbytes' numbers, in an arithmetic that depends on no
neighbour. Needs bitsandbytes.

bitsandbytes' own layers (0.50) compute in several ways: in 8 bits a GPU quantises the inputs too, and takes columns out
that are large in any row, so that an example's loss depends on what shares its micro-batch; a CPU does so in evaluation
alone. In 4 bits a CPU with bf16 instructions turns the weights into another format at the first evaluation, with scales
rounded to bf16, and trains on with those. Here a weight is what its codes and scales say, always.
"""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from transformers import PreTrainedModel

from dpa_ds.errors import ModelError


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer in 8 bits, a scale for each output: W = codes * scales / 127."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take over `codes`, int8 of shape (out_features, in_features), and `scales`, fp32 of shape (out_features,)."""
        torch.nn.Module.__init__(self)  # not Linear's, which would draw a weight
        self.out_features, self.in_features = codes.shape
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., in_features) -> (..., out_features), in the precision of x."""
        result: torch.Tensor = _Int8Product.apply(x, self.weight, self.scales)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias


class _Int8Product(torch.autograd.Function):
    """x W^T, where only the codes are kept for the backward pass: the weight itself exists twice for a moment."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, _dequantized(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient @ _dequantized(codes, scales, gradient.dtype), None, None


def _dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # As bitsandbytes' MatMul8bitFp computes it, so that both give the same bits.
    return codes.to(dtype).mul_(scales[:, None] * (1.0 / 127.0))


def settle_layers(model: PreTrainedModel) -> int:
    """Have every quantised layer of `model` compute as this module says; how many there are.

    Raises:
        ModelError: the scales of a weight are not finite.
    """
    layers: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        if isinstance(module, Linear8bitLt | Linear4bit):
            layers.append((path, module))
    for path, layer in layers:
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # by which it decides to convert itself
        else:
            model.set_submodule(path, Int8Linear(layer.weight.data, layer.weight.SCB, layer.bias))
        _check_scales(path, _scales(layer.weight))
    return len(layers)


def _scales(weight: Any) -> torch.Tensor:
    scales: torch.Tensor = weight.quant_state.absmax if hasattr(weight, "quant_state") else weight.SCB
    return scales


def _check_scales(path: str, scales: torch.Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(
            f"the weight of {path!r} of the base model has NaN or infinity, or numbers that 8 bits do not reach (above "
            "65504): download it again, or choose another model.quantization"
        )
