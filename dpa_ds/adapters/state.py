"""The state of one adapter as it is saved, averaged and sent: full fp32 CPU tensors."""

from collections.abc import Mapping

import torch

AdapterState = dict[str, torch.Tensor]
"""Full fp32 CPU tensors of one adapter under PEFT's adapter-less keys: the only thing that crosses
a client border."""


Shapes = dict[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state beside its step count, by torch's names."""


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Names and shapes of tensors."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def optimizer_shapes(adapter: Shapes) -> Shapes:
    """Names and shapes of AdamW's state of an adapter, as the engine gives it."""
    shapes: Shapes = {"step": (1,)}
    for moment in MOMENTS:
        for key, shape in adapter.items():
            shapes[f"{moment}.{key}"] = shape
    return shapes


def check_tensors(state: AdapterState, expected: Shapes) -> None:
    """Raise ValueError unless `state` has the names and shapes expected, in fp32, and all its numbers are finite."""
    found = shapes_of(state)
    for key in (*expected, *found):
        if found.get(key) != expected.get(key):
            raise ValueError(f"{key} of shape {found.get(key, 'none')}, expected {expected.get(key, 'none')}")
        if state[key].dtype != torch.float32:
            raise ValueError(f"{key} of {state[key].dtype}, expected torch.float32")
        if not bool(state[key].isfinite().all()):
            raise ValueError(f"NaN or infinity in {key}")


def flatten(state: AdapterState) -> torch.Tensor:
    """One flat fp32 vector, keys in sorted order, shape (number of parameters,)."""
    return torch.cat([state[key].reshape(-1) for key in sorted(state)])


def unflatten(flat: torch.Tensor, like: AdapterState) -> AdapterState:
    """Inverse of `flatten`, with keys and shapes of `like`; the tensors are views of `flat`."""
    state, offset = {}, 0
    for key in sorted(like):
        numel = like[key].numel()
        state[key] = flat[offset : offset + numel].view(like[key].shape)
        offset += numel
    return state


def untrained_layers(state: AdapterState) -> list[str]:
    """Layers whose B is still zero: the first step already changes it, unless its gradient is zero."""
    end = ".lora_B.weight"
    untrained = [key.removesuffix(end) for key in state if key.endswith(end) and not state[key].any()]
    return [name.removeprefix("base_model.model.") for name in untrained]
