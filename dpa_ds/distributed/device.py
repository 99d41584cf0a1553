"""The device that a rank computes on, found with torch alone: inference on one rank needs no DeepSpeed."""

import os
from typing import Any

import psutil
import torch

from dpa_ds.distributed.launchers import Launch, threads_are_chosen
from dpa_ds.errors import ClusterError


def claim_device(launch: Launch, ranks_on_host: int) -> torch.device:
    """The device of this rank, from now on torch's current one.

    `cluster.device` cpu sets DS_ACCELERATOR (`run_job`), and DeepSpeed obeys the same variable.

    Raises:
        ClusterError: the host has fewer devices than ranks, or no accelerator although DS_ACCELERATOR names one.
    """
    accelerator = _accelerator()
    if accelerator is None:
        if os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":  # DeepSpeed would take it at its word
            raise ClusterError(
                f"DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']!r}, but torch finds no accelerator on this host: "
                "unset it, or set cluster.device cpu"
            )
        if not threads_are_chosen(launch):  # else every rank of a host would use all of its cores
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_on_host))
        return torch.device("cpu")
    index = _device_index(launch.local_rank, torch.accelerator.device_count())
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def device_type() -> str:
    """Type of the device that `claim_device` will answer with, such as cpu or cuda."""
    accelerator = _accelerator()
    return accelerator.type if accelerator else "cpu"


def _accelerator() -> torch.device | None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    return torch.accelerator.current_accelerator(check_available=True)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; for a CPU those of the host, which all of its ranks share."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.accelerator.get_memory_info(device)[0])


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting: kernels that are launched later find it there."""
    if device.type == "cpu":
        return tensor
    # From memory that may be paged out, the copy would wait until the device has done all that it was given.
    return tensor.pin_memory().to(device, non_blocking=True)


def use_free_memory_of(device: torch.device, accelerator: Any) -> None:
    """Have DeepSpeed's `accelerator` ask torch how much of `device` is free, where it is a CUDA device.

    Its own way (0.19.8, where pynvml is installed) reads CUDA_VISIBLE_DEVICES as numbers: the UUIDs that Slurm and
    Kubernetes write there, and those of MIG devices, end ZeRO 1 and 2 in a ValueError.
    """
    if device.type == "cuda":
        accelerator.available_memory = lambda device_index=None: free_memory(device)


def _device_index(local_rank: int, num_devices: int) -> int:
    """Device of a rank; a launcher that shows each rank only its own device (srun --gpus-per-task) shows one."""
    if num_devices == 1:
        return 0
    if local_rank >= num_devices:
        raise ClusterError(
            f"rank {local_rank} of this host has no device: the host shows {num_devices}; start fewer ranks per host"
        )
    return local_rank
