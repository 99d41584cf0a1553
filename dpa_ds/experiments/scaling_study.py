"""The same recipe at several sizes: real runs one after another, a table, a picture, and a model fitted to them."""

import json
import logging
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import REPOSITORY, diff_configs, flatten
from dpa_ds.errors import ConfigError, DpaError
from dpa_ds.planning.round_model import Point, Work, fit, predict_without, simulate
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import read_records

logger = logging.getLogger("dpa_ds")
PARTS = ("train", "aggregate", "save", "record")
"""Of a round's seconds: held-out loss and scores are left out."""


@dataclass(frozen=True)
class Plan:
    """What is varied."""

    recipe: Sequence[str]
    """Arguments of launch/run.py."""
    axis: str
    """ranks_per_group, groups, or a field of the recipe."""
    values: Sequence[str]
    mode: Literal["strong", "weak"]
    ranks_per_group: int
    groups: int
    folder: Path
    launch: str
    """What starts the ranks; {ranks} is their number."""

    def point(self, value: str) -> tuple[int, int, list[str]]:
        """Ranks of a group, groups, and arguments of the run for `value`. ConfigError: there is no such run."""
        size = self.ranks_per_group if self.axis != "ranks_per_group" else _count(self.axis, value)
        groups = self.groups if self.axis != "groups" else _count(self.axis, value)
        argv = [*self.recipe, f"--name={self.axis}_{Path(value).name}", f"--output_dir={self.folder / 'runs'}"]
        argv += [f"--cluster.ranks_per_group={size}"]
        if self.axis not in ("ranks_per_group", "groups"):
            argv += [f"--{self.axis}={value}"]
        config = load_config(argv)
        if self.mode == "weak":
            argv += _grown(config, self.axis, size if self.axis == "ranks_per_group" else groups)
        return size, groups, argv

    def claim_folder(self) -> None:
        """Write to the folder what its runs are runs of.

        Raises:
            ConfigError: a value has no run, two have the same, or the folder holds runs of something else; nothing is written.
        """
        names = [Path(value).name for value in self.values]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"--over {self.axis}={','.join(self.values)}: each run is called by its value's last part: two are alike"
            )
        for value in self.values:
            self.point(value)
        record, facts = self.folder / "experiment.json", self._facts()
        changed = diff_configs(json.loads(record.read_text()), facts) if record.exists() else []
        if changed:
            raise ConfigError(
                f"{self.folder} holds the runs of another experiment ({'; '.join(changed)}): give another --output, or "
                "delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(record, json.dumps(facts, indent=1))

    def _facts(self) -> dict[str, Any]:
        """Everything that a round's seconds may depend on but the value; more values may come later."""
        varied = [] if self.axis in ("ranks_per_group", "groups") else [f"--{self.axis}={self.values[0]}"]
        recipe = flatten(load_config([*self.recipe, *varied]))  # the recipe alone may lack what is varied
        for name in ("name", "output_dir", "resume", self.axis):
            recipe.pop(name, None)
        own = {name: getattr(self, name) for name in ("axis", "mode", "ranks_per_group", "groups", "launch")}
        return {**{f"--{name}": value for name, value in own.items()}, **recipe}


def _count(axis: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--over {axis}: {value!r} is not a number of {axis}: give whole numbers >= 1, such as 1,2,4")
    return int(value)


def _grown(config: RunConfig, axis: str, factor: int) -> list[str]:
    """Weak scaling: a group's ranks keep their examples of a step, a group keeps its clients; a field has no such thing."""
    if axis not in ("ranks_per_group", "groups"):
        raise ConfigError(f"--mode weak is for ranks_per_group and groups, not for {axis}: leave it out")
    if axis == "ranks_per_group":
        return [f"--train.batch_size={config.train.batch_size * factor}"]
    partition = config.data.partition
    if config.data.format != "table" or partition.kind == "column" or partition.num_clients is None:
        raise ConfigError(
            "--mode weak --over groups needs data that can be divided among any number of clients: data.format table "
            "with data.partition.kind iid or dirichlet and num_clients (of one group)"
        )
    return [f"--data.partition.num_clients={partition.num_clients * factor}"]


def run_points(plan: Plan) -> list[Point]:
    """Run what is not done yet, and read all.

    Raises:
        ConfigError: as `Plan.claim_folder`.
        DpaError: a run failed; it has said why. The same command resumes from there.
    """
    plan.claim_folder()
    points = []
    for number, value in enumerate(plan.values, 1):
        size, groups, argv = plan.point(value)
        config = load_config(argv)
        if not (config.run_dir / "results.json").exists():
            logger.info(f"\n=== {number} of {len(plan.values)}: {plan.axis} {value}, {size * groups} ranks")
            command = [
                *shlex.split(plan.launch.replace("{ranks}", str(size * groups))),
                str(REPOSITORY / "launch" / "run.py"),
                *argv,
            ]
            status = subprocess.run(command, check=False).returncode
            if status:
                failed = DpaError(f"{plan.axis} {value} failed (see above); once mended, the same command resumes")
                failed.exit_code = status if status > 0 else 1
                raise failed
        points.append(read_point(config.run_dir, size, groups))
    return points


def read_point(run_dir: Path, ranks: int, num_groups: int) -> Point:
    """A run's median round, without the first where there are more: that one warms up."""
    records = [r for r in read_records(run_dir / "metrics.jsonl") if r["round"] > 0]
    rounds = [r for r in records if r["kind"] == "round"]
    if not rounds:
        raise ConfigError(f"{run_dir} has no complete round: delete it, and run the same command again")
    seconds = [sum(r.get(f"seconds/{part}", 0.0) for part in PARTS) for r in rounds]
    last = max(r["round"] for r in rounds)
    clients = [r for r in records if r["kind"] == "client" and r["round"] == last]
    groups = tuple(
        tuple(Work(r["computed_tokens"], r["num_steps"]) for r in clients if r["client"] % num_groups == group)
        for group in range(num_groups)
    )
    return Point(groups, ranks, statistics.median(seconds[1:] or seconds))


def report(plan: Plan, points: Sequence[Point]) -> str:
    """Write points.json, scale.md and scale.png to the folder; the table."""
    lines = [
        f"{plan.mode} scaling over {plan.axis}",
        "",
        f"| {plan.axis} | ranks | groups | clients | s a round | tokens/s | efficiency | predicted by the others | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rates = [point.tokens / point.seconds for point in points]
    for number, (value, point) in enumerate(zip(plan.values, points, strict=True)):
        ranks = point.ranks * len(point.groups)
        share = rates[number] / ranks / (rates[0] / points[0].ranks / len(points[0].groups))
        predicted = predict_without(points, number)
        lines.append(
            f"| {value} | {ranks} | {len(point.groups)} | {sum(map(len, point.groups))} | {point.seconds:.3f} | "
            f"{rates[number]:.0f} | {share:.2f} | {predicted:.3f} | {point.seconds / predicted:.2f} |"
        )
    costs = fit(points)
    lines += ["", f"fitted: {costs.token:.2e} s a token, {costs.step:.2e} s a step, {costs.round:.2e} s a round"]
    found = {"axis": plan.axis, "mode": plan.mode, "values": list(plan.values), "costs": asdict(costs)}
    table = "\n".join(lines)
    write_file(plan.folder / "points.json", json.dumps({**found, "points": [asdict(p) for p in points]}, indent=1))
    write_file(plan.folder / "scale.md", table + "\n")
    _draw(plan, points, rates)
    return table


def predict(points: Sequence[Point], ranks: int, clients: int, adapter_bytes: float, net: float) -> str:
    """A round of many clients, each like the mean of those measured, by the fitted costs: a line for the reader."""
    size = points[-1].ranks
    num_groups = min(clients, ranks // size)
    if num_groups < 1:
        raise ConfigError(f"--predict: {ranks} ranks are less than one group of {size}")
    everyone = [one for group in points[-1].groups for one in group]
    mean = Work(sum(o.tokens for o in everyone) / len(everyone), sum(o.steps for o in everyone) / len(everyone))
    groups = [[mean] * len(range(group, clients, num_groups)) for group in range(num_groups)]
    found = simulate(groups, size, fit(points), adapter_bytes, net)
    return (
        f"{ranks} ranks, {clients} clients in {num_groups} groups of {size}: {found.seconds:.2f} s a round, of it "
        f"{found.reduce:.3f} s all-reduce; groups wait {found.waiting:.0%} of the time. By costs fitted to this machine"
    )


def _draw(plan: Plan, points: Sequence[Point], rates: Sequence[float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(points))
    predicted = [predict_without(points, number) for number in places]
    left.plot(places, [point.seconds for point in points], "o-", label="measured")
    left.plot(places, predicted, "x", color="black", label="predicted by the others")
    left.set(ylabel="seconds a round", ylim=(0, None))
    left.legend(fontsize="small")
    right.plot(places, rates, "o-")
    right.set(ylabel="tokens/s", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(list(places), [Path(value).name for value in plan.values])
        axes.set(xlabel=f"{plan.axis} ({plan.mode})")
        axes.grid(alpha=0.3)
    figure.savefig(plan.folder / "scale.png", dpi=120)
