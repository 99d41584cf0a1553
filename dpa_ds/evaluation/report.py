"""What a finished run and a finished evaluation show: a table, JSON, pictures; of an evaluation Markdown too."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.figures import HELD_OUT_LOSS, alpha_histograms, curves, heat_map, p_against_ttp
from dpa_ds.evaluation.statistics import summarize
from dpa_ds.evaluation.tables import markdown_report, overall_floor, terminal_table
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import read_records


def write_report(run_dir: Path, num_groups: int, seconds: float) -> str:
    """Write results.json and held_out_loss.png into `run_dir`; returns the table as text. Coordinator only."""
    records = read_records(run_dir / "metrics.jsonl")
    rows = _held_out_by_client(records)
    rounds = [record for record in records if record["kind"] == "round" and record["round"] > 0]
    write_file(run_dir / "results.json", json.dumps({"clients": rows, "last_round": rounds[-1]}, indent=1))
    evaluated = [row for row in rows if len(row["held_out_loss"]) > 1]
    lines = ["", f"{'client':34s} {'examples':>8s} {'held-out loss':>21s} {'change':>8s}"]
    for row in rows:
        course = row["held_out_loss"]
        values = (
            f"{course[0][1]:9.4f} -> {course[-1][1]:.4f} {_change(course):+8.1%}" if row in evaluated else "-".rjust(30)
        )
        lines.append(f"{row['label'][:34]:34s} {row['num_examples']:8d} {values:>30s}")
    if evaluated:
        courses = {row["label"]: row["held_out_loss"] for row in evaluated}
        title = "Held-out loss of each client (round 0: the base model)"
        curves(courses, run_dir / "held_out_loss.png", HELD_OUT_LOSS, title)
        fallen = sum(_change(row["held_out_loss"]) < 0 for row in evaluated)
        lines.append(f"held-out loss fell for {fallen} of {len(evaluated)} clients")
    last = rounds[-1]
    update, metrics = (int(last.get(f"bytes_handed/{purpose}", 0)) for purpose in ("update", "metrics"))
    crossing = "between leaders" if num_groups > 1 else "(one group: nothing crossed a network)"
    lines += [
        f"sent per round and leader: {_size(update)} of global adapter, {_size(metrics)} of metrics {crossing}",
        f"last round: {last['tokens_per_second']:.0f} tokens/s, computed {last['computed_share']:.0%} of the examples' tokens",
        f"adapters (PEFT format): {run_dir / 'adapters'}/global and /local/client_NN",
        f"numbers: {run_dir / 'metrics.jsonl'}, {run_dir / 'results.json'}",
        *([f"picture: {run_dir / 'held_out_loss.png'}"] if evaluated else []),
        *([f"curves: tensorboard --logdir {run_dir / 'tensorboard'}"] if (run_dir / "tensorboard").is_dir() else []),
        f"took {seconds:.0f} s",
    ]
    return "\n".join(lines)


def write_evaluation(
    folder: Path,
    instances: Sequence[Instance],
    answers: Sequence[Answer],
    clients: Sequence[ClientInfo],
    settings: Mapping[str, Any],
) -> str:
    """Write summary.json, report.md and three pictures into `folder`; returns the table as text. Coordinator only.

    Args:
        answers: one to each of `instances` from every client that was asked.
        clients: all clients of the run.
    """
    summary = summarize(instances, answers, clients)
    write_file(folder / "summary.json", json.dumps({"settings": dict(settings), **summary}, indent=1))
    heat_map(summary, folder / "scores.png")
    alpha_histograms(answers, clients, folder / "alpha.png")
    if points := _points(summary):
        p_against_ttp(points, folder / "p_against_ttp.png")
    details = {name: str(value) for name, value in settings.items()}
    title = f"{settings['run']}: {settings['method']}, {settings['weighting']}"
    pictures = ["scores.png", "alpha.png", *(["p_against_ttp.png"] if points else [])]
    write_file(folder / "report.md", markdown_report(summary, title, details, pictures))
    return "\n".join(
        [
            terminal_table(summary),
            f"report: {folder / 'report.md'}, numbers: {folder / 'summary.json'}",
            f"pictures: {', '.join(str(folder / name) for name in pictures)}",
        ]
    )


def _points(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """P and TTP (ROUGE-1) of every client and of their mean, for the picture; nobody without either."""
    points = [
        {"label": client["label"], "P": client["P"]["rouge1"], "P_error": None}
        | {"TTP": client["TTP"]["rouge1"], "TTP_error": None}
        for client in summary["clients"]
        if client["P"] and client["TTP"]
    ]
    if points:
        mean: dict[str, Any] = {"label": "mean"}
        for name in ("P", "TTP"):
            numbers, floor = summary[name]["rouge1"], overall_floor(summary, name, "rouge1")
            mean |= {name: numbers["mean"], f"{name}_error": numbers["standard_error"], f"floor_{name}": floor}
        points.append(mean)
    return points


def _held_out_by_client(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per client: label, number of examples, and held-out loss as [round, loss] pairs."""
    clients: dict[int, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "client":
            row = clients.setdefault(
                record["client"],
                {"label": record["label"], "num_examples": int(record["num_examples"]), "held_out_loss": []},
            )
            if "held_out_loss" in record:
                row["held_out_loss"].append([record["round"], record["held_out_loss"]])
    return [clients[client] for client in sorted(clients)]


def _change(course: Sequence[Sequence[float]]) -> float:
    return course[-1][1] / course[0][1] - 1


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
