"""Layouts of one recipe on one cluster: memory per rank, seconds per round, the fitting ones first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpa_ds.config.schema import RunConfig
from dpa_ds.errors import ClusterError
from dpa_ds.planning.hardware import Cluster
from dpa_ds.planning.memory import BYTES, Layout, Lora, gathered_parameters, step_bytes
from dpa_ds.planning.shapes import Shape

LINK_EFFICIENCY, OVERHEAD, LABEL_SHARE = 0.7, 2e9, 0.25
"""Assumed: share of published bandwidth; bytes for CUDA context and allocator; labelled tokens."""
HEADROOM = 0.9
"""Share of a GPU's memory that a plan may fill: planned and measured peaks differ by up to a tenth."""
PHASES = {"feddpa_t": 2, "feddpa_f": 1, "fedit": 1, "fedlora": 1, "local": 1, "centralized": 1}
"""Phases of a round by method; the phase after the last round of feddpa_f and fedlora is not in it."""
MOST_TOKENS = 65536
"""The largest micro-batch that is considered."""


@dataclass(frozen=True)
class Workload:
    """The data. The defaults are the authors' dataset1."""

    clients: int = 8
    examples: int = 300
    """Training examples of a client."""
    tokens: float = 70.0
    """Of an example, prompt and answer."""


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
    host_bytes: float
    """In the host's memory for each of its ranks, where the base is offloaded."""
    fits: bool

    @property
    def total(self) -> float:
        """Bytes per rank."""
        return sum(self.memory.values())


def ranks_of_recipe(config: RunConfig, cluster: Cluster, work: Workload) -> int:
    """Ranks of a group, of the smallest if they differ. ClusterError: more than the cluster has GPUs."""
    wanted, num_gpus = config.cluster.ranks_per_group, cluster.nodes * cluster.gpus
    fair = max(1, num_gpus // clients_of(config, work))
    ranks = min(wanted) if isinstance(wanted, list) else fair if wanted == "auto" else wanted
    if ranks > num_gpus:
        raise ClusterError(
            f"cluster.ranks_per_group is {ranks}, but --cluster has {num_gpus} GPUs: give more, or lower it"
        )
    return ranks


def clients_of(config: RunConfig, work: Workload) -> int:
    """Clients as the method sees them: centralized pools all data in one."""
    return 1 if config.method.name == "centralized" else work.clients


def lora_of(config: RunConfig) -> Lora:
    """The recipe's adapters."""
    lora = config.lora
    return Lora(tuple(lora.target_modules), lora.rank, lora.local_rank or lora.rank, lora.dropout > 0)


def layout_of(config: RunConfig, zero: Mapping[str, Any], ranks: int) -> Layout:
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
        max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload_params=zero.get("offload_param", {}).get("device") in ("cpu", "nvme"),
    )


def judge(shape: Shape, config: RunConfig, cluster: Cluster, layout: Layout, work: Workload) -> Plan:
    """Memory and time of one layout.

    FLOPs per token: 2 N forward, 2 N for the gradient of the inputs (frozen weights need none), 2 N more with recomputation;
    attention and adapters are left out; but no pass takes less than reading all weights once. ZeRO-3 gathers the base up to
    twice for every micro-batch (`gathered_parameters`); a rank receives (ranks - 1) / ranks of it, and with offload brings
    its own share from the host each time; the gradients of the adapter go around a ring twice. Compute and communication
    are taken not to overlap. With fewer groups than clients these take turns.
    """
    passes = 3 if layout.checkpointing else 2
    lora = lora_of(config)
    memory = step_bytes(shape, lora, layout) | {"overhead": OVERHEAD}
    step_tokens = config.train.batch_size * work.tokens / layout.ranks
    micro_batches = math.ceil(step_tokens / layout.tokens)
    base = shape.parameters * BYTES[layout.precision]
    gathers = micro_batches * gathered_parameters(shape, lora, layout) / shape.parameters if layout.stage == 3 else 0.0
    gathered = gathers * base * (layout.ranks - 1) / layout.ranks
    host_bytes = base / layout.ranks if layout.offload_params else 0.0
    bandwidth = cluster.link / 2 if layout.ranks <= cluster.gpus else cluster.net
    arithmetic = 2 * shape.parameters * step_tokens / micro_batches / (cluster.mfu * cluster.flops)
    seconds = passes * micro_batches * max(arithmetic, base / cluster.memory_bandwidth)
    reduced = 2 * 4 * max(lora.parameters(shape)) * (layout.ranks - 1) / layout.ranks
    seconds += (gathered + reduced) / (LINK_EFFICIENCY * bandwidth)
    seconds += gathers * host_bytes / (LINK_EFFICIENCY * cluster.host_link)
    clients = clients_of(config, work)
    examples = work.examples * work.clients / clients
    steps = config.train.max_steps or math.ceil(
        math.ceil(examples / config.train.batch_size) * config.train.local_epochs
    )
    groups = min(clients, cluster.nodes * cluster.gpus // layout.ranks)
    drawn = max(1, round(clients * config.federation.client_fraction))
    in_turn = math.ceil(drawn / groups) if groups else math.inf
    fits = sum(memory.values()) <= HEADROOM * cluster.memory and groups > 0
    round_seconds = PHASES[config.method.name] * steps * in_turn * seconds
    return Plan(layout, memory, seconds, round_seconds, gathered, reduced, host_bytes, fits)


def plan(shape: Shape, config: RunConfig, zero: Mapping[str, Any], cluster: Cluster, work: Workload) -> list[Plan]:
    """Stages 0 to 3 and 3 with offload, ranks of a group in powers of two, with and without recomputation, each with its
    best micro-batch: fitting first, then fastest, then smallest. Bucket sizes and the like are those of `zero` in all.
    """
    longest = config.data.max_length
    most = max(longest, min(MOST_TOKENS, config.train.batch_size * longest))
    budgets = {layout_of(config, zero, 1).tokens, *(longest * 2**k for k in range(20) if longest * 2**k <= most)}
    plans = []
    for ranks in (2**k for k in range(10) if 2**k <= cluster.nodes * cluster.gpus):
        for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
            for checkpointing in (False, True):
                layout = replace(
                    layout_of(config, zero, ranks), stage=stage, checkpointing=checkpointing, offload_params=offload
                )
                sized = [replace(layout, tokens=t, labels=round(t * LABEL_SHARE)) for t in budgets]
                plans.append(min((judge(shape, config, cluster, one, work) for one in sized), key=_order))
    return sorted(plans, key=_order)


def _order(one: Plan) -> tuple[bool, float, float]:
    return not one.fits, one.round_seconds, one.total


def reason(ranked: list[Plan], cluster: Cluster, clients: int) -> str:
    """Why the first of the ranked layouts is the first."""
    first = ranked[0]
    if not first.fits:
        least = min(ranked, key=lambda one: one.total)
        return (
            f"no layout fits {cluster.memory / 1e9:.0f} GB; the smallest needs {least.total / 1e9:.0f} GB (ZeRO "
            f"{least.layout.stage}, {least.layout.ranks} ranks a group): lower data.max_length, or take more or larger GPUs"
        )
    num_groups = min(clients, cluster.nodes * cluster.gpus // first.layout.ranks)
    divided = not any(one.fits and one.layout.stage < 3 for one in ranked)
    offloaded = not any(one.fits and not one.layout.offload_params for one in ranked)
    whole = "the base fits on a GPU, and this"
    if divided:
        whole = f"the base must be divided{' and offloaded' if offloaded else ''}, and this"
    groups = f"{num_groups} group{'s' if num_groups > 1 else ''}"
    turns = "all clients train at once" if num_groups == clients else f"{clients} clients take turns on {groups}"
    return f"{whole} is the fastest that fits: {turns}; equal times are ordered by memory"


def bytes_between_groups(shape: Shape, config: RunConfig, work: Workload) -> int:
    """Handed over by a leader in a round: 4 x (adapter + 2 hidden) + 8, and the table of 14 fp64 a client."""
    trained = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    states = 2 * shape.hidden if config.method.name in ("feddpa_t", "feddpa_f") else 0
    federated = 0 if config.method.name == "local" else 4 * (trained + states) + 8
    return federated + clients_of(config, work) * 14 * 8
