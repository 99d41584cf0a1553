"""The state of one adapter as it is saved, averaged and sent: full fp32 CPU tensors."""

import torch

AdapterState = dict[str, torch.Tensor]
"""Full fp32 CPU tensors of one adapter under PEFT's adapter-less keys: the only thing that crosses
a client border."""


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
