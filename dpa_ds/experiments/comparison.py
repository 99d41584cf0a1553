"""Several evaluated runs side by side: what was trained for which method, the table, and the curves."""

import json
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.config.schema import MethodName, WeightingKind
from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError, ConfigError
from dpa_ds.evaluation.answers import Answer, Instance, read_answers, select_answers
from dpa_ds.evaluation.figures import HELD_OUT_LOSS, curves, p_against_ttp
from dpa_ds.evaluation.statistics import Quantity, ScoreTable, oracle, over_seeds, paired_difference
from dpa_ds.experiments.comparison_tables import comparison_markdown, comparison_table
from dpa_ds.runs.storage import UNREADABLE, write_file
from dpa_ds.runs.tracking import read_records

METHODS: tuple[MethodName, ...] = typing.get_args(MethodName)
DUAL = ("feddpa_t", "feddpa_f")
BASELINE = "fedit"
QUANTITIES: tuple[Quantity, ...] = ("P", "TTP")
_ALONE = {"fedit": GLOBAL, "fedlora": LOCAL, LOCAL: LOCAL, "centralized": GLOBAL}
_CONTAINED_IN = {"fedit": ("feddpa_f", "fedlora"), "fedlora": ("feddpa_f",)}
"""The rounds of FedIT are those of FedDPA-F and FedLoRA, whose last phases are the same: one run has the adapters of all
three, bit for bit (tests/multirank/test_compare.py)."""


@dataclass(frozen=True)
class Candidate:
    """A weighting, and the scales (lambda; the weight itself for `fixed`) among which the held-out data chooses."""

    kind: str
    scales: tuple[float, ...] = ()
    """None: the kind's default; one: that; several: chosen by TTP on the held-out split."""


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    method: str
    candidate: Candidate

    def trained_as(self, methods: Sequence[str]) -> str:
        """The method whose run has this one's adapters, among `methods`."""
        return next((other for other in _CONTAINED_IN.get(self.method, ()) if other in methods), self.method)


class Evaluated(NamedTuple):
    """One evaluation, read back."""

    table: ScoreTable
    answers: Sequence[Answer]


def name_of_candidate(candidate: Candidate) -> str:
    """The kind, with its scale where there is one."""
    return f"{candidate.kind} {candidate.scales[0]:g}" if candidate.scales else candidate.kind


def parse_weightings(text: str) -> list[Candidate]:
    """`cosine:0.5,centred_cosine:0.5|1|2,global` -> candidates.

    ConfigError: an unknown kind, or a scale that is no number or out of the kind's range.
    """
    kinds = [kind for kind in typing.get_args(WeightingKind) if kind != "auto"]
    candidates = []
    for word in text.split(","):
        kind, _, scales = word.strip().partition(":")
        if kind not in kinds:
            raise ConfigError(f"--weightings {word.strip()} is unknown: choose among {', '.join(kinds)}")
        if scales and kind in (GLOBAL, LOCAL):
            raise ConfigError(
                f"--weightings {word.strip()}: {kind} is one adapter alone and takes no scale: leave it out"
            )
        candidate = Candidate(kind, _parse_scales(word.strip(), kind, scales.split("|")) if scales else ())
        if candidate not in candidates:
            candidates.append(candidate)
    return candidates


def plan_entries(methods: Sequence[str], weightings: Sequence[Candidate]) -> list[Entry]:
    """The lines of the table: each weighting for a method with both adapters, the one adapter of the others."""
    entries = []
    for method in methods:
        candidates = weightings if method in DUAL else [Candidate(_ALONE[method])]
        entries += [Entry(method, candidate) for candidate in candidates]
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
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        clients = [(c["client"], c["label"], *c["own_tasks"]) for c in summary["clients"]]
        means = [summary["TTP"] and summary["TTP"]["rouge1"]["mean"], *summary["floors"].values()]
        whole = all(isinstance(n, int) and all(isinstance(text, str) for text in texts) for n, *texts in clients)
        whole = whole and isinstance(summary["settings"], dict) and len(means) == 3
    except UNREADABLE as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it, then run the same command again") from error
    if not whole:
        raise CheckpointError(f"{path} is damaged: delete it, then run the same command again")
    return summary


def read_evaluation(folder: Path, instances: Sequence[Instance]) -> Evaluated:
    """Answers to `instances` of the evaluation whose report is in `folder`, and their scores.

    Raises:
        CheckpointError: a file of the evaluation is damaged.
    """
    summary = read_summary(folder / "summary.json")
    clients = [ClientInfo(c["client"], c["label"], tuple(c["own_tasks"])) for c in summary["clients"]]
    answers = select_answers(read_answers(folder.parent / "answers"), [c.client for c in clients], instances)
    if len(answers) < len({client.client for client in clients}) * len(instances):
        raise CheckpointError(
            f"{folder.parent / 'answers'} lacks answers that {folder} counts: delete {folder}, then run the same command again"
        )
    return Evaluated(ScoreTable.build(instances, answers, clients), answers)


def compare_entries(
    entries: Mapping[tuple[str, str], Sequence[Evaluated]], floors: Mapping[str, float | None], seeds: Sequence[int]
) -> dict[str, Any]:
    """What `comparison_table` shows, from (method, weighting) -> one evaluation a seed.

    Adds a line for the oracle of each method whose adapters were both scored alone: per client and task the better one, the
    ceiling of any weighting that chooses between them by task.
    """
    lines = {line: [evaluated.table for evaluated in of_seeds] for line, of_seeds in entries.items()}
    for method in dict.fromkeys(method for method, _ in entries):
        alone = [lines.get((method, kind)) for kind in (GLOBAL, LOCAL)]
        if all(alone):
            pairs = zip(*(tables for tables in alone if tables), strict=True)
            lines[method, "oracle: better adapter per task"] = [oracle({"g": g, "l": l}) for g, l in pairs]  # noqa: E741
    baseline = next((tables for (method, _), tables in lines.items() if method == BASELINE), None)
    methods = []
    for (method, weighting), tables in lines.items():
        cosine = next((t for (m, w), t in lines.items() if m == method and w.split()[0] == "cosine"), None)
        evaluated = entries.get((method, weighting))
        line: dict[str, Any] = {"method": method, "weighting": weighting, "floors": dict(floors)}
        for quantity in QUANTITIES:
            overall = [table.overall(quantity) for table in tables]
            line[quantity] = over_seeds([values["rouge1"] for values in overall if values])
            line[f"{quantity}_difference"] = _difference(tables, baseline, quantity)
            line[f"{quantity}_to_cosine"] = _difference(tables, cosine, quantity) if evaluated else None
        line["weights"] = describe_weights(evaluated) if evaluated else None
        methods.append(line)
    return {"baseline": BASELINE, "seeds": list(seeds), "methods": methods}


def describe_weights(evaluations: Sequence[Evaluated]) -> dict[str, dict[str, float] | None]:
    """Alpha of all answers of all seeds: `own` on tasks that the client trained on, `other` on the rest; None: no answers."""
    alphas: dict[str, list[float]] = {"own": [], "other": []}
    for evaluated in evaluations:
        own_tasks = {client.client: client.own_tasks for client in evaluated.table.clients}
        for answer in evaluated.answers:
            alphas["own" if answer.task in own_tasks[answer.client] else "other"].append(answer.alpha)
    return {kind: _describe(values) if values else None for kind, values in alphas.items()}


def held_out_curve(run_dirs: Sequence[Path]) -> list[tuple[int, float]]:
    """(round, held-out loss), the mean over runs."""
    courses: list[dict[int, float]] = []
    for run_dir in run_dirs:
        records = [
            r
            for r in read_records(run_dir / "metrics.jsonl")
            if r["kind"] == "round" and isinstance(r.get("held_out_loss"), float)
        ]
        courses.append({record["round"]: record["held_out_loss"] for record in records})
    rounds = sorted(set.intersection(*(set(course) for course in courses)))
    return [(r, sum(course[r] for course in courses) / len(courses)) for r in rounds]


def write_comparison(
    folder: Path, comparison: Mapping[str, Any], series: Mapping[str, Sequence[tuple[int, float]]]
) -> str:
    """Write comparison.json, comparison.md and two pictures into `folder`; returns the table as text."""
    write_file(folder / "comparison.json", json.dumps({**comparison, "curves": series}, indent=1))
    curves(series, folder / "convergence.png", HELD_OUT_LOSS, "Convergence: mean over clients")
    points = [
        {"label": f"{m['method']} {m['weighting']}", "P": m["P"]["mean"], "TTP": m["TTP"]["mean"]}
        | {f"{q}_error": m[q]["standard_error"] for q in QUANTITIES}
        | {f"floor_{q}": m["floors"][q] for q in QUANTITIES}
        for m in comparison["methods"]
    ]
    p_against_ttp(points, folder / "p_against_ttp.png")
    pictures = "![convergence](convergence.png)\n\n![P against TTP](p_against_ttp.png)\n"
    write_file(folder / "comparison.md", f"# Comparison\n\n{comparison_markdown(comparison)}\n{pictures}")
    return f"{comparison_table(comparison)}\ntable, numbers and pictures: {folder}/comparison.*, {folder}/*.png"


def _parse_scales(word: str, kind: str, scales: Sequence[str]) -> tuple[float, ...]:
    try:
        numbers = tuple(dict.fromkeys(float(scale) for scale in scales))
    except ValueError as error:
        raise ConfigError(
            f"--weightings {word}: scales are numbers, such as {kind}:0.5 or {kind}:0.25|0.5|1"
        ) from error
    highest, text = (1.0, "must be in [0, 1]") if kind == "fixed" else (sys.float_info.max, "must be finite and >= 0")
    wrong = [number for number in numbers if not 0 <= number <= highest]
    if wrong:
        raise ConfigError(f"--weightings {word}: scales of {kind} {text}, got {wrong[0]:g}")
    return numbers


def _difference(
    tables: Sequence[ScoreTable], others: Sequence[ScoreTable] | None, quantity: Quantity
) -> dict[str, float] | None:
    return None if others is None or tables is others else paired_difference(tables, others, quantity)


def _describe(alphas: Sequence[float]) -> dict[str, float]:
    return {
        "num_answers": len(alphas),
        "mean": sum(alphas) / len(alphas),
        "min": min(alphas),
        "max": max(alphas),
        "share_zero": alphas.count(0.0) / len(alphas),
    }
