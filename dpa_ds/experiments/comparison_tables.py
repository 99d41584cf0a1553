"""A comparison as tables, in text and in Markdown: P and TTP, differences to the paper's weighting, weights."""

from collections.abc import Sequence
from typing import NamedTuple

from dpa_ds.evaluation.layout import aligned, escape, markdown_table
from dpa_ds.evaluation.tables import FLOOR, MAIN_METRIC, METRIC_NAMES, Json, floor_mark, padded


class _Table(NamedTuple):
    title: str
    rows: list[list[str]]
    """The header first; the first two columns are names."""
    notes: Sequence[str] = ()


def comparison_table(comparison: Json) -> str:
    """Methods with P and TTP (ROUGE-1), their differences to the baseline and to the cosine, and weights, as text."""
    parts = []
    for table in _tables(comparison):
        parts += [table.title, "", *aligned(table.rows, left=2), *(["", *table.notes] if table.notes else []), ""]
    return "\n".join(parts)


def comparison_markdown(comparison: Json) -> str:
    """What `comparison_table` shows, as Markdown."""
    parts = []
    for table in _tables(comparison):
        header, *rows = [[escape(cell, empty="") for cell in row] for row in table.rows]
        parts += [f"## {escape(table.title)}", markdown_table(header, rows, 2)]
        parts += ["\n".join(f"- {escape(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _tables(comparison: Json) -> list[_Table]:
    """Those that have rows."""
    tables = [_overall(comparison), _to_cosine(comparison), _weights(comparison)]
    return [table for table in tables if len(table.rows) > 1]


def _overall(comparison: Json) -> _Table:
    baseline, seeds = comparison["baseline"], comparison["seeds"]
    rows = [["method", "weighting", "P", "floor", "TTP", "floor", f"P - {baseline}", f"TTP - {baseline}"]]
    for entry in comparison["methods"]:
        row = [entry["method"], entry["weighting"]]
        for measure in ("P", "TTP"):
            mean, error, floor = entry[measure]["mean"], entry[measure]["standard_error"], entry["floors"][measure]
            spread = "" if error is None else f" ± {error:.2f}"
            row += [padded(f"{mean:.2f}{spread}{floor_mark(mean, floor)}"), f"{floor:.2f}"]
        rows.append([*row, _difference(entry["P_difference"]), _difference(entry["TTP_difference"])])
    spread = f"{len(seeds)} seeds ({', '.join(map(str, seeds))}): mean ± standard error over the seeds"
    notes = [
        spread if len(seeds) > 1 else f"1 seed ({seeds[0]}): no standard error over seeds exists",
        f"{METRIC_NAMES[MAIN_METRIC]}, 0 to 100; differences to {baseline} with their 95 % interval",
        f"* the interval excludes 0   ! below its floor: {FLOOR}",
    ]
    return _Table("P and TTP", rows, notes)


def _to_cosine(comparison: Json) -> _Table:
    rows = [["method", "weighting", "P - cosine", "TTP - cosine"]]
    for entry in comparison["methods"]:
        if entry["P_to_cosine"] is not None:
            differences = [_difference(entry[f"{measure}_to_cosine"]) for measure in ("P", "TTP")]
            rows.append([entry["method"], entry["weighting"], *differences])
    return _Table("Weightings against the paper's cosine, on the same adapters", rows)


def _weights(comparison: Json) -> _Table:
    rows = [["method", "weighting", *(f"{kind} tasks: {what}" for kind in ("own", "other") for what in _WEIGHTS)]]
    for entry in comparison["methods"]:
        if entry["weights"] is not None:
            cells = [cell for kind in ("own", "other") for cell in _weight_cells(entry["weights"][kind])]
            rows.append([entry["method"], entry["weighting"], *cells])
    return _Table("Alpha, the weight of the local adapter", rows)


_WEIGHTS = ("answers", "mean", "min to max", "exactly 0")


def _weight_cells(values: Json | None) -> list[str]:
    if values is None:
        return ["-"] * len(_WEIGHTS)
    extent = f"{values['min']:.3f} to {values['max']:.3f}"
    return [str(values["num_answers"]), f"{values['mean']:.3f}", extent, f"{values['share_zero']:.0%}"]


def _difference(values: Json | None) -> str:
    if values is None:
        return "-  "
    mark = " *" if values["low"] > 0 or values["high"] < 0 else "  "
    return f"{values['mean']:+.2f} [{values['low']:+.2f}, {values['high']:+.2f}]{mark}"
