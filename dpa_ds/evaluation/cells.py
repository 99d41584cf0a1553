"""The numbers of a summary as tables and pictures show them: each with its floor and its marks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Json = Mapping[str, Any]
MAIN_METRIC = "rouge1"
METRIC_NAMES = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "exact_match": "exact match", "chrf": "chrF"}
FLOOR = "the best of a constant answer, a copy of the prompt and the first option"
"""What a floor is, for notes below tables."""
MEASURES = {"P": "own tasks", "TTP": "all trained tasks", "UNSEEN": "tasks that no client trained on"}


class TaskScore(NamedTuple):
    """Score of one client on one task, 0 to 100."""

    mean: float
    interval: str
    own: bool
    """The client trained on the task."""
    below: bool
    """Below the best floor of the task."""


class Overall(NamedTuple):
    """P, TTP or UNSEEN of all clients, as shown."""

    mean: str
    """With "!" if below its floor."""
    interval: str
    standard_error: str
    floor: str


def task_cell(client: Json, task: Json, metric: str) -> TaskScore | None:
    """The cell of an entry of `clients` and one of `tasks`; None where the client was not asked."""
    if task["task"] not in client["scores"]:
        return None
    values = client["scores"][task["task"]][metric]
    below = floor_mark(values["mean"], highest_floor(task, metric)[0]) == "!"
    return TaskScore(values["mean"], _interval(values), task["task"] in client["own_tasks"], below)


def measure_cell(summary: Json, client: Json, measure: str, metric: str) -> str:
    """P, TTP or UNSEEN of one client, with "!" if below the mean floor of the same tasks; "-" if it has none."""
    score = (client.get(measure) or {}).get(metric)
    return f"{number(score)}{floor_mark(score, client_floor(summary, client, measure, metric))}"


def overall(summary: Json, measure: str, metric: str) -> Overall:
    """P, TTP or UNSEEN over all clients."""
    values, floor = summary[measure][metric], overall_floor(summary, measure, metric)
    mean = f"{number(values['mean'])}{floor_mark(values['mean'], floor)}"
    return Overall(mean, _interval(values), number(values["standard_error"], 2), number(floor))


def measures(summary: Json) -> list[str]:
    """P, TTP, and UNSEEN where there are unseen tasks."""
    return [measure for measure in MEASURES if summary.get(measure)]


def highest_floor(task: Json, metric: str) -> tuple[float, str]:
    """The highest floor of a task, and which one it is."""
    return max((scores[metric], kind) for kind, scores in task["floors"].items() if scores is not None)


def client_floor(summary: Json, client: Json, measure: str, metric: str) -> float | None:
    """Mean of the best floors over the tasks that the client's P, TTP or UNSEEN is the mean of."""
    floors = []
    for task in summary["tasks"]:
        trained = bool(task["clients"])
        counts = {"P": task["task"] in client["own_tasks"], "TTP": trained, "UNSEEN": not trained}[measure]
        if counts and task["task"] in client["scores"]:
            floors.append(highest_floor(task, metric)[0])
    return sum(floors) / len(floors) if floors else None


def overall_floor(summary: Json, measure: str, metric: str) -> float | None:
    """The summary has none for unseen tasks: averaged here, as the scores are."""
    if measure in summary["floors"]:
        return float(summary["floors"][measure][metric])
    floors = [client_floor(summary, client, measure, metric) for client in summary["clients"]]
    known = [floor for floor in floors if floor is not None]
    return sum(known) / len(known) if known else None


def floor_mark(score: float | None, floor: float | None) -> str:
    """ "!" if below. A model that gives the constant answer scores its floor up to rounding: that is not below."""
    return "!" if score is not None and floor is not None and score < floor - 1e-6 else ""


def number(value: float | None, decimals: int = 1) -> str:
    """A score as shown; "-" where there is none."""
    return "-" if value is None else f"{value:.{decimals}f}"


def padded(score: str) -> str:
    """A place for the mark in every row, so that the numbers stand one below the other."""
    return score if score.endswith("!") else f"{score} "


def _interval(values: Json) -> str:
    return f"[{values['low']:.1f}, {values['high']:.1f}]"
