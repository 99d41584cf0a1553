"""A comparison as tables, in text and in Markdown: P and TTP, differences to the paper's weighting, weights.

`comparison` is what `comparison.compare_lines` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpa_ds.evaluation.layout import aligned, escape, markdown_table
from dpa_ds.evaluation.tables import FLOOR, MAIN_METRIC, METRIC_NAMES, Json, is_below, padded

_NAMES = ("method", "weighting")
_WEIGHTS = ("answers", "mean", "min to max", "exactly 0")
"""What is shown of the weights on own and on other tasks."""


@dataclass(frozen=True)
class _Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    """The first two cells are names."""
    notes: Sequence[str] = ()


def comparison_table(comparison: Json) -> str:
    """Methods with P and TTP (ROUGE-1), their differences to the baseline and to the cosine, and weights, as text."""
    lines = []
    for table in _tables(comparison):
        lines += [table.title, "", *aligned([table.header, *table.rows], left=2), ""]
        if table.notes:
            lines += [*table.notes, ""]
    return "\n".join(lines)


def comparison_markdown(comparison: Json) -> str:
    """What `comparison_table` shows, as Markdown."""
    parts = []
    for table in _tables(comparison):
        rows = [_escaped(row) for row in table.rows]
        parts += [f"## {escape(table.title)}", markdown_table(_escaped(table.header), rows, left=2)]
        if table.notes:
            parts.append("\n".join(f"- {escape(note)}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _escaped(row: Sequence[str]) -> list[str]:
    return [escape(cell, empty="") for cell in row]


def _tables(comparison: Json) -> list[_Table]:
    """Those that have rows."""
    tables = [_overall(comparison), _to_cosine(comparison), _weights(comparison)]
    return [table for table in tables if table.rows]


def _overall(comparison: Json) -> _Table:
    baseline = comparison["baseline"]
    header = [*_NAMES, "P", "floor", "TTP", "floor", f"P - {baseline}", f"TTP - {baseline}"]
    rows = []
    for entry in comparison["methods"]:
        row = [entry["method"], entry["weighting"]]
        for measure in ("P", "TTP"):
            floor = entry["floors"][measure]
            row += [_mean(entry[measure], floor), f"{floor:.2f}"]
        row += [_difference(entry["P_difference"]), _difference(entry["TTP_difference"])]
        rows.append(row)
    notes = [
        _describe_seeds(comparison["seeds"]),
        f"{METRIC_NAMES[MAIN_METRIC]}, 0 to 100; differences to {baseline} with their 95 % interval",
        f"* the interval excludes 0   ! below its floor: {FLOOR}",
    ]
    return _Table("P and TTP", header, rows, notes)


def _to_cosine(comparison: Json) -> _Table:
    rows = []
    for entry in comparison["methods"]:
        if entry["P_to_cosine"] is not None:
            differences = [_difference(entry["P_to_cosine"]), _difference(entry["TTP_to_cosine"])]
            rows.append([entry["method"], entry["weighting"], *differences])
    header = [*_NAMES, "P - cosine", "TTP - cosine"]
    return _Table("Weightings against the paper's cosine, on the same adapters", header, rows)


def _weights(comparison: Json) -> _Table:
    header = [*_NAMES]
    header += [f"own tasks: {what}" for what in _WEIGHTS]
    header += [f"other tasks: {what}" for what in _WEIGHTS]
    rows = []
    for entry in comparison["methods"]:
        weights = entry["weights"]
        if weights is not None:
            cells = [*_weight_cells(weights["own"]), *_weight_cells(weights["other"])]
            rows.append([entry["method"], entry["weighting"], *cells])
    return _Table("Alpha, the weight of the local adapter", header, rows)


def _mean(values: Json, floor: float) -> str:
    """Mean over seeds, standard error where there are several, and "!" if below the floor."""
    text = f"{values['mean']:.2f}"
    if values["standard_error"] is not None:
        text += f" ± {values['standard_error']:.2f}"
    if is_below(values["mean"], floor):
        text += "!"
    return padded(text)


def _difference(values: Json | None) -> str:
    if values is None:
        return "-  "
    mark = "  "
    if values["low"] > 0 or values["high"] < 0:
        mark = " *"
    return f"{values['mean']:+.2f} [{values['low']:+.2f}, {values['high']:+.2f}]{mark}"


def _weight_cells(values: Json | None) -> list[str]:
    """One cell for each of _WEIGHTS."""
    if values is None:
        return ["-"] * len(_WEIGHTS)
    extent = f"{values['min']:.3f} to {values['max']:.3f}"
    return [str(values["num_answers"]), f"{values['mean']:.3f}", extent, f"{values['share_zero']:.0%}"]


def _describe_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"1 seed ({seeds[0]}): no standard error over seeds exists"
    listed = ", ".join(map(str, seeds))
    return f"{len(seeds)} seeds ({listed}): mean ± standard error over the seeds"
