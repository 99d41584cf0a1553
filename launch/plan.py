"""What fits, and how fast: `python launch/plan.py --config RECIPE --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from dpa_ds.config_loader import load_config, load_deepspeed_json
from dpa_ds.errors import ConfigError, DpaError, storage_errors
from dpa_ds.planning.hardware import GPUS, parse_cluster
from dpa_ds.planning.plan import (
    LABEL_SHARE,
    LINK_EFFICIENCY,
    MFU,
    Plan,
    bytes_between_groups,
    judge,
    layout_of,
    plan,
    ranks_of_recipe,
    reason,
)
from dpa_ds.planning.shapes import PRESETS, read_shape
from dpa_ds.run_arguments import take_options

USAGE = f"""\
usage: python launch/plan.py --config RECIPE --cluster TEXT [--model PRESET] [--json FILE] [--SECTION.FIELD VALUE]

Memory per rank, bytes and seconds of the recipe, and other layouts ranked by seconds per round. Needs no GPU and no weights:
model.path/config.json, or a preset. Estimates: memory is checked against measured peaks on CPU, time against nothing.

  --cluster TEXT   nodes=8,gpus=4,gpu=h100-80g,net=400Gb; memory=80GB and flops=9e14 override those of gpu
                   gpu: {", ".join(GPUS)}
  --model PRESET   {", ".join(PRESETS)}
  --json FILE      write the same numbers
"""


def main(argv: list[str]) -> int:
    """Exit status 0, or that of the error that was printed."""
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(USAGE)
        return 0
    try:
        own, rest = take_options(argv, ("cluster", "model", "json"))
        config = load_config(rest)
        if "cluster" not in own:
            raise ConfigError(
                "no cluster: describe it with --cluster nodes=8,gpus=4,gpu=h100-80g,net=400Gb (see --help)"
            )
        cluster = parse_cluster(own["cluster"])
        shape = read_shape(config.model.path, own.get("model"))
        zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
        shape.lora_parameters(config.lora.rank, config.lora.target_modules)  # else it names the modules that it lacks
        chosen = judge(shape, config, cluster, layout_of(shape, config, zero, ranks_of_recipe(config, cluster)))
        ranked = plan(shape, config, zero, cluster)
        if "json" in own:
            with storage_errors(own["json"], "choose another file with --json"):
                Path(own["json"]).write_text(
                    json.dumps({"recipe": asdict(chosen), "ranked": [asdict(p) for p in ranked]}, indent=1)
                )
    except DpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{shape.parameters / 1e9:.2f} G parameters; assumed: MFU {MFU}, links {LINK_EFFICIENCY}, labels {LABEL_SHARE}"
    )
    print("recipe: " + "; ".join(f"{part} {size / 1e9:.2f} GB" for part, size in chosen.memory.items()))
    print(f"between groups, a leader and round: {bytes_between_groups(shape, config) / 1e6:.2f} MB")
    for name, one in (("recipe", chosen), *((f"{i + 1}", one) for i, one in enumerate(ranked[:8]))):
        print(f"{name:>7} {_line(one)}")
    print(f"why 1: {reason(ranked, cluster)}")
    return 0


def _line(one: Plan) -> str:
    layout = one.layout
    return (
        f"ZeRO {layout.stage}, {layout.ranks} ranks a group, recompute {'yes' if layout.checkpointing else 'no '}: "
        f"{sum(one.memory.values()) / 1e9:6.1f} GB, {one.step_seconds:7.2f} s a step, {one.round_seconds:8.0f} s a round"
        f"{'' if one.fits else ', does not fit'}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
