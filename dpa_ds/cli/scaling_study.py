"""Entry point of launch/scaling_study.py: how the same recipe scales."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from dpa_ds.adapters.methods import GLOBAL
from dpa_ds.cli.args import at_least_one, option, parse
from dpa_ds.cli.bootstrap import run_alone
from dpa_ds.config.load import load_config
from dpa_ds.config.paths import expand
from dpa_ds.errors import ConfigError
from dpa_ds.planning.hardware import parse_network

_WHAT_IS_VARIED = "--over says what is varied: ranks_per_group=1,2, groups=1,2 or SECTION.FIELD=A,B (see --help)"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Runs the recipe once for each value of an axis, and reports what a round takes.

    Each run is launch/run.py, started by a launcher of its own. DIR gets scale.md, scale.png and points.json.
    A model of the round is fitted to the points; each point is also predicted by the others alone. Runs that
    are done are not done
    again: interrupted, the same command resumes, and may have more values. A folder is for one experiment. Take rounds
    of some seconds, and at least three: the first one warms up.

    --over ranks_per_group=1,2,4   ranks that train one client
    --over groups=1,2,4            rank groups, among which the clients are divided
    --over SECTION.FIELD=LIST      any field: model.path=DIR,DIR, lora.rank=4,8,16,
                                   data.partition.num_clients=4,8 (data.format table)

    --SECTION.FIELD VALUE changes the recipe as for launch/run.py.

    examples
      python launch/scaling_study.py --config launch/recipes/demo.yaml --over groups=1,2 --output runs/scale \\
          --federation.num_rounds 2
      python launch/scaling_study.py --config RECIPE --over ranks_per_group=1,2,4,8 --mode weak --output runs/weak \\
          --launch "srun --ntasks {ranks} --gpus-per-task 1 python" --predict ranks=1024,clients=1000,net=400Gb
    """

    over: str = option("AXIS=VALUE,VALUE,...", missing=_WHAT_IS_VARIED)
    """What is varied."""
    output: str = option("DIR", missing="no folder for the runs and the table: give one with --output DIR")
    """Folder of the runs and the table."""
    mode: Literal["strong", "weak"] = option("strong|weak", "strong")
    """strong: the same work on more ranks; weak: train.batch_size grows with ranks_per_group,
    data.partition.num_clients with groups."""
    ranks_per_group: int = option("N", 1, must_be="a whole number >= 1", test=at_least_one)
    """Ranks of a group, where these are not the axis."""
    groups: int = option("N", 1, must_be="a whole number >= 1", test=at_least_one)
    """Rank groups, where these are not the axis."""
    launch: str | None = option("TEXT", None)
    """What starts the ranks; {ranks} is their number (default: python -m torch.distributed.run --standalone
    --nproc-per-node {ranks})."""
    predict: str | None = option("TEXT", None)
    """A round of another size, by the costs of this machine, such as ranks=1024,clients=1000,net=100Gb."""


@dataclass(frozen=True)
class Prediction:
    """The round that --predict asks for."""

    ranks: int
    clients: int
    net: float
    """Bandwidth of a leader's network, in bytes/s."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do the study in one process, without a launcher; the exit status."""
    return run_alone(partial(run, argv))


def run(argv: Sequence[str] | None) -> None:
    """Do the runs that are not done yet, and print the table.

    Raises:
        ConfigError: a mistake in the command line or the recipe; nothing was started.
        DpaError: a run failed; it has reported why.
    """
    options, recipe = parse(argv, StudyOptions, "python launch/scaling_study.py --config RECIPE")
    from dpa_ds.experiments.scaling_study import Plan, predict, report, run_points  # --help does not wait for these

    _log_to_stderr()
    axis, values = _parse_axis(options.over)
    wanted = _parse_prediction(options.predict)
    launch = options.launch or f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{ranks}}"
    folder = expand(options.output, "--output")
    plan = Plan(
        recipe,
        axis,
        values,
        options.mode,
        options.ranks_per_group,
        options.groups,
        folder,
        launch,
    )
    points = run_points(plan)
    sys.stdout.write(f"\n{report(plan, points)}\n\n{plan.folder}/scale.md, scale.png, points.json\n")
    if wanted is not None:
        largest = load_config(plan.point(plan.values[-1]).arguments)
        num_bytes = _adapter_bytes(largest.run_dir)
        sys.stdout.write(predict(points, wanted.ranks, wanted.clients, num_bytes, wanted.net) + "\n")


def _log_to_stderr() -> None:
    """Messages of this package, and warnings of libraries."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("dpa_ds").setLevel(logging.INFO)


def _parse_axis(text: str) -> tuple[str, list[str]]:
    """The axis and its values."""
    axis, _, values = text.partition("=")
    is_axis = axis in ("ranks_per_group", "groups") or "." in axis
    if not is_axis or not all(values.split(",")):
        raise ConfigError(_WHAT_IS_VARIED)
    return axis, values.split(",")


def _parse_prediction(text: str | None) -> Prediction | None:
    if text is None:
        return None
    example = f"--predict {text!r}: write it like ranks=1024,clients=1000,net=100Gb"
    words = dict(word.partition("=")[::2] for word in text.split(","))
    try:
        net = parse_network(words.pop("net", "100Gb"))
        wanted = Prediction(int(words.pop("ranks")), int(words.pop("clients")), net)
    except (KeyError, ValueError) as error:
        raise ConfigError(example) from error
    if words or not min(wanted.ranks, wanted.clients, wanted.net) > 0:
        raise ConfigError(f"{example}, all > 0")
    return wanted


def _adapter_bytes(run_dir: Path) -> int:
    """Size of what leaders exchange."""
    return (run_dir / "adapters" / GLOBAL / "adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    sys.exit(main())
