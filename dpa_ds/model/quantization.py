"""A base in 8 or 4 bits: what a model directory already is, what the recipe asks for, and who refuses it."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from dpa_ds.config.deepspeed_json import check_stage
from dpa_ds.config.extras import require
from dpa_ds.errors import ModelError
from dpa_ds.model.directory import read_config

BLOCK = 64
"""Weights of 4 bits that share a scale."""
TRAINABLE = ("int8", "nf4", "fp4")
"""What bitsandbytes stores, and adapters are trained on."""
FP8 = "fp8"
"""The fine-grained one (DeepSeek, Qwen): de-quantised to model.precision as it is loaded."""
PACKAGES = {
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "eetq": "eetq",
    "fbgemm_fp8": "fbgemm-gpu",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "mxfp4": "kernels",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
"""quant_method of a config.json -> the package whose layers transformers would load."""


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """How the files of a model are quantised: int8, nf4, fp4 or the name of another method; None: not at all."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    fields = found if isinstance(found, dict) else found.to_dict()
    method = str(fields.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in fields else "unknown"))
    if not method.startswith("bitsandbytes"):
        return method
    if not fields.get("load_in_4bit"):
        return "int8"
    return str(fields.get("bnb_4bit_quant_type", "fp4"))


def check_quantization(wanted: str, directory: Path, stage: int = 0) -> str | None:
    """Raise unless the base can be had as `model.quantization` says; the kind of its linear layers, None: plain ones.

    Args:
        stage: ZeRO stage of the base.

    Raises:
        ConfigError: the package is missing, or ZeRO-3 is to divide the base.
        ModelError: the files are quantised in another way, or in one that is not trained on.
    """
    stored = stored_quantization(read_config(directory))
    if stored is not None and stored not in (*TRAINABLE, FP8):
        raise ModelError(_describe_other(directory, stored))
    if stored is not None and wanted not in ("none", stored):
        raise ModelError(
            f"model.quantization is {wanted}, but {directory}/config.json says that the files are {stored}: set "
            "model.quantization: none to use them as they are, or give the model in 16 bits"
        )
    if stored == FP8 and stage == 3:
        raise ModelError(
            f"{directory}/config.json says that the files are quantised by fp8, and loading under ZeRO-3 does not take "
            "codes and scales apart: use a ds_configs/ file below stage 3, or the model in 16 bits"
        )
    kind = stored or wanted
    if kind in ("none", FP8):
        return None
    check_stage(kind, stage)
    require("quantization", f"a base in {kind} (model.quantization)")
    return kind


def base_bytes(directory: Path, dtype: torch.dtype, kind: str | None) -> int:
    """Bytes of the base on a rank that holds it whole; reads no weights.

    A code of 8 or 4 bits for each weight of a linear layer but the output head; a scale in fp32 for each row (int8), or
    for each 64 weights. All else has `dtype`, and so have the experts that a model keeps in one parameter.
    """
    with torch.device("meta"):  # shapes without memory
        base = AutoModelForCausalLM.from_config(read_config(directory), trust_remote_code=False)
    num_bytes: int = sum(parameter.numel() for parameter in base.parameters()) * dtype.itemsize
    if kind is None:
        return num_bytes
    head = base.get_output_embeddings()
    for module in base.modules():
        if module is head or type(module) not in (torch.nn.Linear, Conv1D):
            continue
        codes = module.weight.numel()
        num_bytes -= codes * dtype.itemsize
        if kind == "int8":
            num_bytes += codes + 4 * module.weight.shape[-1 if isinstance(module, Conv1D) else 0]
        else:
            num_bytes += codes // 2 + 4 * -(-codes // BLOCK)
    return num_bytes


def bitsandbytes_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is asked for: the output head and the embedding stay in `dtype`, as is its default."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def _describe_other(directory: Path, method: str) -> str:
    described = f"{directory}/config.json says that the files are quantised by {method}"
    remedy = "give the model in 16 bits, and set model.quantization: int8 or nf4 to have it small"
    package = PACKAGES.get(method)
    if package is not None and importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"{described}, which needs the package {package} to be read at all; {remedy}"
    return f"{described}, on whose layers adapters were never trained here; {remedy}"
