"""`nodes=8,gpus=4,gpu=h100-80g,net=400Gb` -> Cluster."""

import math
from dataclasses import dataclass

from dpa_ds.errors import ClusterError

GPUS = {
    "v100-32g": (32e9, 125e12, 300e9, 0.9e12, 16e9),
    "a100-40g": (40e9, 312e12, 600e9, 1.55e12, 32e9),
    "a100-80g": (80e9, 312e12, 600e9, 2.04e12, 32e9),
    "l40s-48g": (48e9, 362e12, 64e9, 0.86e12, 32e9),
    "h100-80g": (80e9, 989e12, 900e9, 3.35e12, 64e9),
    "h200-141g": (141e9, 989e12, 900e9, 4.8e12, 64e9),
    "cpu": (8e9, 1e11, 20e9, 20e9, 20e9),
}
"""Bytes, dense 16-bit FLOP/s, bytes/s between the GPUs of a host (both directions), of the GPU's memory and from the host's, as
published. cpu: one core; these differ much, so give its share of the memory and what benchmarks/planner.py measures as flops."""
_KEYS = ("nodes", "gpus", "gpu", "net", "memory", "flops", "mfu")


@dataclass(frozen=True)
class Cluster:
    """Equal hosts."""

    nodes: int
    gpus: int
    memory: float
    """Bytes of a GPU."""
    flops: float
    """Peak FLOP/s of a GPU."""
    link: float
    """Bytes/s between GPUs of a host."""
    net: float
    """Bytes/s of a host."""
    memory_bandwidth: float
    """Bytes/s of a GPU's memory."""
    host_link: float
    """Bytes/s from a host's memory to each of its GPUs."""
    mfu: float
    """Share of `flops` that a training step is taken to reach. Assumed, unless the user has measured it."""


def parse_cluster(text: str) -> Cluster:
    """ClusterError: an unknown key or GPU, or a number that is none; it names what is allowed.

    net is in Gb (bits), memory in GB, flops in FLOP/s (of the recipe's precision), mfu a share in (0, 1].
    """
    words = dict(word.partition("=")[::2] for word in text.split(",") if word)
    unknown = [key for key in words if key not in _KEYS]
    gpu = words.get("gpu", "a100-80g")
    if unknown or gpu not in GPUS:
        raise ClusterError(
            f"--cluster {text!r}: {'unknown key ' + unknown[0] if unknown else 'unknown gpu ' + gpu}: keys are "
            f"{', '.join(_KEYS)}; gpu is one of {', '.join(GPUS)}"
        )
    memory, flops, link, memory_bandwidth, host_link = GPUS[gpu]
    try:
        cluster = Cluster(
            nodes=int(words.get("nodes", 1)),
            gpus=int(words.get("gpus", 1)),
            memory=float(words["memory"].removesuffix("GB")) * 1e9 if "memory" in words else memory,
            flops=float(words.get("flops", flops)),
            link=link,
            net=float(words.get("net", "100Gb").removesuffix("Gb")) * 1e9 / 8,
            memory_bandwidth=memory_bandwidth,
            host_link=host_link,
            mfu=float(words.get("mfu", 0.4)),
        )
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
