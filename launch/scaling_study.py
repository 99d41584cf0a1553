"""How does it scale: `python launch/scaling_study.py --config RECIPE --over groups=1,2,4 --output runs/scale`."""

import logging
import sys
from pathlib import Path

USAGE = """\
usage: python launch/scaling_study.py --config RECIPE --over AXIS=VALUE,VALUE,... --output DIR [--SECTION.FIELD VALUE]

Runs the recipe once for each value (launch/run.py, started by a launcher of its own), and writes what a round takes to
DIR: scale.md, scale.png, points.json. A model of the round is fitted to the points; each point is also predicted by the
others alone. Runs that are done are not done again: interrupted, the same command resumes, and may have more values. A
folder is for one experiment. Take rounds of some seconds, and at least three: the first one warms up.

  --over AXIS=LIST        ranks_per_group=1,2,4   ranks that train one client
                          groups=1,2,4            rank groups, among which the clients are divided
                          SECTION.FIELD=LIST      any field: model.path=DIR,DIR, lora.rank=4,8,16,
                                                  data.partition.num_clients=4,8 (data.format table)
  --mode strong | weak    strong (default): the same work on more ranks. weak: train.batch_size grows with ranks_per_group,
                          data.partition.num_clients with groups
  --ranks_per_group N     where it is not the axis (1)
  --groups N              where it is not the axis (1)
  --launch TEXT           starts the ranks; {ranks} is their number
                          (python -m torch.distributed.run --standalone --nproc-per-node {ranks})
  --predict TEXT          ranks=1024,clients=1000,net=100Gb: a round of that size, by the costs of this machine

examples
  python launch/scaling_study.py --config launch/recipes/demo.yaml --over groups=1,2 --output runs/scale --federation.num_rounds 2
  python launch/scaling_study.py --config RECIPE --over ranks_per_group=1,2,4,8 --mode weak --output runs/weak \\
      --launch "srun --ntasks {ranks} --gpus-per-task 1 python" --predict ranks=1024,clients=1000,net=400Gb
"""
OPTIONS = ("over", "output", "mode", "ranks_per_group", "groups", "launch", "predict")


def main(argv: list[str]) -> int:
    """Exit status 0, or that of the error that was printed."""
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(USAGE)
        return 0
    from dpa_ds.cli.args import take_options
    from dpa_ds.errors import DpaError
    from dpa_ds.experiments.scaling_study import predict, report, run_points

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("dpa_ds").setLevel(logging.INFO)
    try:
        own, recipe = take_options(argv, OPTIONS)
        wanted = _prediction(own.get("predict"))
        plan = _plan(own, recipe)
        points = run_points(plan)
        print(f"\n{report(plan, points)}\n\n{plan.folder}/scale.md, scale.png, points.json")
        if wanted is not None:
            ranks, clients, net = wanted
            print(predict(points, ranks, clients, _adapter_bytes(plan, plan.values[-1]), net))
    except DpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _plan(own, recipe):  # type: ignore[no-untyped-def]
    from dpa_ds.errors import ConfigError
    from dpa_ds.experiments.scaling_study import Plan

    axis, _, values = own.get("over", "").partition("=")
    if not values or not all(values.split(",")) or ("." not in axis and axis not in ("ranks_per_group", "groups")):
        raise ConfigError(
            "--over says what is varied: ranks_per_group=1,2, groups=1,2 or SECTION.FIELD=A,B (see --help)"
        )
    if "output" not in own:
        raise ConfigError("no folder for the runs and the table: give one with --output DIR")
    mode = own.get("mode", "strong")
    if mode not in ("strong", "weak"):
        raise ConfigError(f"--mode is strong or weak, got {mode!r}")
    numbers = {name: own.get(name, "1") for name in ("ranks_per_group", "groups")}
    for name, text in numbers.items():
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"--{name} must be a whole number >= 1, got {text!r}")
    start = own.get("launch", f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{ranks}}")
    sizes = (int(numbers["ranks_per_group"]), int(numbers["groups"]))
    return Plan(recipe, axis, values.split(","), mode, *sizes, Path(own["output"]), start)


def _prediction(text):  # type: ignore[no-untyped-def]
    from dpa_ds.errors import ConfigError

    if text is None:
        return None
    words = dict(word.partition("=")[::2] for word in text.split(","))
    try:
        net = float(words.pop("net", "100Gb").removesuffix("Gb")) * 1e9 / 8
        wanted = (int(words.pop("ranks")), int(words.pop("clients")), net)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--predict {text!r}: write it like ranks=1024,clients=1000,net=100Gb") from error
    if words or not all(number > 0 for number in wanted):
        raise ConfigError(f"--predict {text!r}: write it like ranks=1024,clients=1000,net=100Gb, all > 0")
    return wanted


def _adapter_bytes(plan, value):  # type: ignore[no-untyped-def]
    from dpa_ds.config.load import load_config

    run_dir = load_config(plan.point(value)[2]).run_dir
    return (run_dir / "adapters" / "global" / "adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
