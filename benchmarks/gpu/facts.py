"""What this machine is: versions, the card, whether torch has varlen attention, and NCCL in a world of one."""

import argparse
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.gpu.results import Results

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "numpy", "pydantic", "triton", "flash-attn")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    results = Results(args.results, "facts")
    versions = {name: installed_version(name) for name in PACKAGES}
    results.put("versions", python=platform.python_version(), cuda=torch.version.cuda, **versions)
    results.put("card", **describe_card())
    results.put("attention", varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None)
    backend = "gloo" if args.dry else "nccl"
    results.put("world of one", backend=backend, all_reduced=all_reduce_alone(backend))


def installed_version(name: str) -> str | None:
    """None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_card() -> dict[str, Any]:
    """Name and memory of the GPU, and the accelerator that DeepSpeed chose."""
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if not torch.cuda.is_available():
        return {"card": None, "memory_gb": None, "deepspeed_accelerator": accelerator}
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "card": torch.cuda.get_device_name(),
        "memory_gb": round(memory / 1e9, 2),
        "deepspeed_accelerator": accelerator,
    }


def all_reduce_alone(backend: str) -> list[float]:
    """[1, 1], summed over a world of one: a broken NCCL fails here, and not in the middle of a run."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(2, device="cpu" if backend == "gloo" else "cuda")
    dist.all_reduce(ones)
    dist.destroy_process_group()
    return ones.tolist()


if __name__ == "__main__":
    main()
