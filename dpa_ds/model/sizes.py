"""How many numbers a model and its adapters have, without its weights."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dpa_ds.config import LoraConfig
from dpa_ds.model.directory import read_config


def count_parameters(directory: Path, lora: LoraConfig) -> tuple[int, int, int]:
    """Parameters of the base, of the global adapter, and of a local adapter.

    Raises:
        ModelError: `config.json` describes no model.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(read_config(directory))
    # A LoRA of rank r on a layer of n inputs and m outputs: A is (r, n), B is (m, r).
    widths = sum(
        sum(module.weight.shape)
        for name, module in base.named_modules()
        if name.rsplit(".", 1)[-1] in lora.target_modules and hasattr(module, "weight")
    )
    num_base = sum(parameter.numel() for parameter in base.parameters())
    return num_base, lora.rank * widths, (lora.local_rank or lora.rank) * widths
