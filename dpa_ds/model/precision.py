"""In which precision a base is computed: what a device can, and what it does natively."""

import logging

import torch

from dpa_ds.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def native_precision(device_type: str) -> str:
    """What `model.precision: auto` means on a device: bf16 where it has instructions for it, else fp32.

    fp16 is no answer: it needs loss scaling, and its range is too small for some models.
    """
    match device_type:
        case "cpu":
            is_native = _cpu_computes_bf16()
        case "cuda":
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        case _:
            is_native = True
    return "bf16" if is_native else "fp32"


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device lacks, and warn of one that it only emulates.

    Raises:
        ConfigError: the device cannot compute in it.
    """
    supported = _supported_precisions(device)
    if precision not in supported:
        raise ConfigError(f"model.precision {precision} is not supported on {device.type}: use {supported}")
    if precision == "bf16" and device.type == "cpu" and not _cpu_computes_bf16():
        logger.warning("model.precision bf16 is emulated on this CPU, and slower than fp32: consider fp32, or auto")


def _supported_precisions(device: torch.device) -> list[str]:
    """Those that `device` computes in: what DeepSpeed's accelerators answer (0.19.8), asked of torch."""
    match device.type:
        case "cpu":
            bf16 = True
            mkldnn = torch.ops.mkldnn
            fp16 = hasattr(mkldnn, "_is_mkldnn_fp16_supported") and bool(mkldnn._is_mkldnn_fp16_supported())
        case "cuda":
            bf16 = torch.cuda.is_bf16_supported()
            fp16 = torch.cuda.get_device_capability(device) >= (7, 0)
        case _:
            bf16 = fp16 = True
    works = {"fp32": True, "bf16": bf16, "fp16": fp16}
    return [name for name in DTYPES if works[name]]


def _cpu_computes_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
