"""Entry point of launch/plan.py: what fits, and how fast."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from dpa_ds.cli.args import option, parse, positive_and_finite
from dpa_ds.cli.bootstrap import run_alone
from dpa_ds.config.deepspeed_json import check_stage, load_deepspeed_json
from dpa_ds.config.load import load_config
from dpa_ds.config.paths import expand
from dpa_ds.errors import storage_errors
from dpa_ds.evaluation.layout import aligned
from dpa_ds.planning.hardware import Cluster, parse_cluster
from dpa_ds.planning.plan import (
    LABEL_SHARE,
    LINK_EFFICIENCY,
    Plan,
    judge,
    layout_of,
    plan,
    ranks_of_recipe,
    reason,
)
from dpa_ds.planning.scenario import Scenario, Workload, scenario_of
from dpa_ds.planning.shapes import read_shape

_SHOWN = 8
"""Lines of the table, besides the recipe's."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Memory per rank, bytes and seconds of the recipe, and other layouts ranked by seconds per round.

    Needs no GPU and no weights: model.path/config.json, or a preset. Estimates: memory and time are checked against
    measurements on CPU only (docs/performance.md). --SECTION.FIELD VALUE changes the recipe as for launch/run.py.

    --cluster: memory=80GB, flops=9e14 (of the recipe's precision) and mfu=0.4 (share of flops that a step reaches,
    assumed) override those of gpu, which is one of v100-32g, a100-40g, a100-80g, l40s-48g, h100-80g, h200-141g,
    b200-180g, mi300x-192g, cpu.
    --model: llama-1b, llama-7b, llama-13b, llama-70b, llama3-8b, llama3-70b, mistral-7b, mixtral-8x7b, qwen2.5-7b,
    qwen2.5-32b, qwen3-8b, qwen3-32b, qwen3-30b-a3b.

    examples
      python launch/plan.py --config launch/recipes/paper.yaml --cluster nodes=1,gpus=8,gpu=h100-80g --model llama-7b
      python launch/plan.py --config RECIPE --cluster nodes=8,gpus=4,gpu=a100-40g,net=400Gb --json plan.json
    """

    cluster: str = option(
        "TEXT",
        missing="no cluster: describe it with --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb (see --help)",
    )
    """The cluster, such as nodes=8,gpus=4,gpu=h100-80g,net=400Gb."""
    model: str | None = option("PRESET", None)
    """Sizes of the model, where model.path has no config.json."""
    clients: int = option("N", Workload.clients, must_be="a whole number > 0", test=positive_and_finite)
    """Clients; this and the next two default to the authors' dataset1."""
    examples: int = option("N", Workload.examples, must_be="a whole number > 0", test=positive_and_finite)
    """Training examples of each."""
    tokens: float = option("N", Workload.tokens, must_be="a number > 0", test=positive_and_finite)
    """Tokens of an example."""
    json: str | None = option("FILE", None)
    """Write the same numbers to FILE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan in one process, without a launcher; the exit status."""
    return run_alone(partial(run, argv))


def run(argv: Sequence[str] | None) -> None:
    """Print the plan, and write it to a file if asked.

    Raises:
        ConfigError, ClusterError, ModelError: a mistake in the command line or the recipe.
    """
    options, recipe = parse(argv, PlanOptions, "python launch/plan.py --config RECIPE")
    config = load_config(recipe)
    cluster = parse_cluster(options.cluster)
    shape = read_shape(config.model.path, options.model)
    zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
    check_stage(config.model.quantization, int(zero.get("stage", 0)))
    workload = Workload(options.clients, options.examples, options.tokens)
    scenario = scenario_of(config, shape, zero, workload)
    layout = layout_of(scenario, ranks_of_recipe(config.cluster.ranks_per_group, scenario, cluster))
    chosen = judge(scenario, cluster, layout)
    ranked = plan(scenario, cluster)
    if options.json is not None:
        found = {"recipe": asdict(chosen), "ranked": [asdict(one) for one in ranked]}
        with storage_errors(options.json, "choose another file with --json"):
            expand(options.json, "--json").write_text(json.dumps(found, indent=1))
    lines = [
        *_assumptions(scenario, cluster),
        *_costs_of_recipe(scenario, chosen),
        "",
        *_table(chosen, ranked[:_SHOWN], scenario.num_rounds),
        "",
        f"why 1: {reason(scenario, cluster, ranked)}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _assumptions(scenario: Scenario, cluster: Cluster) -> list[str]:
    work = scenario.workload
    parameters = f"{scenario.shape.parameters / 1e9:.2f} G parameters"
    return [
        f"{parameters}; {work.clients} clients x {work.examples} examples x {work.tokens:g} tokens",
        f"assumed: {cluster.mfu:.0%} of peak FLOP/s, {LINK_EFFICIENCY:.0%} of published bandwidth, "
        f"a label at {LABEL_SHARE:.0%} of the tokens",
    ]


def _costs_of_recipe(scenario: Scenario, chosen: Plan) -> list[str]:
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in chosen.memory.items())
    lines = [f"recipe, GB a rank: {parts}"]
    if chosen.host_bytes:
        line = f"host, GB a rank: {chosen.host_bytes / 1e9:.2f}"
        if chosen.layout.pinned:
            line += f"; {chosen.host_bytes_rounded / 1e9:.2f} without pinned_max_cached_size_mb:1 in PYTORCH_ALLOC_CONF"
        lines.append(line)
    return [
        *lines,
        f"a step and rank: gathers {chosen.gather_bytes / 1e9:.2f} GB, reduces {chosen.reduce_bytes / 1e6:.2f} MB",
        f"between groups, a leader and round: {scenario.bytes_between_groups / 1e6:.2f} MB",
    ]


def _table(chosen: Plan, ranked: Sequence[Plan], num_rounds: int) -> list[str]:
    header = [
        "",
        "ZeRO",
        "ranks a group",
        "recompute",
        "micro-batch",
        "GB a rank",
        "s a step",
        "s a round",
        "h a run",
        "",
    ]
    rows = [header, _row("recipe", chosen, num_rounds)]
    for number, one in enumerate(ranked, 1):
        rows.append(_row(str(number), one, num_rounds))
    return aligned(rows)


def _row(name: str, one: Plan, num_rounds: int) -> list[str]:
    layout = one.layout
    zero = str(layout.stage)
    if layout.offload_params:
        zero += " offload"
    recompute, verdict = "no", ""
    if layout.checkpointing:
        recompute = "yes"
    if not one.fits:
        verdict = "does not fit"
    numbers = [f"{one.total / 1e9:.1f}", f"{one.step_seconds:.2f}", f"{one.round_seconds:.0f}"]
    numbers.append(f"{num_rounds * one.round_seconds / 3600:.1f}")
    return [name, zero, str(layout.ranks), recompute, str(layout.tokens), *numbers, verdict]


if __name__ == "__main__":
    sys.exit(main())
