"""What a rank measures of its host, its device and its network, in seconds and without a model."""

import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.leaders import LeaderGroup
from dpa_ds.distributed.world import World
from dpa_ds.errors import storage_errors

CPU_GATHER_BYTES = 16_000_000
DEVICE_GATHER_BYTES = 256_000_000
"""Size of one timed all-gather, over all ranks of a group: some layers of a large model."""
NUM_REPEATS = 5
NUM_PINGS = 20


@dataclass(frozen=True)
class RankFacts:
    """What one rank found: times in seconds, sizes in bytes, bandwidths in bytes per second."""

    rank: int
    host: str
    group: int
    address: str
    """Address that the host's own name leads to, and the network interface that has it."""
    device: str
    """Identity that no two devices of the job share, whatever number each rank knows its own by; empty on a CPU."""
    device_name: str
    num_threads: int
    num_cores: int
    free_device_memory: int
    """On a CPU the free memory of the host."""
    free_host_memory: int
    free_disk: int
    """Free space where the run is written."""
    sees_token: bool
    """Whether the file that rank 0 has just written there is seen here, too."""
    clock_offset: float
    """Seconds by which this host's clock is ahead of that of rank 0."""
    gather_bandwidth: float
    """Bytes that a rank receives per second in the group's all-gather; 0 in a group of one."""
    gather_latency: float
    exchange_seconds: float
    """One all-reduce of the global adapter among the leaders; 0 elsewhere, and where there is one group."""
    exchange_latency: float


def gather_speed(world: World) -> tuple[float, float]:
    """Bandwidth (bytes that a rank receives, per second) and latency (seconds) of an all-gather, as ZeRO-3 does them.

    Collective: all ranks of the group.
    """
    if world.world_size == 1:
        return 0.0, 0.0
    num_bytes = CPU_GATHER_BYTES if world.device.type == "cpu" else DEVICE_GATHER_BYTES
    share = num_bytes // world.world_size
    seconds = _median_seconds(_all_gather(world, share), NUM_REPEATS)
    latency = _median_seconds(_all_gather(world, 1), NUM_PINGS)
    return share * (world.world_size - 1) / seconds, latency


def exchange_speed(group: LeaderGroup, num_bytes: int) -> tuple[float, float]:
    """Seconds of one exchange of `num_bytes` among the leaders, and of one of four bytes. Collective: all leaders."""
    buffer = torch.zeros(num_bytes // 4)
    single = torch.zeros(1)
    seconds = _median_seconds(partial(group.all_reduce_, buffer, "preflight"), NUM_REPEATS)
    latency = _median_seconds(partial(group.all_reduce_, single, "preflight"), NUM_PINGS)
    return seconds, latency


def _all_gather(world: World, num_bytes: int) -> Callable[[], None]:
    """An all-gather of `num_bytes` of each rank, to be repeated with the same buffers."""
    mine = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
    whole = torch.empty(num_bytes * world.world_size, dtype=torch.uint8, device=world.device)

    def gather() -> None:
        dist.all_gather_into_tensor(whole, mine)
        if world.device.type != "cpu":  # else only the launch of the kernel would be timed
            torch.accelerator.synchronize()

    return gather


def _median_seconds(work: Callable[[], None], num_repeats: int) -> float:
    work()  # connections are made at the first use
    times = []
    for _ in range(num_repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def clock_offset(job: JobStore) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's, to within half of a question's way there and back.

    One rank after the other, so that none waits while it is timed. Collective: every rank of the job.
    """
    if job.launch.global_rank == 0:
        for rank in range(1, job.launch.job_world_size):
            job.publish(f"clock/{rank}/turn", None)
            job.lookup(f"clock/{rank}/asked")
            job.publish(f"clock/{rank}/time", time.time())
        return 0.0
    mine = f"clock/{job.launch.global_rank}"
    job.lookup(f"{mine}/turn")
    asked = time.time()
    job.publish(f"{mine}/asked", None)
    answer = float(job.lookup(f"{mine}/time"))
    return (asked + time.time()) / 2 - answer


def sees_token(job: JobStore, folder: Path, patience_seconds: float = 5.0) -> bool:
    """Whether a file that rank 0 writes into `folder` is there for this rank, too. Collective: every rank of the job.

    Args:
        patience_seconds: network file systems may show a new file late.

    Raises:
        CheckpointError: on rank 0, where it cannot write.
    """

    def write() -> str:
        path = folder / f".preflight_{os.getpid()}"
        with storage_errors(path, "choose a folder that every host may write to (output_dir)"):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(path)

    token = Path(job.broadcast_from_rank_zero("token", write))
    deadline = time.monotonic() + patience_seconds
    seen = token.exists()
    while not seen and time.monotonic() < deadline:
        time.sleep(0.1)
        seen = token.exists()
    job.barrier("token_seen")
    if job.launch.global_rank == 0:
        token.unlink()
    return seen


def free_disk(folder: Path) -> int:
    """Bytes that may be written below `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def device_facts(world: World) -> tuple[str, str, int]:
    """Identity, name and free memory (bytes) of this rank's device."""
    if world.device.type == "cpu":
        return "", "cpu", free_host_memory()
    properties = torch.cuda.get_device_properties(world.device)
    return str(properties.uuid), properties.name, int(torch.cuda.mem_get_info(world.device)[0])


def num_threads() -> int:
    """Number of threads that torch computes with."""
    return torch.get_num_threads()


def free_host_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def own_address() -> str:
    """Address that this host's own name leads to, and its network interface: what gloo uses by default."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "unknown"
    for interface, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            return f"{address} ({interface})"
    return f"{address} (?)"
