"""How a round scales, over eight axes of launch/scaling_study.py, several times each: a table and a picture of docs/performance.md.

    python benchmarks/scaling.py --output runs/scaling --repeats 3

Real runs of two rank groups at most, on small random Llamas with the demo's tokenizer and table (make demo). Interrupted, the same
command continues. The model of the round, fitted to all runs of other work, predicts each.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from planner import Setting, write_model
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
    mode: str = "strong"
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


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    print(where_and_when())
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "SmolLM2-135M-Instruct")
    for name, setting in MODELS.items():
        folder = args.output / "models" / name
        if not folder.exists():
            tokenizer.save_pretrained(folder)
            write_model(folder, replace(setting, vocab_size=len(tokenizer)))
    found = {e.title: [run(e, args.output, repeat) for repeat in range(args.repeats)] for e in EXPERIMENTS}
    costs_apply = [found[e.title] for e in EXPERIMENTS if e.axis not in OTHER_COSTS]
    pool = [point for repeats in costs_apply for repeat in repeats for point in repeat]
    print("\n| | | ranks | s a round | tokens/s | times the first | measured / predicted by the others |")
    print("|---" * 7 + "|")
    for experiment in EXPERIMENTS:
        print("\n".join(rows(experiment, found[experiment.title], pool)))
    costs = fit(pool)
    print(f"\nfitted: {costs.token:.2e} s a token, {costs.step:.2e} s a step, {costs.round:.2e} s a round")
    adapter = args.output / "0/groups/runs/groups_1/adapters/global/adapter_model.safetensors"
    print(predict(pool, ranks=1024, clients=1000, adapter_bytes=adapter.stat().st_size, net=100e9 / 8))
    draw(found, pool, args.output / "scaling.png")


def run(experiment: Experiment, output: Path, repeat: int) -> list[Point]:
    """One repeat of one experiment, as far as it is not done yet."""
    values = experiment.values
    models = output / "models"
    if experiment.axis == "model.path":
        values = tuple(str(models / value) for value in values)
    words = {"data.partition.num_clients": experiment.clients, "model.path": models / "small", **RECIPE}
    recipe = ["--config=launch/recipes/demo.yaml", f"--data.cache_dir={output / 'cache'}"]
    recipe += [f"--{key}={value}" for key, value in words.items()]
    folder = output / str(repeat) / experiment.title.replace(", ", "_").replace(" ", "_")
    return run_points(Plan(recipe, experiment.axis, values, experiment.mode, 1, 1, folder, LAUNCH))


def rows(experiment: Experiment, repeats: list[list[Point]], pool: list[Point]) -> list[str]:
    """Lines of the table: median (lowest to highest) over the repeats."""
    lines = []
    for number, value in enumerate(experiment.values):
        points = [repeat[number] for repeat in repeats]
        ranks = points[0].ranks * len(points[0].groups)
        rates = [point.tokens / point.seconds for point in points]
        first = [repeat[0].tokens / repeat[0].seconds for repeat in repeats]
        gains = [rate / one for rate, one in zip(rates, first, strict=True)]
        figures = [spread([p.seconds for p in points]), spread(rates, ".0f"), spread(gains)]
        predicted = predict_alike(points[0], pool)
        known = points[0] in pool
        figures.append(spread([point.seconds / predicted for point in points]) if known else "")
        lines.append(" | ".join(["| " + experiment.title * (number == 0), value, str(ranks), *figures]) + " |")
    return lines


def predict_alike(point: Point, pool: list[Point]) -> float:
    """Seconds of `point` by the costs that all points of other work give."""
    others = [other for other in pool if (other.groups, other.ranks) != (point.groups, point.ranks)]
    return simulate(point.groups, point.ranks, fit(others)).seconds


def draw(found: dict[str, list[list[Point]]], pool: list[Point], path: Path) -> None:
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
