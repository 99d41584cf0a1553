"""Hardware of a planned job: `nodes=8,gpus=4,gpu=h100-80g,net=400Gb` becomes a Cluster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dpa_ds.errors import ClusterError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, with the figures that its maker publishes."""

    memory: float
    """Memory of the GPU, in bytes."""
    flops: float
    """Dense 16-bit FLOP/s."""
    link: float
    """Bandwidth between the GPUs of a host, both directions together, in bytes/s."""
    memory_bandwidth: float
    """Bandwidth of the GPU's memory, in bytes/s."""
    host_link: float
    """Bandwidth from the host's memory to the GPU, in bytes/s."""


GPUS = {
    "v100-32g": Gpu(32e9, 125e12, 300e9, 0.9e12, 16e9),
    "a100-40g": Gpu(40e9, 312e12, 600e9, 1.55e12, 32e9),
    "a100-80g": Gpu(80e9, 312e12, 600e9, 2.04e12, 32e9),
    "l40s-48g": Gpu(48e9, 362e12, 64e9, 0.86e12, 32e9),
    "h100-80g": Gpu(80e9, 989e12, 900e9, 3.35e12, 64e9),
    "h200-141g": Gpu(141e9, 989e12, 900e9, 4.8e12, 64e9),
    "b200-180g": Gpu(180e9, 2250e12, 1800e9, 8e12, 64e9),
    "mi300x-192g": Gpu(192e9, 1307e12, 896e9, 5.3e12, 64e9),
    # One core. They differ much: give a rank's share of the memory, and the FLOP/s that benchmarks/planner.py measures.
    "cpu": Gpu(8e9, 1e11, 20e9, 20e9, 20e9),
}
"""GPUs by the name that `gpu=` takes."""
_KEYS = ("nodes", "gpus", "gpu", "net", "memory", "flops", "mfu")


@dataclass(frozen=True)
class Cluster:
    """Hosts that are all alike."""

    nodes: int
    gpus: int
    """GPUs of a host."""
    memory: float
    """Memory of a GPU, in bytes."""
    flops: float
    """Peak FLOP/s of a GPU."""
    link: float
    """Bandwidth between the GPUs of a host, both directions together, in bytes/s."""
    net: float
    """Bandwidth of a host's network, in bytes/s."""
    memory_bandwidth: float
    """Bandwidth of a GPU's memory, in bytes/s."""
    host_link: float
    """Bandwidth from a host's memory to each of its GPUs, in bytes/s."""
    mfu: float
    """Share of `flops` that a training step is taken to reach. Assumed, unless the user has measured it."""

    @property
    def num_gpus(self) -> int:
        """GPUs of all hosts."""
        return self.nodes * self.gpus


def parse_cluster(text: str) -> Cluster:
    """Cluster that `text` describes: net in Gb (bits), memory in GB, flops in FLOP/s, mfu a share in (0, 1].

    Raises:
        ClusterError: an unknown key or GPU, or a number that is none; the message names what is allowed.
    """
    words = dict(word.partition("=")[::2] for word in text.split(",") if word)
    unknown = [key for key in words if key not in _KEYS]
    if unknown:
        raise _unknown(text, f"unknown key {unknown[0]}")
    name = words.get("gpu", "a100-80g")
    if name not in GPUS:
        raise _unknown(text, f"unknown gpu {name}")
    try:
        cluster = _build_cluster(words, GPUS[name])
    except ValueError as error:
        raise ClusterError(
            f"--cluster {text!r}: {error}: write it like nodes=8,gpus=4,net=400Gb,memory=80GB"
        ) from error
    numbers = (cluster.nodes, cluster.gpus, cluster.memory, cluster.flops, cluster.net, cluster.mfu)
    if not all(0 < number < math.inf for number in numbers):
        raise ClusterError(f"--cluster {text!r}: every number must be > 0")
    if cluster.mfu > 1:
        raise ClusterError(f"--cluster {text!r}: mfu is a share of the peak, in (0, 1]")
    return cluster


def _build_cluster(words: Mapping[str, str], gpu: Gpu) -> Cluster:
    """Raises ValueError for a number that is none."""
    memory = gpu.memory
    if "memory" in words:
        memory = float(words["memory"].removesuffix("GB")) * 1e9
    return Cluster(
        nodes=int(words.get("nodes", 1)),
        gpus=int(words.get("gpus", 1)),
        memory=memory,
        flops=float(words.get("flops", gpu.flops)),
        link=gpu.link,
        net=parse_network(words.get("net", "100Gb")),
        memory_bandwidth=gpu.memory_bandwidth,
        host_link=gpu.host_link,
        mfu=float(words.get("mfu", 0.4)),
    )


def parse_network(text: str) -> float:
    """Bytes/s of `400Gb`, which are gigabits. Raises ValueError for what is no number."""
    return float(text.removesuffix("Gb")) * 1e9 / 8


def _unknown(text: str, what: str) -> ClusterError:
    keys, names = ", ".join(_KEYS), ", ".join(GPUS)
    return ClusterError(f"--cluster {text!r}: {what}: keys are {keys}; gpu is one of {names}")
