"""What fits, and how fast: `python launch/plan.py --config RECIPE --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb`."""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpa_ds.cli.args import take_options
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import load_config
from dpa_ds.errors import ConfigError, DpaError, storage_errors
from dpa_ds.planning.hardware import GPUS, Cluster, parse_cluster
from dpa_ds.planning.plan import (
    LABEL_SHARE,
    LINK_EFFICIENCY,
    Plan,
    Workload,
    bytes_between_groups,
    clients_of,
    judge,
    layout_of,
    plan,
    ranks_of_recipe,
    reason,
)
from dpa_ds.planning.shapes import PRESETS, Shape, read_shape

USAGE = f"""\
usage: python launch/plan.py --config RECIPE --cluster TEXT [--model PRESET] [--json FILE] [--SECTION.FIELD VALUE]

Memory per rank, bytes and seconds of the recipe, and other layouts ranked by seconds per round. Needs no GPU and no weights:
model.path/config.json, or a preset. Estimates: memory and time are checked against measurements on CPU only (docs/performance.md).

  --cluster TEXT   nodes=8,gpus=4,gpu=h100-80g,net=400Gb; memory=80GB, flops=9e14 (of the recipe's precision) and
                   mfu=0.4 (share of flops that a step reaches, assumed) override those of gpu
                   gpu: {", ".join(GPUS)}
  --model PRESET   {", ".join(PRESETS)}
  --clients N      clients (8); --examples N: training examples of each (300); --tokens N: of an example (70)
                   (in brackets: the authors' dataset1)
  --json FILE      write the same numbers
"""


def main(argv: list[str]) -> int:
    """Exit status 0, or that of the error that was printed."""
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(USAGE)
        return 0
    try:
        own, rest = take_options(argv, ("cluster", "model", "json", "clients", "examples", "tokens"))
        config = load_config(rest)
        if "cluster" not in own:
            raise ConfigError(
                "no cluster: describe it with --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb (see --help)"
            )
        cluster, work = parse_cluster(own["cluster"]), _workload(own)
        shape = read_shape(config.model.path, own.get("model"))
        zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
        layout = layout_of(config, zero, ranks_of_recipe(config, cluster, work))
        chosen = judge(shape, config, cluster, layout, work)
        ranked = plan(shape, config, zero, cluster, work)
        if "json" in own:
            with storage_errors(own["json"], "choose another file with --json"):
                Path(own["json"]).write_text(
                    json.dumps({"recipe": asdict(chosen), "ranked": [asdict(p) for p in ranked]}, indent=1)
                )
    except DpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(_assumptions(shape, cluster, work))
    print("recipe, GB a rank: " + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in chosen.memory.items()))
    print(f"a step and rank: gathers {chosen.gather_bytes / 1e9:.2f} GB, reduces {chosen.reduce_bytes / 1e6:.2f} MB")
    print(f"between groups, a leader and round: {bytes_between_groups(shape, config, work) / 1e6:.2f} MB\n")
    print("\n".join(_table(chosen, ranked[:8])))
    print(f"\nwhy 1: {reason(ranked, cluster, clients_of(config, work))}")
    return 0


def _workload(own: dict[str, str]) -> Workload:
    try:
        work = Workload(int(own.get("clients", 8)), int(own.get("examples", 300)), float(own.get("tokens", 70)))
    except ValueError as error:
        raise ConfigError(f"--clients, --examples and --tokens take a number: {error}") from error
    if not all(0 < number < math.inf for number in (work.clients, work.examples, work.tokens)):
        raise ConfigError(f"--clients, --examples and --tokens must be > 0, got {work}")
    return work


def _assumptions(shape: Shape, cluster: Cluster, work: Workload) -> str:
    return (
        f"{shape.parameters / 1e9:.2f} G parameters; {work.clients} clients x {work.examples} examples x {work.tokens:g} tokens\n"
        f"assumed: {cluster.mfu:.0%} of peak FLOP/s, {LINK_EFFICIENCY:.0%} of published bandwidth, a label at {LABEL_SHARE:.0%} of "
        "the tokens"
    )


def _table(chosen: Plan, ranked: Sequence[Plan]) -> list[str]:
    header = f"{'':7}{'ZeRO':>10}{'ranks a group':>15}{'recompute':>11}{'micro-batch':>13}{'GB a rank':>11}{'s a step':>10}{'s a round':>11}"
    lines = [header]
    for name, one in (("recipe", chosen), *((f"{i + 1}", one) for i, one in enumerate(ranked))):
        layout = one.layout
        zero = f"{layout.stage}{' offload' if layout.offload_params else ''}"
        lines.append(
            f"{name:7}{zero:>10}{layout.ranks:>15}{'yes' if layout.checkpointing else 'no':>11}{layout.tokens:>13}"
            f"{one.total / 1e9:>11.1f}{one.step_seconds:>10.2f}{one.round_seconds:>11.0f}{'' if one.fits else '  does not fit'}"
        )
    return lines


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
