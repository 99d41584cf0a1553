"""Layouts of one recipe on one cluster: memory per rank, seconds per round, the fitting ones first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpa_ds.config import RunConfig
from dpa_ds.errors import ClusterError
from dpa_ds.planning.hardware import Cluster
from dpa_ds.planning.memory import BYTES, Layout, step_bytes
from dpa_ds.planning.shapes import Shape

MFU, LINK_EFFICIENCY, OVERHEAD, LABEL_SHARE = 0.4, 0.7, 2e9, 0.25
"""Assumed: share of peak FLOP/s; of published bandwidth; bytes for CUDA context and allocator; labelled tokens."""
HEADROOM = 0.9
"""Share of a GPU's memory that a plan may fill: planned and measured peaks differ by up to a tenth."""
CLIENTS, EXAMPLES, TOKENS = 8, 300, 70
"""The authors' dataset1: clients, training examples of each, tokens of an example."""


@dataclass(frozen=True)
class Plan:
    """One layout, judged."""

    layout: Layout
    memory: dict[str, float]
    """Bytes per rank by part, the assumed overhead included."""
    step_seconds: float
    round_seconds: float
    gather_bytes: float
    """Received by a rank in one step for ZeRO-3's gathers."""
    reduce_bytes: float
    """Sent by a rank in one step for the adapter's gradients, in fp32."""
    fits: bool


def ranks_of_recipe(config: RunConfig, cluster: Cluster) -> int:
    """Ranks of a group, of the smallest if they differ. ClusterError: more than the cluster has GPUs."""
    wanted, num_gpus = config.cluster.ranks_per_group, cluster.nodes * cluster.gpus
    ranks = min(wanted) if isinstance(wanted, list) else max(1, num_gpus // CLIENTS) if wanted == "auto" else wanted
    if ranks > num_gpus:
        raise ClusterError(
            f"cluster.ranks_per_group is {ranks}, but --cluster has {num_gpus} GPUs: give more, or lower it"
        )
    return ranks


def layout_of(shape: Shape, config: RunConfig, zero: Mapping[str, Any], ranks: int) -> Layout:
    """The recipe's layout; `zero` is zero_optimization of its DeepSpeed JSON, with DeepSpeed's defaults for what is absent."""
    tokens = max(
        config.data.max_length, min(config.train.micro_batch_tokens, config.train.batch_size * config.data.max_length)
    )
    return Layout(
        stage=int(zero.get("stage", 0)),
        ranks=ranks,
        precision=config.model.precision,
        tokens=tokens,
        labels=round(tokens * LABEL_SHARE),
        checkpointing=config.model.gradient_checkpointing,
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap=bool(zero.get("overlap_comm", False)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        offload_params=zero.get("offload_param", {}).get("device") in ("cpu", "nvme"),
        dropped=sum(shape.linears[name][0] for name in config.lora.target_modules) if config.lora.dropout else 0,
    )


def judge(shape: Shape, config: RunConfig, cluster: Cluster, layout: Layout) -> Plan:
    """Memory and time of one layout.

    FLOPs per token: 2 N forward, 2 N for the gradient of the inputs (frozen weights need none), 2 N more with recomputation;
    attention is left out; but no pass takes less than reading all weights once. ZeRO-3 gathers the base in forward and backward (and recomputation) of every micro-batch; a rank
    receives (ranks - 1) / ranks of it; the gradients of the adapter go around a ring twice. Compute and communication are taken
    not to overlap. Two phases a round.
    """
    passes = 3 if layout.checkpointing else 2
    trained = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    memory = step_bytes(shape, trained, layout) | {"overhead": OVERHEAD}
    step_tokens = config.train.batch_size * TOKENS / layout.ranks
    passes_of_step = math.ceil(step_tokens / layout.tokens)
    gathered, base = 0.0, shape.parameters * BYTES[layout.precision]
    if layout.stage == 3:
        gathered = passes * passes_of_step * base * (layout.ranks - 1) / layout.ranks
    bandwidth = cluster.link / 2 if layout.ranks <= cluster.gpus else cluster.net
    arithmetic = 2 * shape.parameters * step_tokens / passes_of_step / (MFU * cluster.flops)
    seconds = passes * passes_of_step * max(arithmetic, base / cluster.memory_bandwidth)
    reduced = 2 * 4 * trained * (layout.ranks - 1) / layout.ranks
    seconds += (gathered + reduced) / (LINK_EFFICIENCY * bandwidth)
    steps = config.train.max_steps or math.ceil(
        math.ceil(EXAMPLES / config.train.batch_size) * config.train.local_epochs
    )
    groups = min(CLIENTS, cluster.nodes * cluster.gpus // layout.ranks)
    in_turn = math.ceil(CLIENTS / groups) if groups else math.inf
    fits = sum(memory.values()) <= HEADROOM * cluster.memory and groups > 0
    return Plan(layout, memory, seconds, 2 * steps * in_turn * seconds, gathered, reduced, fits)


def plan(shape: Shape, config: RunConfig, zero: Mapping[str, Any], cluster: Cluster) -> list[Plan]:
    """Stages 0 to 3, ranks of a group in powers of two, with and without recomputation: fitting first, then fastest.

    Bucket sizes and the like are those of `zero` in every layout.
    """
    ranks = [2**k for k in range(10) if 2**k <= cluster.nodes * cluster.gpus]
    plans = [
        judge(
            shape,
            config,
            cluster,
            replace(layout_of(shape, config, zero, r), stage=s, checkpointing=c, offload_params=False),
        )
        for r in ranks
        for s in range(4)
        for c in (False, True)
    ]
    return sorted(plans, key=lambda p: (not p.fits, p.round_seconds, sum(p.memory.values())))


def reason(ranked: list[Plan], cluster: Cluster) -> str:
    """Why the first of the ranked layouts is the first."""
    first = ranked[0]
    if not first.fits:
        least = min(ranked, key=lambda one: sum(one.memory.values()))
        return (
            f"no layout fits {cluster.memory / 1e9:.0f} GB; the smallest needs {sum(least.memory.values()) / 1e9:.0f} GB (ZeRO "
            f"{least.layout.stage}, {least.layout.ranks} ranks a group): lower train.micro_batch_tokens, or offload"
        )
    num_groups = min(CLIENTS, cluster.nodes * cluster.gpus // first.layout.ranks)
    divided = not any(one.fits and one.layout.stage < 3 for one in ranked)
    whole = "the base must be divided, and this" if divided else "the base fits on a GPU, and this"
    turns = (
        "all clients train at once" if num_groups == CLIENTS else f"{CLIENTS} clients take turns on {num_groups} groups"
    )
    return f"{whole} is the fastest that fits: {turns}; equal times are ordered by memory"


def bytes_between_groups(shape: Shape, config: RunConfig) -> int:
    """Handed over by a leader in a round: 4 x (adapter + 2 hidden) + 8, and the table of 14 fp64 a client."""
    trained = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    states = 2 * shape.hidden if config.method.name in ("feddpa_t", "feddpa_f") else 0
    return 4 * (trained + states) + 8 + CLIENTS * 14 * 8
