"""An evaluation as text: the table on the terminal, the Markdown report, and methods compared. Scores are 0 to 100."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from dpa_ds.evaluation.layout import aligned, escape, markdown_table, short_names

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


MAX_SHOWN = 20
_TERMINAL_WIDTH = 160
"""About as many characters stand side by side; further tasks continue below."""


def terminal_table(summary: Json, metric: str = MAIN_METRIC) -> str:
    """Clients x tasks of one metric, own tasks and scores below their floor marked, then P and TTP with intervals."""
    full = [task["task"] for task in summary["tasks"]]
    names = short_names(full, 11)
    first, *columns = _terminal_columns(summary, metric, names)
    lines = [_extent(summary, metric)]
    width = sum(max(map(len, column)) + 2 for column in columns)
    num_blocks = math.ceil(width / (_TERMINAL_WIDTH - max(map(len, first))))
    for block in range(num_blocks):
        start, end = (len(columns) * edge // num_blocks for edge in (block, block + 1))
        lines += ["", *aligned(zip(first, *columns[start:end], strict=True))]
    lines += ["", f"* own task   ! below its floor: {FLOOR}"]
    pairs = list(zip(names, full, strict=True))[:MAX_SHOWN]
    lines += [f"{name} = {whole}" for name, whole in pairs if name != whole and "~" in name]
    counts = [(len(summary["clients"]), "clients"), (len(full), "tasks")]
    left_out = [f"{count - MAX_SHOWN} of {count} {noun}" for count, noun in counts if count > MAX_SHOWN]
    lines += [f"not shown: {' and '.join(left_out)}"] if left_out else []
    rows = []
    for measure in measures(summary):
        mean, interval, _, floor = overall(summary, measure, metric)
        rows.append([measure, f"({MEASURES[measure]})", padded(mean), f"95 % interval {interval}", f"floor {floor}"])
    return "\n".join([*lines, "", *aligned(rows, left=2)])


def markdown_report(summary: Json, title: str, details: Mapping[str, str], pictures: Sequence[str]) -> str:
    """The whole evaluation as Markdown; `pictures` are file names relative to the report."""
    main = METRIC_NAMES[MAIN_METRIC]
    parts = [f"# {escape(title)}", f"{_extent(summary, MAIN_METRIC)}."]
    if details:
        parts.append(markdown_table(["setting", "value"], [[escape(k), escape(v)] for k, v in details.items()], 2))
    rows = [
        [f"{measure}, {MEASURES[measure]}", METRIC_NAMES.get(metric, metric), *overall(summary, measure, metric)]
        for measure in measures(summary)
        for metric in summary["metrics"]
    ]
    parts += ["## P and TTP", f"`!`: below its floor, {FLOOR}."]
    parts.append(markdown_table(["", "metric", "mean", "95 % interval", "standard error", "best floor"], rows, 2))
    parts += [f"![{escape(name)}]({quote(name)})" for name in pictures]
    parts += [f"## Clients and tasks: {main}, mean and 95 % interval", "Bold: the client's own task."]
    parts.append(_score_table(summary, MAIN_METRIC, with_interval=True))
    for metric in summary["metrics"]:
        if metric != MAIN_METRIC:
            parts += [f"### {METRIC_NAMES.get(metric, metric)}, mean", _score_table(summary, metric)]
    floors = [
        [escape(task["task"]), escape(task["constant_answer"])]
        + [number((task["floors"].get(kind) or {}).get(MAIN_METRIC)) for kind in ("constant", "copy", "first_option")]
        for task in summary["tasks"]
    ]
    header = ["task", "constant answer", "score of the constant answer", "copy of the prompt", "first option"]
    parts += [f"## Floors: {main}", markdown_table(header, floors, 2)]
    parts += ["## Alpha, the weight of the local adapter", *_alpha(summary)]
    for kind, examples in summary["examples"].items():
        parts += [f"## Examples: {kind}", _examples(examples)]
    return "\n\n".join(parts) + "\n"


def _terminal_columns(summary: Json, metric: str, names: Sequence[str]) -> list[list[str]]:
    """Columns of cells: header, clients, floors, which floors; `names` head the tasks."""
    clients = summary["clients"][:MAX_SHOWN]
    labels = short_names([client["label"] for client in summary["clients"]], 24)[:MAX_SHOWN]
    columns = [["client", *labels, "best floor", ""]]
    for task, name in list(zip(summary["tasks"], names, strict=True))[:MAX_SHOWN]:
        # Two places for the marks in every row, so that the numbers stand one below the other.
        cells = (task_cell(client, task, metric) for client in clients)
        marked = [f"{number(cell.mean)}{'*' * cell.own + '!' * cell.below:2}" if cell else "-  " for cell in cells]
        floor, kind = highest_floor(task, metric)
        columns.append([name, *marked, f"{floor:.1f}  ", f"{kind.split('_')[0]}  "])
    for measure in measures(summary):
        marked = [padded(measure_cell(summary, client, measure, metric)) for client in clients]
        columns.append([measure, *marked, f"{number(overall_floor(summary, measure, metric))} ", ""])
    return columns


def _score_table(summary: Json, metric: str, with_interval: bool = False) -> str:
    def shown(client: Json, task: Json) -> str:
        cell = task_cell(client, task, metric)
        if cell is None:
            return "-"
        mean = f"**{cell.mean:.1f}**" if cell.own else f"{cell.mean:.1f}"
        return f"{mean}{'!' if cell.below else ''}{f' {cell.interval}' if with_interval else ''}"

    rows = [
        [
            escape(client["label"]),
            *(shown(client, task) for task in summary["tasks"]),
            *(measure_cell(summary, client, measure, metric) for measure in measures(summary)),
        ]
        for client in summary["clients"]
    ]
    best = [highest_floor(task, metric) for task in summary["tasks"]]
    floors = [f"{floor:.1f} {kind.replace('_', ' ')}" for floor, kind in best]
    means = [number(overall_floor(summary, measure, metric)) for measure in measures(summary)]
    header = ["client", *(escape(task["task"]) for task in summary["tasks"]), *measures(summary)]
    return markdown_table(header, [*rows, ["best floor", *floors, *means]])


def _alpha(summary: Json) -> list[str]:
    """Paragraphs and tables; a weight that is the same everywhere needs one line."""
    size = {task["task"]: task["num_instances"] for task in summary["tasks"]}
    cells = [(client, task, values) for client in summary["clients"] for task, values in client["alpha"].items()]
    if max(values["max"] for *_, values in cells) - min(values["min"] for *_, values in cells) < 1e-6:
        return [f"Alpha is {cells[0][2]['mean']:.3f} for every answer."]
    groups = [("all clients", cells)]
    groups += [(escape(c["label"]), [cell for cell in cells if cell[0] is c]) for c in summary["clients"]]
    groups += [(f"task {escape(name)}", [cell for cell in cells if cell[1] == name]) for name in size]
    rows = []
    for name, members in groups:
        own = [(size[task], values) for client, task, values in members if task in client["own_tasks"]]
        other = [(size[task], values) for client, task, values in members if task not in client["own_tasks"]]
        rows.append([name, *_alpha_pool(own), *_alpha_pool(other)])
    grid = [[escape(c["label"]), *(_alpha_cell(c["alpha"].get(name)) for name in size)] for c in summary["clients"]]
    return [
        markdown_table(["answers of", "own tasks: mean", "min to max", "other tasks: mean", "min to max"], rows),
        "Mean and, in brackets, the 10 % and 90 % quantiles:",
        markdown_table(["client", *map(escape, size)], grid),
    ]


def _alpha_pool(cells: Sequence[tuple[int, Json]]) -> tuple[str, str]:
    """Mean over instances, and range, of cells given as (number of instances, their alpha)."""
    if not cells:
        return "-", "-"
    mean = sum(count * values["mean"] for count, values in cells) / sum(count for count, _ in cells)
    low, high = min(values["min"] for _, values in cells), max(values["max"] for _, values in cells)
    return f"{mean:.3f}", f"{low:.3f} to {high:.3f}"


def _alpha_cell(values: Json | None) -> str:
    return "-" if values is None else f"{values['mean']:.3f} [{values['q10']:.3f}, {values['q90']:.3f}]"


def _examples(examples: Sequence[Json]) -> str:
    texts = ("task", "instruction", "reference", "answer")
    rows = [
        [number(e[MAIN_METRIC]), str(e["client"]), number(e["alpha"], 3), str(e["row"]), *(escape(e[t]) for t in texts)]
        for e in examples
    ]
    return markdown_table([METRIC_NAMES[MAIN_METRIC], "client", "alpha", "row", *texts], rows, 8) if rows else "None."


def _extent(summary: Json, metric: str) -> str:
    counts = {"client": len(summary["clients"]), "task": len(summary["tasks"]), "instance": summary["num_instances"]}
    extent = ", ".join(f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items())
    return f"{METRIC_NAMES.get(metric, metric)}, 0 to 100: {extent}"
