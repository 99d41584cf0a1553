"""Layouts of one recipe on one cluster: memory per rank, seconds per round, the fitting ones first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dpa_ds.config.schema import RanksPerGroup
from dpa_ds.errors import ClusterError
from dpa_ds.planning.hardware import Cluster
from dpa_ds.planning.memory import BYTES, Layout, base_bytes, gathered_parameters, host_bytes, step_bytes
from dpa_ds.planning.scenario import Scenario

LINK_EFFICIENCY = 0.7
"""Share of the published bandwidth that a transfer is taken to reach. Assumed."""
OVERHEAD = 2e9
"""Bytes of a rank for the CUDA context and the allocator. Assumed."""
LABEL_SHARE = 0.25
"""Share of the tokens that have a label. Assumed."""
HEADROOM = 0.9
"""Share of a GPU's memory that a plan may fill: planned and measured peaks differ by up to a tenth."""
MOST_TOKENS = 65536
"""The largest micro-batch that is considered."""
STAGES = ((0, False), (1, False), (2, False), (3, False), (3, True))
"""ZeRO stages that are considered, each with whether the base is offloaded."""


@dataclass(frozen=True)
class Plan:
    """One layout, judged."""

    layout: Layout
    memory: dict[str, float]
    """Bytes per rank by part, the assumed overhead included."""
    micro_batches: int
    """Of a step, on each rank."""
    step_seconds: float
    round_seconds: float
    gather_bytes: float
    """Bytes that a rank receives in one step for ZeRO-3's gathers."""
    reduce_bytes: float
    """Bytes that a rank sends in one step for the adapter's gradients, in fp32."""
    host_bytes: float
    """Bytes in the host's memory for each of its ranks, where the base is offloaded."""
    host_bytes_rounded: float
    """The same where torch rounds all that it pins: `PYTORCH_ALLOC_CONF` set by the user to something else."""
    fits: bool

    @property
    def total(self) -> float:
        """All parts of `memory`, in bytes per rank."""
        return sum(self.memory.values())


def plan(scenario: Scenario, cluster: Cluster) -> list[Plan]:
    """Stages 0 to 3 and 3 with offload, ranks of a group in powers of two, with and without recomputation.

    Each with its best micro-batch; fitting first, then fastest, then with the fewest micro-batches a step, then
    smallest. Bucket sizes and the like are those of the recipe in all.
    """
    plans = []
    for layout in _layouts(scenario, cluster):
        sized = [judge(scenario, cluster, _with_tokens(layout, tokens)) for tokens in _micro_batches(scenario)]
        plans.append(min(sized, key=_order))
    return sorted(plans, key=_order)


def judge(scenario: Scenario, cluster: Cluster, layout: Layout) -> Plan:
    """Memory and time of one layout.

    FLOPs per token: 2 N forward, 2 N for the gradient of the inputs (frozen weights need none), 2 N more with
    recomputation; attention and adapters are left out; but no pass takes less than reading all weights once. ZeRO-3
    gathers the base up to twice for every micro-batch (`gathered_parameters`); a rank receives (ranks - 1) / ranks of
    it, and with offload brings its own share from the host each time; the gradients of the adapter go around a ring
    twice. Compute and communication are taken not to overlap. With fewer groups than clients these take turns. A
    quantised weight is read, and written in `precision`, in each pass before it is used. Of experts N has those that a
    token takes, and the weights that are read are all of them.
    """
    shape, ranks = scenario.shape, layout.ranks
    memory = step_bytes(shape, scenario.lora, layout) | {"overhead": OVERHEAD}
    weights = shape.parameters * BYTES[layout.precision]
    tokens = scenario.train.batch_size * scenario.workload.tokens / ranks
    micro_batches = math.ceil(tokens / layout.tokens)

    passes = 2
    if layout.checkpointing:
        passes = 3
    arithmetic = 2 * shape.active_parameters * tokens / micro_batches / (cluster.mfu * cluster.flops)
    seconds = passes * micro_batches * max(arithmetic, weights / cluster.memory_bandwidth)
    if layout.quantization != "none":
        converted = base_bytes(shape, layout.precision, layout.quantization) + weights
        seconds += passes * micro_batches * converted / cluster.memory_bandwidth

    gathers = 0.0
    if layout.stage == 3:
        gathers = micro_batches * gathered_parameters(shape, scenario.lora, layout) / shape.parameters
    gather_bytes = gathers * weights * (ranks - 1) / ranks
    # One adapter is trained at a time: the plan is for the larger one.
    reduce_bytes = 2 * 4 * max(scenario.lora.parameters(shape)) * (ranks - 1) / ranks
    bandwidth = cluster.net
    if ranks <= cluster.gpus:  # the group stays inside a host
        bandwidth = cluster.link / 2  # published for both directions together
    seconds += (gather_bytes + reduce_bytes) / (LINK_EFFICIENCY * bandwidth)

    if layout.offload_params:
        seconds += gathers * weights / ranks / (LINK_EFFICIENCY * cluster.host_link)

    num_groups = _num_groups(scenario, cluster, layout)
    turns = math.inf  # where a group has more ranks than the cluster
    if num_groups:
        turns = math.ceil(scenario.num_drawn / num_groups)
    return Plan(
        layout=layout,
        memory=memory,
        micro_batches=micro_batches,
        step_seconds=seconds,
        round_seconds=scenario.num_steps * turns * seconds,
        gather_bytes=gather_bytes,
        reduce_bytes=reduce_bytes,
        host_bytes=host_bytes(shape, layout),
        host_bytes_rounded=host_bytes(shape, layout, exact_above=math.inf),
        fits=num_groups > 0 and sum(memory.values()) <= HEADROOM * cluster.memory,
    )


def ranks_of_recipe(wanted: RanksPerGroup, scenario: Scenario, cluster: Cluster) -> int:
    """Ranks of a group for the recipe's cluster.ranks_per_group, of the smallest group if they differ.

    Raises:
        ClusterError: more than the cluster has GPUs.
    """
    if wanted == "auto":
        ranks = max(1, cluster.num_gpus // scenario.num_clients)
    elif isinstance(wanted, list):
        ranks = min(wanted)
    else:
        ranks = wanted
    if ranks > cluster.num_gpus:
        raise ClusterError(
            f"cluster.ranks_per_group is {ranks}, but --cluster has {cluster.num_gpus} GPUs: give more, or lower it"
        )
    return ranks


def layout_of(scenario: Scenario, ranks: int) -> Layout:
    """The recipe's layout, with DeepSpeed's defaults for what its JSON does not say."""
    zero, longest = scenario.zero, scenario.max_length
    offload = zero.get("offload_param", {})
    # A micro-batch holds at least the longest example, and no more than a step of longest examples.
    tokens = max(longest, min(scenario.train.micro_batch_tokens, scenario.train.batch_size * longest))
    return Layout(
        stage=int(zero.get("stage", 0)),
        ranks=ranks,
        precision=scenario.model.precision,
        quantization=scenario.model.quantization,
        tokens=tokens,
        labels=round(tokens * LABEL_SHARE),
        checkpointing=scenario.model.gradient_checkpointing,
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap=bool(zero.get("overlap_comm", False)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        persistence=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        max_live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload_params=offload.get("device") in ("cpu", "nvme"),
        nvme=offload.get("device") == "nvme",
        pinned=bool(offload.get("pin_memory", True)),
        second_share_ranks=int(zero.get("zero_hpz_partition_size", 1)),
    )


def reason(scenario: Scenario, cluster: Cluster, ranked: Sequence[Plan]) -> str:
    """Why the first of the ranked layouts is the first."""
    first = ranked[0]
    if not first.fits:
        least = min(ranked, key=_total)
        return (
            f"no layout fits {cluster.memory / 1e9:.0f} GB; the smallest needs {least.total / 1e9:.0f} GB (ZeRO "
            f"{least.layout.stage}, {least.layout.ranks} ranks a group): lower data.max_length, or take more or larger "
            "GPUs"
        )
    fitting = [one.layout for one in ranked if one.fits]
    base = "the base fits on a GPU"
    if all(layout.offload_params for layout in fitting):
        base = "the base must be divided and offloaded"
    elif all(layout.stage == 3 for layout in fitting):
        base = "the base must be divided"
    turns = _turns(scenario, cluster, first)
    return (
        f"{base}, and this is the fastest that fits: {turns}; equal times are ordered by micro-batches a step, then by "
        "memory"
    )


def _turns(scenario: Scenario, cluster: Cluster, one: Plan) -> str:
    num_groups = _num_groups(scenario, cluster, one.layout)
    if num_groups == scenario.num_clients:
        return "all clients train at once"
    if num_groups == 1:
        return f"{scenario.num_clients} clients take turns on 1 group"
    return f"{scenario.num_clients} clients take turns on {num_groups} groups"


def _num_groups(scenario: Scenario, cluster: Cluster, layout: Layout) -> int:
    return min(scenario.num_clients, cluster.num_gpus // layout.ranks)


def _layouts(scenario: Scenario, cluster: Cluster) -> Iterator[Layout]:
    """All that are considered, with the recipe's micro-batch."""
    for ranks in _powers_of_two(512):
        if ranks > cluster.num_gpus:
            return
        recipe = layout_of(scenario, ranks)
        for stage, offload in STAGES:
            if stage == 3 and recipe.quantization != "none":  # DeepSpeed does not divide it
                continue
            for checkpointing in (False, True):
                yield replace(recipe, stage=stage, checkpointing=checkpointing, offload_params=offload)


def _micro_batches(scenario: Scenario) -> set[int]:
    """Sizes in tokens: the recipe's, and from the longest example to a step of longest examples, doubled each time."""
    longest = scenario.max_length
    most = max(longest, min(MOST_TOKENS, scenario.train.batch_size * longest))
    doubled = [longest * factor for factor in _powers_of_two(most // longest)]
    return {layout_of(scenario, 1).tokens, *doubled}


def _powers_of_two(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length())]


def _with_tokens(layout: Layout, tokens: int) -> Layout:
    return replace(layout, tokens=tokens, labels=round(tokens * LABEL_SHARE))


def _order(one: Plan) -> tuple[bool, float, int, float]:
    # Of equal times the one with fewer micro-batches: each has its launches, which `judge` leaves out. Equal to some
    # digits, because the same work in three parts is not the same sum of floats.
    seconds = float(f"{one.round_seconds:.6g}")
    return not one.fits, seconds, one.micro_batches, one.total


def _total(one: Plan) -> float:
    return one.total
