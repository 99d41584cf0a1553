"""How a round scales, over eight axes of launch/scaling_study.py, several times each: a table and a picture.

    python benchmarks/scaling.py --output runs/scaling --repeats 3

Real runs of two rank groups at most, on small random Llamas with the demo's tokenizer and table (make demo), for
docs/performance.md. Interrupted, the same command resumes. The model of the round, fitted to all runs of other work,
predicts each.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from planner import Setting, write_model
from progress import measuring
from table import spread, where_and_when
from transformers import AutoTokenizer

from dpa_ds.experiments.scaling_study import Plan, predict, run_points
from dpa_ds.planning.round_model import Point, fit, simulate

DEMO = Path(".cache/demo")
MODELS = {
    "small": Setting(256, 688, 6),
    "medium": Setting(512, 1376, 8),
    "large": Setting(512, 1376, 16),
}
RECIPE = {
    "data.format": "table",
    "data.path": DEMO / "federation" / "test.jsonl",
    "data.partition.kind": "iid",
    "federation.num_rounds": 3,
    "train.batch_size": 4,
    "train.max_steps": 2,
    "evaluation.every_rounds": 0,
    "tracking.tensorboard": "false",
}
LAUNCH = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{ranks}}"


@dataclass(frozen=True)
class Experiment:
    """One axis."""

    title: str
    axis: str
    values: tuple[str, ...]
    mode: Literal["strong", "weak"] = "strong"
    clients: int = 8


EXPERIMENTS = (
    Experiment("groups", "groups", ("1", "2")),
    Experiment("groups, weak", "groups", ("1", "2"), "weak", clients=4),
    Experiment("ranks of a group", "ranks_per_group", ("1", "2")),
    Experiment("ranks of a group, weak", "ranks_per_group", ("1", "2"), "weak"),
    Experiment("steps a phase", "train.max_steps", ("1", "2", "4")),
    Experiment("clients", "data.partition.num_clients", ("4", "8", "16")),
    Experiment("adapter rank", "lora.rank", ("8", "32", "128")),
    Experiment("model", "model.path", tuple(MODELS)),
)
OTHER_COSTS = ("lora.rank", "model.path")
"""Along these axes the costs themselves change: no point says anything of another."""
Repeats = list[list[Point]]
"""Of an experiment: the points of each repeat, one for each value."""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    print(where_and_when())
    write_models(args.output / "models")
    found: dict[str, Repeats] = {}
    pool: list[Point] = []
    for experiment in EXPERIMENTS:
        repeats = [run(experiment, args.output, repeat) for repeat in range(args.repeats)]
        found[experiment.title] = repeats
        if experiment.axis not in OTHER_COSTS:
            for points in repeats:
                pool += points
    print("\n| | | ranks | s a round | tokens/s | times the first | measured / predicted by the others |")
    print("|---" * 7 + "|")
    for experiment in EXPERIMENTS:
        print("\n".join(rows(experiment, found[experiment.title], pool)))
    costs = fit(pool)
    print(f"\nfitted: {costs.token:.2e} s a token, {costs.step:.2e} s a step, {costs.round:.2e} s a round")
    adapter = args.output / "0/groups/runs/groups_1/adapters/global/adapter_model.safetensors"
    print(predict(pool, ranks=1024, clients=1000, adapter_bytes=adapter.stat().st_size, net=100e9 / 8))
    draw(found, pool, args.output / "scaling.png")


def write_models(folder: Path) -> None:
    """Those that are not there yet, each with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "SmolLM2-135M-Instruct", trust_remote_code=False)
    for name, setting in MODELS.items():
        if not (folder / name).exists():
            tokenizer.save_pretrained(folder / name)
            write_model(folder / name, replace(setting, vocab_size=len(tokenizer)))


def run(experiment: Experiment, output: Path, repeat: int) -> list[Point]:
    """One repeat of one experiment, as far as it is not done yet."""
    measuring(f"{experiment.title}, repeat {repeat + 1}")
    values = experiment.values
    models = output / "models"
    if experiment.axis == "model.path":
        values = tuple(str(models / value) for value in values)
    words = {"data.partition.num_clients": experiment.clients, "model.path": models / "small", **RECIPE}
    recipe = ["--config=launch/recipes/demo.yaml", f"--data.cache_dir={output / 'cache'}"]
    recipe += [f"--{key}={value}" for key, value in words.items()]
    folder = output / str(repeat) / experiment.title.replace(", ", "_").replace(" ", "_")
    return run_points(Plan(recipe, experiment.axis, values, experiment.mode, 1, 1, folder, LAUNCH))


def rows(experiment: Experiment, repeats: Repeats, pool: list[Point]) -> list[str]:
    """Lines of the table: median (lowest to highest) over the repeats."""
    lines = []
    title = experiment.title
    for number, value in enumerate(experiment.values):
        seconds, rates, gains, errors = [], [], [], []
        for points in repeats:
            point, first = points[number], points[0]
            rate = point.tokens / point.seconds
            seconds.append(point.seconds)
            rates.append(rate)
            gains.append(rate / (first.tokens / first.seconds))  # within a repeat: the machine may change between them
            if point in pool:
                errors.append(point.seconds / predict_alike(point, pool))
        error = ""
        if errors:
            error = spread(errors)
        ranks = str(point.ranks * len(point.groups))
        cells = [title, value, ranks, spread(seconds), spread(rates, ".0f"), spread(gains), error]
        lines.append(f"| {' | '.join(cells)} |")
        title = ""  # once, in the first line
    return lines


def predict_alike(point: Point, pool: list[Point]) -> float:
    """Seconds of `point` by the costs that all points of other work give."""
    # Not the repeats of this one either: they would predict their own noise.
    others = [other for other in pool if (other.groups, other.ranks) != (point.groups, point.ranks)]
    return simulate(point.groups, point.ranks, fit(others)).seconds


def draw(found: dict[str, Repeats], pool: list[Point], path: Path) -> None:
    """Seconds a round over each axis: every repeat a dot, the prediction from all points of other work a cross."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, experiment in zip(figure.subplots(2, 4).flat, EXPERIMENTS, strict=True):
        for number in range(len(experiment.values)):
            points = [repeat[number] for repeat in found[experiment.title]]
            axes.plot([number] * len(points), [point.seconds for point in points], "o", color="tab:blue", alpha=0.6)
            if points[0] in pool:
                axes.plot(number, predict_alike(points[0], pool), "x", color="black")
        axes.set_xticks(range(len(experiment.values)), experiment.values)
        axes.set(xlabel=experiment.title, ylim=(0, 1.1 * axes.dataLim.ymax), xlim=(-0.5, len(experiment.values) - 0.5))
        axes.grid(alpha=0.3)
    figure.supylabel("seconds a round (dots: measured, crosses: predicted by all other work)", fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
