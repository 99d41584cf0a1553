"""What a finished run and a finished evaluation show: a table, JSON, pictures; of an evaluation Markdown too."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.config.extras import no_pictures
from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.figures import HELD_OUT_LOSS, Point, Score, alpha_histograms, curves, heat_map, p_against_ttp
from dpa_ds.evaluation.statistics import summarize
from dpa_ds.evaluation.tables import MAIN_METRIC, Json, markdown_report, overall_floor, terminal_table
from dpa_ds.runs.folder import LINK
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import read_records

NO_HELD_OUT = (
    '"-": the client has no held-out examples; set data.held_out_fraction, or data.test_path to a file with its tasks'
)
"""Line below a table of held-out losses that lacks some."""


@dataclass(frozen=True)
class _ClientCourse:
    """How one client fared over the rounds; results.json has these fields."""

    label: str
    num_examples: int
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    """(round, loss), where the client has held-out examples."""

    @property
    def was_evaluated(self) -> bool:
        """There is a loss to compare the first one with."""
        return len(self.held_out_loss) > 1

    @property
    def first_loss(self) -> float:
        """Before training."""
        return self.held_out_loss[0][1]

    @property
    def last_loss(self) -> float:
        """After the last round."""
        return self.held_out_loss[-1][1]

    @property
    def change(self) -> float:
        """Of the loss, relative: -0.1 is a tenth less."""
        return self.last_loss / self.first_loss - 1


def write_report(run_dir: Path, num_groups: int, seconds: float) -> str:
    """Write results.json and held_out_loss.png into `run_dir`; returns the table as text. Coordinator only.

    Args:
        seconds: how long the training took.

    Raises:
        CheckpointError: metrics.jsonl is missing, or without the records of the rounds.
    """
    records = read_records(run_dir / "metrics.jsonl")
    try:
        last_round = _last_round(records)
        courses = _courses_by_client(records)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir / 'metrics.jsonl'} lacks records of the rounds of this run ({type(error).__name__}: {error}): "
            "restore it; the adapters of the run are not affected"
        ) from error
    results = {"clients": [asdict(course) for course in courses], "last_round": last_round}
    write_file(run_dir / "results.json", json.dumps(results, indent=1))
    lines = ["", *_held_out_table(courses)]
    evaluated = [course for course in courses if course.was_evaluated]
    if evaluated:
        series = {course.label: course.held_out_loss for course in evaluated}
        # In round 0 B is 0 in both adapters: the model is the base.
        title = "Held-out loss of each client (round 0: the base model)"
        has_picture = curves(series, run_dir / "held_out_loss.png", HELD_OUT_LOSS, title)
        num_fallen = sum(course.change < 0 for course in evaluated)
        lines.append(f"held-out loss fell for {num_fallen} of {len(evaluated)} clients")
    if not all(course.held_out_loss for course in courses):
        lines.append(NO_HELD_OUT)
    lines += _cost_lines(last_round, num_groups)
    adapters = f"adapters (PEFT format): {run_dir / LINK / GLOBAL}"
    if (run_dir / LINK / LOCAL).is_dir():
        adapters += f" and /{LOCAL}/client_NN"
    lines.append(adapters)
    lines.append(f"numbers: {run_dir / 'metrics.jsonl'}, {run_dir / 'results.json'}")
    if evaluated:
        lines.append(f"picture: {run_dir / 'held_out_loss.png'}" if has_picture else no_pictures())
    if (run_dir / "tensorboard").is_dir():
        lines.append(f"curves: tensorboard --logdir {run_dir / 'tensorboard'}")
    lines.append(f"took {seconds:.0f} s")
    return "\n".join(lines)


def write_evaluation(
    folder: Path,
    instances: Sequence[Instance],
    answers: Sequence[Answer],
    clients: Sequence[ClientInfo],
    settings: Mapping[str, Any],
    num_examples: int = 0,
) -> str:
    """Write summary.json, report.md and, where there is matplotlib, three pictures into `folder`; the table as text.

    Coordinator only.

    Args:
        answers: one to each of `instances` from every client that was asked.
        clients: all clients of the run.
        num_examples: answers to show of the best, and of the worst: their texts are in the report then.
    """
    summary = summarize(instances, answers, clients, num_examples)
    write_file(folder / "summary.json", json.dumps({"settings": dict(settings), **summary}, indent=1))
    pictures = []
    if heat_map(summary, folder / "scores.png"):
        pictures.append("scores.png")
    if alpha_histograms(answers, clients, folder / "alpha.png"):
        pictures.append("alpha.png")
    points = _points_of(summary)
    if points and p_against_ttp(points, folder / "p_against_ttp.png"):
        pictures.append("p_against_ttp.png")
    details = {name: str(value) for name, value in settings.items()}
    title = f"{settings['run']}: {settings['method']}, {settings['weighting']}"
    write_file(folder / "report.md", markdown_report(summary, title, details, pictures))
    paths = ", ".join(str(folder / name) for name in pictures)
    shown = f"pictures: {paths}" if pictures else no_pictures()
    return f"{terminal_table(summary)}\nreport: {folder / 'report.md'}, numbers: {folder / 'summary.json'}\n{shown}"


def _points_of(summary: Json) -> list[Point]:
    """P and TTP (ROUGE-1) of every client that has both, and of all clients; none where no client has both."""
    points = []
    for client in summary["clients"]:
        if client["P"] and client["TTP"]:
            points.append(Point(client["label"], Score(client["P"][MAIN_METRIC]), Score(client["TTP"][MAIN_METRIC])))
    # Error and floor of the mean only: a client's own would need a line each, and the report's tables have them.
    if points:
        points.append(Point("mean", _overall_score(summary, "P"), _overall_score(summary, "TTP")))
    return points


def _overall_score(summary: Json, measure: str) -> Score:
    values = summary[measure][MAIN_METRIC]
    return Score(values["mean"], values["standard_error"], overall_floor(summary, measure, MAIN_METRIC))


def _last_round(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rounds = [record for record in records if record["kind"] == "round" and record["round"] > 0]
    return rounds[-1]


def _courses_by_client(records: Sequence[dict[str, Any]]) -> list[_ClientCourse]:
    """By client id; where only sums are shared, the one course of their mean."""
    courses: dict[int, _ClientCourse] = {}
    for record in records:
        if record["kind"] == "round" and "num_examples" in record:
            record = {"client": 0, "label": "mean over clients", **record, "kind": "client"}
        if record["kind"] != "client":
            continue
        client = record["client"]
        if client not in courses:
            courses[client] = _ClientCourse(record["label"], int(record["num_examples"]))
        if "held_out_loss" in record:
            courses[client].held_out_loss.append((record["round"], record["held_out_loss"]))
    return [courses[client] for client in sorted(courses)]


def _held_out_table(courses: Sequence[_ClientCourse]) -> list[str]:
    lines = [f"{'client':34s} {'examples':>8s} {'held-out loss':>21s} {'change':>8s}"]
    for course in courses:
        values = "-"
        if course.was_evaluated:
            values = f"{course.first_loss:9.4f} -> {course.last_loss:.4f} {course.change:+8.1%}"
        lines.append(f"{course.label[:34]:34s} {course.num_examples:8d} {values:>30s}")
    return lines


def _cost_lines(last_round: Mapping[str, Any], num_groups: int) -> list[str]:
    update = _size(last_round.get("bytes_handed/update", 0))
    metrics = _size(last_round.get("bytes_handed/metrics", 0))
    # Also a single leader counts the bytes that it would send: that they stayed on the host has to be said.
    crossing = "between leaders"
    if num_groups == 1:
        crossing = "(one group: nothing crossed a network)"
    speed = f"{last_round['tokens_per_second']:.0f} tokens/s"
    computed = f"{last_round['computed_share']:.0%} of the examples' tokens"
    return [
        f"sent per round and leader: {update} of global adapter, {metrics} of metrics {crossing}",
        f"last round: {speed}, computed {computed}",
    ]


def _size(num_bytes: float) -> str:
    value = float(int(num_bytes))
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
