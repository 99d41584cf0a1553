"""Several evaluated runs side by side: what was trained for which method, the table, and the curves."""

import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.config.extras import no_pictures
from dpa_ds.config.schema import MethodName, WeightingKind
from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError, ConfigError
from dpa_ds.evaluation.answers import Answer, Instance, read_answers, select_answers
from dpa_ds.evaluation.figures import HELD_OUT_LOSS, Point, Score, curves, p_against_ttp
from dpa_ds.evaluation.statistics import Quantity, ScoreTable, oracle, over_seeds, paired_difference
from dpa_ds.experiments.comparison_tables import comparison_markdown, comparison_table
from dpa_ds.runs.storage import UNREADABLE, write_file
from dpa_ds.runs.tracking import read_records

METHODS: tuple[MethodName, ...] = typing.get_args(MethodName)
DUAL = ("feddpa_t", "feddpa_f")
"""Methods with both adapters, whose answers depend on the weighting."""
BASELINE = "fedit"
QUANTITIES: tuple[Quantity, ...] = ("P", "TTP")
ORACLE = "oracle: better adapter per task"
_ALONE = {"fedit": GLOBAL, "fedlora": LOCAL, LOCAL: LOCAL, "centralized": GLOBAL}
"""Method with one adapter -> that adapter, which is also the weighting that uses it alone."""
_CONTAINED_IN = {"fedit": ("feddpa_f", "fedlora"), "fedlora": ("feddpa_f",)}
"""The rounds of FedIT are those of FedDPA-F and FedLoRA, whose last phases are the same: one run has the adapters of
all three, bit for bit (tests/multirank/test_compare.py)."""


@dataclass(frozen=True)
class Candidate:
    """A weighting, and the scales (lambda; the weight itself for `fixed`) among which the held-out data chooses."""

    kind: str
    scales: tuple[float, ...] = ()
    """None: the kind's default; one: that; several: chosen by TTP on the held-out split."""


@dataclass(frozen=True)
class Entry:
    """A method and a weighting that are to be evaluated."""

    method: str
    candidate: Candidate

    def trained_as(self, methods: Sequence[str]) -> str:
        """The method whose run has this one's adapters, among `methods`."""
        for other in _CONTAINED_IN.get(self.method, ()):
            if other in methods:
                return other
        return self.method


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, read back."""

    table: ScoreTable
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Line:
    """One line of the comparison, evaluated with every seed."""

    method: str
    weighting: str
    evaluations: Sequence[Evaluated]
    """One for each seed."""

    @property
    def tables(self) -> list[ScoreTable]:
        """The scores of each seed."""
        return [evaluated.table for evaluated in self.evaluations]

    @property
    def is_oracle(self) -> bool:
        """Nobody gave these answers: they are chosen by their scores, and have no weights."""
        return self.weighting == ORACLE


def name_of_candidate(candidate: Candidate) -> str:
    """The kind, with its scale where there is one."""
    if not candidate.scales:
        return candidate.kind
    return f"{candidate.kind} {candidate.scales[0]:g}"


def parse_weightings(text: str) -> list[Candidate]:
    """`cosine:0.5,centred_cosine:0.5|1|2,global` -> candidates.

    ConfigError: an unknown kind, or a scale that is no number or out of the kind's range.
    """
    kinds = [kind for kind in typing.get_args(WeightingKind) if kind != "auto"]
    candidates: list[Candidate] = []
    for part in text.split(","):
        word = part.strip()
        kind, _, scales = word.partition(":")
        if kind not in kinds:
            raise ConfigError(f"--weightings {word} is unknown: choose among {', '.join(kinds)}")
        candidate = Candidate(kind)
        if scales:
            candidate = Candidate(kind, _parse_scales(word, kind, scales))
        if candidate not in candidates:
            candidates.append(candidate)
    return candidates


def _parse_scales(word: str, kind: str, scales: str) -> tuple[float, ...]:
    if kind in (GLOBAL, LOCAL):
        raise ConfigError(f"--weightings {word}: {kind} is one adapter alone and takes no scale: leave it out")
    numbers: list[float] = []
    try:
        for scale in scales.split("|"):
            number = float(scale)
            if number not in numbers:
                numbers.append(number)
    except ValueError as error:
        raise ConfigError(
            f"--weightings {word}: scales are numbers, such as {kind}:0.5 or {kind}:0.25|0.5|1"
        ) from error
    highest, allowed = sys.float_info.max, "must be finite and >= 0"
    if kind == "fixed":
        highest, allowed = 1.0, "must be in [0, 1]"
    for number in numbers:
        if not 0 <= number <= highest:
            raise ConfigError(f"--weightings {word}: scales of {kind} {allowed}, got {number:g}")
    return tuple(numbers)


def plan_entries(methods: Sequence[str], weightings: Sequence[Candidate]) -> list[Entry]:
    """The lines of the table: each weighting for a method with both adapters, the one adapter of the others."""
    entries = []
    for method in methods:
        candidates = weightings
        if method not in DUAL:
            candidates = [Candidate(_ALONE[method])]
        for candidate in candidates:
            entries.append(Entry(method, candidate))
    return entries


def find_evaluation(run_dir: Path, wanted: Mapping[str, Any]) -> Path | None:
    """Folder of a report on an evaluation of `run_dir` whose summary's settings contain `wanted`."""
    for path in sorted(run_dir.glob("evaluations/*/*/summary.json")):
        settings = read_summary(path)["settings"]
        if all(settings.get(key) == value for key, value in wanted.items()):
            return path.parent
    return None


def read_summary(path: Path) -> dict[str, Any]:
    """What a report says, in its own layout.

    Raises:
        CheckpointError: the file is damaged.
    """
    remedy = "delete it, then run the same command again"
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        is_whole = _has_what_is_used(summary)
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: {remedy}")
    return summary


def _has_what_is_used(summary: Mapping[str, Any]) -> bool:
    """Whether the parts of a summary that a comparison uses have their types.

    Raises:
        one of UNREADABLE: a part is missing.
    """
    for client in summary["clients"]:
        if not isinstance(client["client"], int):
            return False
        for text in (client["label"], *client["own_tasks"]):
            if not isinstance(text, str):
                return False
    if summary["TTP"] and not isinstance(summary["TTP"]["rouge1"]["mean"], int | float):
        return False
    return isinstance(summary["settings"], dict) and len(summary["floors"].values()) == len(QUANTITIES)


def read_evaluation(folder: Path, instances: Sequence[Instance]) -> Evaluated:
    """Answers to `instances` of the evaluation whose report is in `folder`, and their scores.

    Raises:
        CheckpointError: a file of the evaluation is damaged.
    """
    clients = []
    for client in read_summary(folder / "summary.json")["clients"]:
        clients.append(ClientInfo(client["client"], client["label"], tuple(client["own_tasks"])))
    client_ids = {client.client for client in clients}
    answers_dir = folder.parent / "answers"
    answers = select_answers(read_answers(answers_dir), list(client_ids), instances)
    # A report may outlive its answers: they are other files, which are deleted or cut off on their own.
    if len(answers) < len(client_ids) * len(instances):
        raise CheckpointError(
            f"{answers_dir} lacks answers that {folder} counts: delete {folder}, then run the same command again"
        )
    return Evaluated(ScoreTable.build(instances, answers, clients), answers)


def compare_lines(
    lines: Sequence[Line], floors: Mapping[Quantity, float | None], seeds: Sequence[int]
) -> dict[str, Any]:
    """What `comparison_table` shows.

    Adds a line for the oracle of each method whose adapters were both scored alone: per client and task the better one,
    the ceiling of any weighting that chooses between them by task.
    """
    all_lines = [*lines, *_oracles(lines)]
    baseline = None
    cosines: dict[str, Line] = {}
    for line in all_lines:
        if line.method == BASELINE and baseline is None:
            baseline = line
        # By the first word: a scale may follow. Of several scales the first line counts.
        if line.weighting.split()[0] == "cosine":
            cosines.setdefault(line.method, line)
    methods = []
    for line in all_lines:
        described: dict[str, Any] = {"method": line.method, "weighting": line.weighting, "floors": dict(floors)}
        for quantity in QUANTITIES:
            described[quantity] = over_seeds(_scores_of_seeds(line, quantity))
            described[f"{quantity}_difference"] = _difference(line, baseline, quantity)
            described[f"{quantity}_to_cosine"] = None
            if not line.is_oracle:
                described[f"{quantity}_to_cosine"] = _difference(line, cosines.get(line.method), quantity)
        described["weights"] = None
        if not line.is_oracle:
            described["weights"] = describe_weights(line.evaluations)
        methods.append(described)
    return {"baseline": BASELINE, "seeds": list(seeds), "methods": methods}


def _oracles(lines: Sequence[Line]) -> list[Line]:
    alone: dict[str, dict[str, Line]] = {}
    for line in lines:
        of_method = alone.setdefault(line.method, {})
        if line.weighting in (GLOBAL, LOCAL):
            of_method[line.weighting] = line
    oracles = []
    for method, of_method in alone.items():
        if len(of_method) < 2:
            continue
        evaluations = []
        # Seed by seed: adapters of different trainings are never mixed.
        for pair in zip(of_method[GLOBAL].tables, of_method[LOCAL].tables, strict=True):
            evaluations.append(Evaluated(oracle(pair), answers=()))
        oracles.append(Line(method, ORACLE, evaluations))
    return oracles


def _scores_of_seeds(line: Line, quantity: Quantity) -> list[float]:
    scores = []
    for table in line.tables:
        by_metric = table.overall(quantity)
        if by_metric is not None:
            scores.append(by_metric["rouge1"])
    return scores


def _difference(line: Line, other: Line | None, quantity: Quantity) -> dict[str, float] | None:
    """None where there is nothing to compare the line with, or only itself."""
    if other is None or line is other:
        return None
    return paired_difference(line.tables, other.tables, quantity)


def describe_weights(evaluations: Sequence[Evaluated]) -> dict[str, dict[str, float] | None]:
    """Alpha of all answers of all seeds: `own` on tasks that the client trained on, `other` on the rest.

    None where there are no answers.
    """
    own: list[float] = []
    other: list[float] = []
    for evaluated in evaluations:
        own_tasks = {client.client: client.own_tasks for client in evaluated.table.clients}
        for answer in evaluated.answers:
            if answer.task in own_tasks[answer.client]:
                own.append(answer.alpha)
            else:
                other.append(answer.alpha)
    return {"own": _describe_alphas(own), "other": _describe_alphas(other)}


def _describe_alphas(alphas: Sequence[float]) -> dict[str, float] | None:
    if not alphas:
        return None
    return {
        "num_answers": len(alphas),
        "mean": sum(alphas) / len(alphas),
        "min": min(alphas),
        "max": max(alphas),
        "share_zero": alphas.count(0.0) / len(alphas),
    }


def held_out_curve(run_dirs: Sequence[Path]) -> list[tuple[int, float]]:
    """(round, held-out loss), the mean over runs, of the rounds that all of them have."""
    losses_by_round: dict[int, dict[Path, float]] = {}
    for run_dir in run_dirs:
        for record in read_records(run_dir / "metrics.jsonl"):
            if record["kind"] == "round" and isinstance(record.get("held_out_loss"), float):
                losses_by_round.setdefault(record["round"], {})[run_dir] = record["held_out_loss"]
    curve = []
    for server_round, losses in sorted(losses_by_round.items()):
        # Else the mean would jump where a run drops out.
        if len(losses) == len(run_dirs):
            mean = sum(losses.values()) / len(losses)
            curve.append((server_round, mean))
    return curve


def write_comparison(
    folder: Path, comparison: Mapping[str, Any], series: Mapping[str, Sequence[tuple[int, float]]]
) -> str:
    """Write comparison.json, comparison.md and two pictures into `folder`; returns the table as text."""
    write_file(folder / "comparison.json", json.dumps({**comparison, "curves": series}, indent=1))
    pictures = no_pictures()
    if curves(series, folder / "convergence.png", HELD_OUT_LOSS, "Convergence: mean over clients"):
        pictures = "![convergence](convergence.png)\n\n![P against TTP](p_against_ttp.png)"
    points = []
    for line in comparison["methods"]:
        points.append(Point(f"{line['method']} {line['weighting']}", _score(line, "P"), _score(line, "TTP")))
    p_against_ttp(points, folder / "p_against_ttp.png")
    write_file(folder / "comparison.md", f"# Comparison\n\n{comparison_markdown(comparison)}\n{pictures}\n")
    return f"{comparison_table(comparison)}\ntable, numbers and pictures: {folder}/comparison.*, {folder}/*.png"


def _score(line: Mapping[str, Any], quantity: Quantity) -> Score:
    return Score(line[quantity]["mean"], line[quantity]["standard_error"], line["floors"][quantity])
