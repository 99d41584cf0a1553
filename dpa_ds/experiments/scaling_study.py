"""The same recipe at several sizes: real runs one after another, a table, a picture, and a model fitted to them."""

import json
import logging
import os
import re
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpa_ds.config.extras import missing, no_pictures
from dpa_ds.config.load import load_config, with_overrides
from dpa_ds.config.schema import DataConfig
from dpa_ds.config.shipped import SHIPPED
from dpa_ds.config.validate import diff_configs, flatten
from dpa_ds.distributed.launchers import MAX_RANKS
from dpa_ds.errors import ConfigError
from dpa_ds.experiments.stages import program_failed
from dpa_ds.planning.round_model import Point, Work, fit, predict_without, simulate
from dpa_ds.runs.storage import UNREADABLE, write_file
from dpa_ds.runs.tracking import read_records

logger = logging.getLogger("dpa_ds")
PARTS = ("train", "aggregate", "save", "record")
"""Parts of a round whose seconds count: held-out loss and scores are left out."""
RANK_AXES = ("ranks_per_group", "groups")
"""What may be varied beside the fields of the recipe."""


@dataclass(frozen=True)
class RunSpec:
    """One run of the study."""

    ranks_per_group: int
    num_groups: int
    arguments: list[str]
    """Of launch/run.py."""


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

    def point(self, value: str) -> RunSpec:
        """The run for `value`. ConfigError: there is no such run."""
        ranks_per_group, num_groups = self.ranks_per_group, self.groups
        varied = {}
        match self.axis:
            case "ranks_per_group":
                ranks_per_group = _parse_count(self.axis, value)
            case "groups":
                num_groups = _parse_count(self.axis, value)
            case field:
                varied[field] = value
        varied |= {"name": f"{self.axis}_{Path(value).name}", "output_dir": str(self.folder / "runs")}
        varied["cluster.ranks_per_group"] = str(ranks_per_group)
        arguments = with_overrides(self.recipe, varied)
        config = load_config(arguments)
        if self.mode == "weak":
            match self.axis:
                case "ranks_per_group":
                    # A rank keeps its examples of a step.
                    batch_size = config.train.batch_size * ranks_per_group
                    arguments = with_overrides(arguments, {"train.batch_size": batch_size})
                case "groups":
                    arguments = with_overrides(arguments, _more_clients(config.data, num_groups))
                case _:
                    raise ConfigError(
                        f"--mode weak is for ranks_per_group and groups, not for {self.axis}: leave it out"
                    )
        return RunSpec(ranks_per_group, num_groups, arguments)

    def claim_folder(self) -> None:
        """Write to the folder what its runs are runs of.

        Raises:
            ConfigError: a value has no run, two have the same, or the folder holds runs of something else; nothing is
                written.
        """
        names = {Path(value).name for value in self.values}
        if len(names) < len(self.values):
            raise ConfigError(
                f"--over {self.axis}={','.join(self.values)}: each run is called by its value's last part: "
                "two are alike"
            )
        for value in self.values:
            self.point(value)
        facts = self._facts()
        record = self.folder / "experiment.json"
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ConfigError(f"--output {self.folder} is a file, not a folder: give another, or move it away")
        if record.exists():
            try:
                changed = diff_configs(dict(json.loads(record.read_text())), facts)
            except UNREADABLE as error:
                raise ConfigError(f"{record} cannot be read ({error}): give another --output, or delete it") from error
            if changed:
                raise ConfigError(
                    f"{self.folder} holds the runs of another experiment ({'; '.join(changed)}): give another "
                    "--output, or delete it"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(record, json.dumps(facts, indent=1))

    def _facts(self) -> dict[str, Any]:
        """Everything that a round's seconds may depend on but the value; more values may come later."""
        facts: dict[str, Any] = {
            "--axis": self.axis,
            "--mode": self.mode,
            "--ranks_per_group": self.ranks_per_group,
            "--groups": self.groups,
            "--launch": self.launch,
        }
        arguments = list(self.recipe)
        if self.axis not in RANK_AXES:
            # The recipe alone may lack what is varied.
            arguments = with_overrides(arguments, {self.axis: self.values[0]})
        for name, value in flatten(load_config(arguments)).items():
            if name not in ("name", "output_dir", "resume", self.axis):
                facts[name] = value
        return facts


def _parse_count(axis: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= MAX_RANKS:
        raise ConfigError(
            f"--over {axis}: {value[:40]!r} is not a number of {axis}: give whole numbers in 1..{MAX_RANKS}, such as "
            "1,2,4"
        )
    return int(value)


def _more_clients(data: DataConfig, factor: int) -> dict[str, int]:
    """The override with which every group keeps its number of clients."""
    partition = data.partition
    if data.format != "table" or partition.kind == "column" or partition.num_clients is None:
        raise ConfigError(
            "--mode weak --over groups needs data that can be divided among any number of clients: data.format table "
            "with data.partition.kind iid or dirichlet and num_clients (of one group)"
        )
    return {"data.partition.num_clients": partition.num_clients * factor}


def run_points(plan: Plan) -> list[Point]:
    """Run what is not done yet, and read all.

    Raises:
        ConfigError: as `Plan.claim_folder`.
        DpaError: a run failed; it has said why. The same command resumes from there.
    """
    plan.claim_folder()
    points = []
    for number, value in enumerate(plan.values, 1):
        spec = plan.point(value)
        config = load_config(spec.arguments)
        # Written last: a run without it was interrupted, and resumes.
        if not (config.run_dir / "results.json").exists():
            num_ranks = spec.ranks_per_group * spec.num_groups
            logger.info(f"\n=== {number} of {len(plan.values)}: {plan.axis} {value}, {num_ranks} ranks")
            launcher = shlex.split(plan.launch.replace("{ranks}", str(num_ranks)))
            command = [*launcher, str(SHIPPED / "launch" / "run.py"), *spec.arguments]
            status = subprocess.run(command, check=False).returncode
            if status:
                message = f"{plan.axis} {value} failed (see above); once mended, the same command resumes"
                raise program_failed(message, status)
        points.append(read_point(config.run_dir, spec.ranks_per_group, spec.num_groups))
    return points


def read_point(run_dir: Path, ranks: int, num_groups: int) -> Point:
    """A run's median round, without the first where there are more: that one warms up.

    Args:
        ranks: of a group.
    """
    records = read_records(run_dir / "metrics.jsonl")
    seconds: list[float] = []
    last_round = 0
    for record in records:
        if record["kind"] == "round" and record["round"] > 0:
            seconds.append(_seconds_of(record))
            last_round = max(last_round, record["round"])
    if not seconds:
        raise ConfigError(f"{run_dir} has no complete round: delete it, and run the same command again")
    groups: list[list[Work]] = [[] for _ in range(num_groups)]
    for record in records:
        if record["kind"] == "client" and record["round"] == last_round:
            work = Work(record["computed_tokens"], record["num_steps"])
            groups[record["client"] % num_groups].append(work)
    return Point(tuple(map(tuple, groups)), ranks, statistics.median(seconds[1:] or seconds))


def _seconds_of(record: Mapping[str, Any]) -> float:
    return sum(float(record.get(f"seconds/{part}", 0.0)) for part in PARTS)


def report(plan: Plan, points: Sequence[Point]) -> str:
    """Write points.json, scale.md and scale.png to the folder; the table."""
    columns = [plan.axis, "ranks", "groups", "clients", "s a round", "tokens/s", "efficiency"]
    columns += ["predicted by the others", "ratio"]
    lines = [f"{plan.mode} scaling over {plan.axis}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    first = points[0]
    for number, (value, point) in enumerate(zip(plan.values, points, strict=True)):
        num_groups = len(point.groups)
        num_ranks = point.ranks * num_groups
        num_clients = sum(map(len, point.groups))
        speed = _tokens_per_second(point)
        # Of a rank, against a rank of the first point.
        efficiency = speed / num_ranks / (_tokens_per_second(first) / first.ranks / len(first.groups))
        # Without the point itself: a model with three costs explains any three points that it is fitted to.
        predicted = predict_without(points, number)
        lines.append(
            f"| {value} | {num_ranks} | {num_groups} | {num_clients} | {point.seconds:.3f} | "
            f"{speed:.0f} | {efficiency:.2f} | {predicted:.3f} | {point.seconds / predicted:.2f} |"
        )
    costs = fit(points)
    lines += ["", f"fitted: {costs.token:.2e} s a token, {costs.step:.2e} s a step, {costs.round:.2e} s a round"]
    found = {
        "axis": plan.axis,
        "mode": plan.mode,
        "values": list(plan.values),
        "costs": asdict(costs),
        "points": [asdict(point) for point in points],
    }
    table = "\n".join(lines)
    write_file(plan.folder / "points.json", json.dumps(found, indent=1))
    write_file(plan.folder / "scale.md", table + "\n")
    if missing("figures"):
        logger.warning(no_pictures())
    else:
        _plot(plan, points)
    return table


def predict(points: Sequence[Point], ranks: int, clients: int, adapter_bytes: float, net: float) -> str:
    """A round of many clients, each like the mean of those measured, by the fitted costs: a line for the reader.

    Args:
        ranks: of the whole job.
        net: bandwidth of a leader's network, in bytes/s.
    """
    measured = points[-1]
    num_groups = min(clients, ranks // measured.ranks)
    if num_groups < 1:
        raise ConfigError(f"--predict: {ranks} ranks are less than one group of {measured.ranks}")
    mean = _mean_work(measured)
    groups = []
    for group in range(num_groups):
        num_clients = len(range(group, clients, num_groups))  # as the topology deals them out
        groups.append([mean] * num_clients)
    found = simulate(groups, measured.ranks, fit(points), adapter_bytes, net)
    return (
        f"{ranks} ranks, {clients} clients in {num_groups} groups of {measured.ranks}: {found.seconds:.2f} s a round, "
        f"of it {found.reduce:.3f} s all-reduce; groups wait {found.waiting:.0%} of the time. By costs fitted to this "
        "machine"
    )


def _mean_work(point: Point) -> Work:
    """The work of a mean client."""
    tokens, steps, num_clients = 0.0, 0.0, 0
    for group in point.groups:
        for client in group:
            tokens += client.tokens
            steps += client.steps
            num_clients += 1
    return Work(tokens / num_clients, steps / num_clients)


def _tokens_per_second(point: Point) -> float:
    return point.tokens / point.seconds


def _plot(plan: Plan, points: Sequence[Point]) -> None:
    """Seconds a round, measured and predicted, and tokens/s over the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(points))
    predicted = [predict_without(points, number) for number in places]
    seconds = [point.seconds for point in points]
    left.plot(places, seconds, "o-", label="measured")
    left.plot(places, predicted, "x", color="black", label="predicted by the others")
    left.set(ylabel="seconds a round", ylim=(0, None))
    left.legend(fontsize="small")
    right.plot(places, [_tokens_per_second(point) for point in points], "o-")
    right.set(ylabel="tokens/s", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(list(places), [Path(value).name for value in plan.values])
        axes.set(xlabel=f"{plan.axis} ({plan.mode})")
        axes.grid(alpha=0.3)
    figure.savefig(plan.folder / "scale.png", dpi=120)
