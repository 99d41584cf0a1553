"""What a GPU's rank asks of torch and DeepSpeed. No test here has a GPU: CUDA's own calls are stand-ins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import cuda_accelerator

from dpa_ds.config.schema import ClusterConfig
from dpa_ds.distributed import world as world_module
from dpa_ds.distributed.device import use_free_memory_of
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import plan_topology
from dpa_ds.distributed.world import build_world
from tests.ranks import run_on_ranks

CUDA = torch.device("cuda", 0)
VISIBLE = ["GPU-8f2c1b7e-0d6a-4c0e-9a50-52e1f5b7a3c1", "MIG-5c9cf5c7-6a4d-5bd0-b6a2-0b9c3f1e2d4f", "0"]


@pytest.mark.parametrize("visible", VISIBLE)
def test_zero_learns_the_free_memory_of_a_device_with_any_name(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's accelerator for CUDA is the real one; pynvml and torch's question to the driver are stand-ins."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(cuda_accelerator, "pynvml", SimpleNamespace(nvmlDeviceGetHandleByIndex=int), raising=False)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (7, 80) if device == CUDA else (0, 80))
    accelerator: Any = cuda_accelerator.CUDA_Accelerator.__new__(cuda_accelerator.CUDA_Accelerator)
    if visible != "0":
        with pytest.raises(ValueError, match="invalid literal for int"):
            accelerator.available_memory(0)
    use_free_memory_of(CUDA, accelerator)
    assert accelerator.available_memory() == 7
    assert accelerator.available_memory(0) == 7


def test_a_cpu_keeps_what_deepspeed_says() -> None:
    accelerator = SimpleNamespace(available_memory=len)
    use_free_memory_of(torch.device("cpu"), accelerator)
    assert accelerator.available_memory is len


def device_of_group(job: JobStore, device: str) -> list[str]:
    """The `device_id` with which the group's world is made where the rank's device is `device`."""
    asked: list[str] = []

    def stop(backend: str, **words: Any) -> None:
        asked.append(f"{backend} {words['device_id']}")
        raise KeyboardInterrupt  # the rest would need the device

    world_module.claim_device = lambda launch, ranks_on_host: torch.device(device)  # type: ignore[assignment]
    dist.init_process_group = stop
    try:
        build_world(job, plan_topology(1, 1, 1), ClusterConfig(timeout_seconds=30), 30.0)
    except KeyboardInterrupt:
        return asked
    raise AssertionError("no group was made")


@pytest.mark.multirank
def test_the_groups_world_is_bound_to_the_ranks_device(tmp_path: Path) -> None:
    assert run_on_ranks(device_of_group, 1, tmp_path, "cuda:0") == [["nccl cuda:0"]]
    assert run_on_ranks(device_of_group, 1, tmp_path, "cpu") == [["gloo None"]]
