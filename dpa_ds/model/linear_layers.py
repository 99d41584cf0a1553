"""What of a base can have adapters: its linear layers, and the experts that it keeps in one parameter."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpa_ds.config.schema import ALL_LINEAR, LoraConfig
from dpa_ds.errors import ModelError

_NOT_CALLED = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj",))
"""Model type -> linear layers that PEFT (0.21) refuses: the model may read their weights without calling them."""


@dataclass(frozen=True)
class Targets:
    """What PEFT is asked to adapt."""

    modules: list[str] | str
    """Names of linear layers, or all-linear."""
    parameters: list[str]
    """Names of parameters of three dimensions: (experts, ., .)."""
    excluded: list[str]
    """Names of linear layers that all-linear leaves out."""


def find_targets(base: PreTrainedModel, config: LoraConfig) -> Targets:
    """What `lora.target_modules` means for this model. A name of linear layers means these, else it means experts.

    Raises:
        ModelError: it names what the model lacks.
    """
    if config.target_modules == ALL_LINEAR:
        return Targets(ALL_LINEAR, [], list(_NOT_CALLED.get(base.config.model_type, ())))
    layers, experts = linear_layers(base), expert_parameters(base)
    modules, parameters, missing = [], [], []
    for target in config.target_modules:
        if any(is_named(path, target) for path in layers):
            modules.append(target)
        elif any(is_named(path, target) for path in experts):
            parameters.append(target)
        else:
            missing.append(target)
    if missing:
        raise ModelError(_describe_missing(base, missing, layers, experts))
    return Targets(modules, parameters, [])


def linear_layers(base: PreTrainedModel) -> list[str]:
    """Paths of all linear layers in the model; GPT-2's Conv1D is one."""
    return [path for path, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]


def expert_parameters(base: PreTrainedModel) -> list[str]:
    """Paths of the parameters that hold a matrix for each expert."""
    found = []
    for path, module in base.named_modules():
        if type(module).__module__.startswith("torch.nn."):  # a convolution's weight has three dimensions, too
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if len(getattr(parameter, "ds_shape", parameter.shape)) == 3:
                found.append(f"{path}.{name}")
    return found


def is_named(path: str, target: str) -> bool:
    """Whether `target` is the end of `path`, of whole names."""
    return f".{path}".endswith(f".{target}")


def _describe_missing(base: PreTrainedModel, missing: list[str], layers: Iterable[str], experts: Iterable[str]) -> str:
    message = f"lora.target_modules {missing} are not linear layers of {type(base).__name__}; "
    if ALL_LINEAR in missing:
        return message + f"for all that it has write lora.target_modules: {ALL_LINEAR}, without brackets"
    message += f"it has {sorted({path.rsplit('.', 1)[-1] for path in layers})}"
    # With the name before it: down_proj alone may name linear layers, too.
    of_experts = sorted({".".join(path.split(".")[-2:]) for path in experts})
    if of_experts:
        message += f", and experts in one parameter {of_experts}"
    return message
