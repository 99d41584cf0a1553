"""An evaluation as text: the table on the terminal and the Markdown report. Scores are 0 to 100.

`summary` is what `statistics.summarize` returns; `measure` one of its P, TTP and UNSEEN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from dpa_ds.evaluation.layout import aligned, escape, markdown_table, short_names

Json = Mapping[str, Any]
MAIN_METRIC = "rouge1"
METRIC_NAMES = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "exact_match": "exact match", "chrf": "chrF"}
MEASURES = {"P": "own tasks", "TTP": "all trained tasks", "UNSEEN": "tasks that no client trained on"}
FLOOR = "the best of a constant answer, a copy of the prompt and the first option"
"""What a floor is, for notes below tables."""
FLOOR_KINDS = ("constant", "copy", "first_option")
MAX_SHOWN = 20
"""Clients and tasks up to which the terminal shows each; the report shows all."""
_TERMINAL_WIDTH = 160
"""About as many characters stand side by side; further tasks continue below."""
_LONGEST_TASK = 11
"""Characters of a task's name on the terminal: with the spaces beside it, eight tasks, P and TTP fit the width."""
_LONGEST_LABEL = 24
_TOLERANCE = 1e-6
"""Scores and weights that differ by less are equal: they differ by rounding alone."""


def terminal_table(summary: Json, metric: str = MAIN_METRIC) -> str:
    """Clients x tasks of one metric, own tasks and scores below their floor marked, then P and TTP with intervals."""
    shown_names = short_names(task_names(summary), _LONGEST_TASK)
    lines = [_extent(summary, metric)]
    lines += _side_by_side(_terminal_columns(summary, metric, shown_names))
    lines += ["", f"* own task   ! below its floor: {FLOOR}"]
    lines += _explain_names(summary, shown_names)
    lines += _name_what_is_left_out(summary)
    lines += ["", *_terminal_measures(summary, metric)]
    return "\n".join(lines)


def _terminal_columns(summary: Json, metric: str, shown_names: Sequence[str]) -> list[list[str]]:
    """Columns of cells: header, one cell a client, the best floor, and which floor that is."""
    clients = summary["clients"][:MAX_SHOWN]
    labels = short_names(client_labels(summary), _LONGEST_LABEL)
    columns = [["client", *labels[:MAX_SHOWN], "best floor", ""]]
    for task, name in zip(summary["tasks"][:MAX_SHOWN], shown_names, strict=False):
        cells = [_terminal_score(task_score(client, task, metric)) for client in clients]
        floor = highest_floor(task, metric)
        kind = floor.kind.split("_")[0]
        columns.append([name, *cells, f"{floor.score:.1f}  ", f"{kind}  "])
    for measure in measures(summary):
        cells = [padded(measure_score(summary, client, measure, metric)) for client in clients]
        floor_of_all = number(overall_floor(summary, measure, metric))
        columns.append([measure, *cells, f"{floor_of_all} ", ""])
    return columns


def _terminal_score(score: "TaskScore | None") -> str:
    if score is None:
        return "-  "
    # Two places for the marks in every cell, so that the numbers of a column stand one below the other.
    marks = ""
    if score.own:
        marks += "*"
    if score.below:
        marks += "!"
    return f"{score.mean:.1f}{marks:2}"


def _side_by_side(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of one or more blocks that fit the terminal, each beginning with the first column."""
    first, *others = columns
    width = sum(_width(column) + 2 for column in others)
    # The first column is repeated in every block; the others are spread evenly, not filled up one by one.
    num_blocks = math.ceil(width / (_TERMINAL_WIDTH - _width(first)))
    lines = []
    for block in range(num_blocks):
        start = len(others) * block // num_blocks
        end = len(others) * (block + 1) // num_blocks
        rows = zip(first, *others[start:end], strict=True)
        lines += ["", *aligned(rows)]
    return lines


def _width(column: Sequence[str]) -> int:
    return max(map(len, column))


def _explain_names(summary: Json, shown_names: Sequence[str]) -> list[str]:
    """A line for each shown name that a number alone tells from others."""
    lines = []
    for name, task in zip(shown_names, task_names(summary)[:MAX_SHOWN], strict=False):
        if "~" in name and name != task:
            lines.append(f"{name} = {task}")
    return lines


def _name_what_is_left_out(summary: Json) -> list[str]:
    left_out = []
    for noun in ("clients", "tasks"):
        count = len(summary[noun])
        if count > MAX_SHOWN:
            left_out.append(f"{count - MAX_SHOWN} of {count} {noun}")
    if not left_out:
        return []
    return [f"not shown: {' and '.join(left_out)}"]


def _terminal_measures(summary: Json, metric: str) -> list[str]:
    rows = []
    for measure in measures(summary):
        score = overall(summary, measure, metric)
        name = f"({MEASURES[measure]})"
        rows.append([measure, name, padded(score.mean), f"95 % interval {score.interval}", f"floor {score.floor}"])
    return aligned(rows, left=2)


def markdown_report(summary: Json, title: str, details: Mapping[str, str], pictures: Sequence[str]) -> str:
    """The whole evaluation as Markdown; `pictures` are file names relative to the report."""
    parts = [f"# {escape(title)}", f"{_extent(summary, MAIN_METRIC)}."]
    if details:
        rows = [[escape(name), escape(value)] for name, value in details.items()]
        parts.append(markdown_table(["setting", "value"], rows, left=2))
    parts += ["## P and TTP", f"`!`: below its floor, {FLOOR}.", _measures_table(summary)]
    for name in pictures:
        parts.append(f"![{escape(name)}]({quote(name)})")
    main = METRIC_NAMES[MAIN_METRIC]
    parts += [f"## Clients and tasks: {main}, mean and 95 % interval", "Bold: the client's own task."]
    parts.append(_score_table(summary, MAIN_METRIC, with_interval=True))
    for metric in summary["metrics"]:
        if metric != MAIN_METRIC:
            parts += [f"### {METRIC_NAMES.get(metric, metric)}, mean", _score_table(summary, metric)]
    parts += [f"## Floors: {main}", _floor_table(summary)]
    parts += ["## Alpha, the weight of the local adapter", *_alpha_tables(summary)]
    for kind, examples in summary["examples"].items():
        if examples:
            parts += [f"## Examples: {kind}", _example_table(examples)]
    return "\n\n".join(parts) + "\n"


def _measures_table(summary: Json) -> str:
    header = ["", "metric", "mean", "95 % interval", "standard error", "best floor"]
    rows = []
    for measure in measures(summary):
        for metric in summary["metrics"]:
            names = [f"{measure}, {MEASURES[measure]}", METRIC_NAMES.get(metric, metric)]
            score = overall(summary, measure, metric)
            rows.append([*names, score.mean, score.interval, score.standard_error, score.floor])
    return markdown_table(header, rows, left=2)


def _score_table(summary: Json, metric: str, with_interval: bool = False) -> str:
    shown_measures = measures(summary)
    header = ["client"]
    last_row = ["best floor"]
    for task in summary["tasks"]:
        header.append(escape(task["task"]))
        floor = highest_floor(task, metric)
        last_row.append(f"{floor.score:.1f} {floor.kind.replace('_', ' ')}")
    for measure in shown_measures:
        header.append(measure)
        last_row.append(number(overall_floor(summary, measure, metric)))
    rows = []
    for client in summary["clients"]:
        row = [escape(client["label"])]
        for task in summary["tasks"]:
            row.append(_markdown_score(task_score(client, task, metric), with_interval))
        for measure in shown_measures:
            row.append(measure_score(summary, client, measure, metric))
        rows.append(row)
    return markdown_table(header, [*rows, last_row])


def _markdown_score(score: "TaskScore | None", with_interval: bool) -> str:
    if score is None:
        return "-"
    text = f"{score.mean:.1f}"
    if score.own:
        text = f"**{text}**"
    if score.below:
        text += "!"
    if with_interval:
        text += f" {score.interval}"
    return text


def _floor_table(summary: Json) -> str:
    header = ["task", "constant answer", "score of the constant answer", "copy of the prompt", "first option"]
    rows = []
    for task in summary["tasks"]:
        row = [escape(task["task"]), escape(task["constant_answer"], empty="-")]
        for kind in FLOOR_KINDS:
            scores = task["floors"].get(kind) or {}
            row.append(number(scores.get(MAIN_METRIC)))
        rows.append(row)
    return markdown_table(header, rows, left=2)


@dataclass(frozen=True)
class _AlphaCell:
    """The weights of one client's answers to one task."""

    client: int
    task: str
    own: bool
    num_instances: int
    values: Json
    """mean, min, max and quantiles, as the summary has them."""


def _alpha_tables(summary: Json) -> list[str]:
    """Paragraphs and tables; a weight that is the same everywhere needs one line."""
    cells = _alpha_cells(summary)
    lowest, highest = _alpha_range(cells)
    if highest - lowest < _TOLERANCE:
        return [f"Alpha is {cells[0].values['mean']:.3f} for every answer."]
    pools = [_alpha_row("all clients", cells)]
    by_task = []
    for client in summary["clients"]:
        of_client = [cell for cell in cells if cell.client == client["client"]]
        pools.append(_alpha_row(escape(client["label"]), of_client))
        by_task.append([escape(client["label"])])
    for task in summary["tasks"]:
        of_task = [cell for cell in cells if cell.task == task["task"]]
        pools.append(_alpha_row(f"task {escape(task['task'])}", of_task))
        for row, client in zip(by_task, summary["clients"], strict=True):
            row.append(_alpha_quantiles(client["alpha"].get(task["task"])))
    tasks = map(escape, task_names(summary))
    return [
        markdown_table(["answers of", "own tasks: mean", "min to max", "other tasks: mean", "min to max"], pools),
        "Mean and, in brackets, the 10 % and 90 % quantiles:",
        markdown_table(["client", *tasks], by_task),
    ]


def _alpha_cells(summary: Json) -> list[_AlphaCell]:
    num_instances = {task["task"]: task["num_instances"] for task in summary["tasks"]}
    cells = []
    for client in summary["clients"]:
        for task, values in client["alpha"].items():
            own = task in client["own_tasks"]
            cells.append(_AlphaCell(client["client"], task, own, num_instances[task], values))
    return cells


def _alpha_row(name: str, cells: Sequence[_AlphaCell]) -> list[str]:
    own = [cell for cell in cells if cell.own]
    other = [cell for cell in cells if not cell.own]
    return [name, *_pool_alpha(own), *_pool_alpha(other)]


def _pool_alpha(cells: Sequence[_AlphaCell]) -> list[str]:
    """Mean over all instances, and the range."""
    if not cells:
        return ["-", "-"]
    total, num_instances = 0.0, 0
    for cell in cells:
        total += cell.num_instances * cell.values["mean"]
        num_instances += cell.num_instances
    mean = total / num_instances
    low, high = _alpha_range(cells)
    return [f"{mean:.3f}", f"{low:.3f} to {high:.3f}"]


def _alpha_range(cells: Sequence[_AlphaCell]) -> tuple[float, float]:
    lowest = min(cell.values["min"] for cell in cells)
    highest = max(cell.values["max"] for cell in cells)
    return lowest, highest


def _alpha_quantiles(values: Json | None) -> str:
    if values is None:
        return "-"
    return f"{values['mean']:.3f} [{values['q10']:.3f}, {values['q90']:.3f}]"


def _example_table(examples: Sequence[Json]) -> str:
    if not examples:
        return "None."
    texts = ("task", "instruction", "reference", "answer")
    rows = []
    for example in examples:
        numbers = [number(example[MAIN_METRIC]), str(example["client"]), number(example["alpha"], 3)]
        rows.append([*numbers, str(example["row"]), *(escape(example[text]) for text in texts)])
    return markdown_table([METRIC_NAMES[MAIN_METRIC], "client", "alpha", "row", *texts], rows, left=8)


def _extent(summary: Json, metric: str) -> str:
    clients = _counted(len(summary["clients"]), "client")
    tasks = _counted(len(summary["tasks"]), "task")
    instances = _counted(summary["num_instances"], "instance")
    return f"{METRIC_NAMES.get(metric, metric)}, 0 to 100: {clients}, {tasks}, {instances}"


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"


# ---- scores and floors of a summary ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskScore:
    """Score of one client on one task, 0 to 100."""

    mean: float
    interval: str
    own: bool
    """The client trained on the task."""
    below: bool
    """Below the best floor of the task."""


@dataclass(frozen=True)
class OverallScore:
    """P, TTP or UNSEEN of all clients, as shown."""

    mean: str
    """With "!" if below its floor."""
    interval: str
    standard_error: str
    floor: str


@dataclass(frozen=True)
class Floor:
    """What an answer is worth that needs no model."""

    score: float
    kind: str
    """One of FLOOR_KINDS."""


def task_names(summary: Json) -> list[str]:
    """Names of the evaluated tasks."""
    return [task["task"] for task in summary["tasks"]]


def client_labels(summary: Json) -> list[str]:
    """Names of the clients that were asked."""
    return [client["label"] for client in summary["clients"]]


def measures(summary: Json) -> list[str]:
    """P, TTP, and UNSEEN where there are unseen tasks."""
    return [measure for measure in MEASURES if summary.get(measure)]


def task_score(client: Json, task: Json, metric: str) -> TaskScore | None:
    """Score of an entry of `clients` on one of `tasks`; None where the client was not asked."""
    name = task["task"]
    if name not in client["scores"]:
        return None
    values = client["scores"][name][metric]
    below = is_below(values["mean"], highest_floor(task, metric).score)
    return TaskScore(values["mean"], _interval(values), name in client["own_tasks"], below)


def measure_score(summary: Json, client: Json, measure: str, metric: str) -> str:
    """P, TTP or UNSEEN of one client, with "!" if below the mean floor of the same tasks; "-" if it has none."""
    scores = client.get(measure) or {}
    return marked_number(scores.get(metric), client_floor(summary, client, measure, metric))


def overall(summary: Json, measure: str, metric: str) -> OverallScore:
    """P, TTP or UNSEEN over all clients."""
    values = summary[measure][metric]
    floor = overall_floor(summary, measure, metric)
    mean = marked_number(values["mean"], floor)
    return OverallScore(mean, _interval(values), number(values["standard_error"], 2), number(floor))


def highest_floor(task: Json, metric: str) -> Floor:
    """The highest floor of a task; of equal ones the last by name."""
    known = [(scores[metric], kind) for kind, scores in task["floors"].items() if scores is not None]
    score, kind = max(known)
    return Floor(score, kind)


def client_floor(summary: Json, client: Json, measure: str, metric: str) -> float | None:
    """Mean of the best floors over the tasks that the client's P, TTP or UNSEEN is the mean of."""
    floors = []
    for task in summary["tasks"]:
        if task["task"] in client["scores"] and _counts(task, client, measure):
            floors.append(highest_floor(task, metric).score)
    return _mean(floors)


def _counts(task: Json, client: Json, measure: str) -> bool:
    """Whether the task counts for the client's `measure`."""
    if measure == "P":
        return task["task"] in client["own_tasks"]
    is_trained = bool(task["clients"])
    if measure == "TTP":
        return is_trained
    return not is_trained


def overall_floor(summary: Json, measure: str, metric: str) -> float | None:
    """The mean floor over clients. The summary has none for unseen tasks: averaged here, as the scores are."""
    if measure in summary["floors"]:
        return float(summary["floors"][measure][metric])
    # A client without unseen tasks has no score, and no floor, either.
    floors = []
    for client in summary["clients"]:
        floor = client_floor(summary, client, measure, metric)
        if floor is not None:
            floors.append(floor)
    return _mean(floors)


def _mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return sum(values) / len(values)


def is_below(score: float | None, floor: float | None) -> bool:
    """Whether both are known and the score is lower: a model that always gives the constant answer is not."""
    return score is not None and floor is not None and score < floor - _TOLERANCE


# ---- numbers as they are shown ---------------------------------------------------------------------------------


def number(value: float | None, decimals: int = 1) -> str:
    """A score as shown; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:.{decimals}f}"


def marked_number(score: float | None, floor: float | None) -> str:
    """A score as shown, with "!" if it is below its floor."""
    if is_below(score, floor):
        return f"{number(score)}!"
    return number(score)


def padded(score: str) -> str:
    """A place for the mark in every row, so that the numbers stand one below the other."""
    if score.endswith("!"):
        return score
    return f"{score} "


def _interval(values: Json) -> str:
    return f"[{values['low']:.1f}, {values['high']:.1f}]"
