"""An evaluation as pictures (PNG): heat map, alpha, P against TTP, and curves over rounds.

Each picture is a function that draws a figure, and one that writes it whole or not at all. matplotlib is imported when
it is needed: it takes a second, and most commands draw nothing.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.answers import Answer
from dpa_ds.evaluation.layout import Box, place_labels, short_names
from dpa_ds.evaluation.tables import MAIN_METRIC, METRIC_NAMES, Json, highest_floor, task_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]
"""label, P, TTP, P_error, TTP_error (None: unknown), and optionally floor_P, floor_TTP."""

HELD_OUT_LOSS = "held-out loss per answer token"
NUM_BINS = 50
MAX_PANELS = 16
MAX_NAMED = 20
"""Lines of a picture up to which each is named."""
_MAX_NUMBERED = 16
"""Rows and columns up to which the cells of a heat map are wide enough for their numbers."""
_OWN, _OTHER, _FRAME = "#1b6ca8", "#e08a1e", "#d1261b"


def heat_map(summary: Json, path: Path, metric: str = MAIN_METRIC) -> None:
    """Write the scores, clients x tasks. Raises CheckpointError, as all of these do, if the file cannot be written."""
    _write(heat_map_figure(summary, metric), path)


def alpha_histograms(answers: Iterable[Answer], clients: Sequence[ClientInfo], path: Path) -> None:
    """Write how alpha is distributed, on own tasks against other tasks."""
    _write(alpha_figure(answers, clients), path)


def p_against_ttp(points: Sequence[Point], path: Path) -> None:
    """Write P against TTP of clients or of methods."""
    _write(p_against_ttp_figure(points), path)


def curves(series: Mapping[str, Sequence[tuple[int, float]]], path: Path, ylabel: str, title: str) -> None:
    """Write one line a method over the rounds."""
    _write(curves_figure(series, ylabel, title), path)


def heat_map_figure(summary: Json, metric: str = MAIN_METRIC) -> "Figure":
    """Clients (rows) x tasks: own tasks framed, the best floors as the last row; no numbers beyond 16 x 16."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    clients, tasks = summary["clients"], summary["tasks"]
    cells = [[task_cell(client, task, metric) for task in tasks] for client in clients]
    scores = [[cell.mean if cell else math.nan for cell in row] for row in cells]
    scores.append([highest_floor(task, metric)[0] for task in tasks])
    numbered = max(len(clients) + 1, len(tasks)) <= _MAX_NUMBERED
    size, font, line = (0.75, 10, 2) if numbered else (0.34, 7, 1)
    figure = Figure(figsize=(max(6.0, 4 + size * len(tasks)), 2.4 + size * 0.7 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(scores), cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor("#dddddd")
    columns = map(_plain, short_names([task["task"] for task in tasks], 24))
    rows = map(_plain, short_names([client["label"] for client in clients], 28))
    axes.set_xticks(range(len(tasks)), [*columns], fontsize=font)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(scores)), [*rows, "best floor"], fontsize=font)
    axes.set_title(f"{METRIC_NAMES.get(metric, metric)} by client and task (framed: own tasks)")
    axes.axhline(len(clients) - 0.5, color="white", linewidth=4)
    for y, x in itertools.product(range(len(scores)), range(len(tasks))):
        cell = cells[y][x] if y < len(clients) else None
        if cell and cell.own:
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor=_FRAME, linewidth=line))
        if numbered and not math.isnan(scores[y][x]):
            text = f"{scores[y][x]:.1f}{'!' if cell and cell.below else ''}"
            axes.text(x, y, text, ha="center", va="center", color="white" if scores[y][x] > 60 else "black")
    if numbered and any(cell and cell.below for row in cells for cell in row):
        axes.set_xlabel("!: below the best floor", loc="left")
    figure.colorbar(image, ax=axes, label=f"{METRIC_NAMES.get(metric, metric)} (0 to 100)")
    return figure


def alpha_figure(answers: Iterable[Answer], clients: Sequence[ClientInfo]) -> "Figure":
    """One panel for all clients and one for each of the first 16; bars are shares of the answers of their kind."""
    from matplotlib.figure import Figure

    own_tasks = {client.client: frozenset(client.own_tasks) for client in clients}
    alphas: dict[int, tuple[list[float], list[float]]] = {client: ([], []) for client in own_tasks}
    for answer in answers:
        if answer.client in own_tasks:
            alphas[answer.client][answer.task not in own_tasks[answer.client]].append(answer.alpha)
    shown = clients[:MAX_PANELS]
    num_columns = max(1, min(4, len(shown)))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(figsize=(max(6.5, 3 * num_columns), 2.9 + 1.7 * num_rows), layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, num_columns, height_ratios=[1.5, *[1.0] * num_rows])
    whole = figure.add_subplot(grid[0, :])
    own, other = ([alpha for kinds in alphas.values() for alpha in kinds[kind]] for kind in (0, 1))
    left_out = f"; {len(clients) - MAX_PANELS} of {len(clients)} not shown alone" if len(clients) > MAX_PANELS else ""
    _histogram(whole, own, other, f"All clients{left_out}", fontsize=11)
    whole.set_ylabel("share of answers")
    whole.legend(loc="upper right")
    names = short_names([client.label for client in clients], 28)
    for place, client in enumerate(shown):
        panel = figure.add_subplot(grid[1 + place // num_columns, place % num_columns])
        _histogram(panel, *alphas[client.client], names[place], fontsize=9)
        panel.tick_params(labelsize=8)
    figure.suptitle("Alpha, the weight of the local adapter")
    figure.supxlabel("alpha", fontsize="medium")
    return figure


def p_against_ttp_figure(points: Sequence[Point]) -> "Figure":
    """TTP to the right, P up, with error bars, floors and a label beside each point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))
    figure.subplots_adjust(left=0.09, right=0.97, bottom=0.1, top=0.93)
    axes = figure.add_subplot()
    colours = [f"C{place % 10}" for place in range(len(points))]
    for point, colour in zip(points, colours, strict=True):
        errors = {"xerr": point["TTP_error"], "yerr": point["P_error"]}
        axes.errorbar(point["TTP"], point["P"], **errors, fmt="o", color=colour, elinewidth=1, capsize=3)
    _draw_floors(axes, points, colours)
    axes.margins(0.15)
    axes.set(xlabel="TTP (all trained tasks)", ylabel="P (own tasks)", title="P against TTP")
    axes.grid(alpha=0.3)
    _label_points(axes, points, colours)
    return figure


def curves_figure(series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, title: str) -> "Figure":
    """One line a method over the rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(series.items()):
        rounds, scores = zip(*sorted(values), strict=True) if values else ((), ())
        style = f"{'o' * (len(values) <= 30)}{('-', '--', ':')[place // 10 % 3]}"
        axes.plot(rounds, scores, style, markersize=4, color=f"C{place % 10}", label=_plain(name))
    axes.set(xlabel="round", ylabel=_plain(ylabel), title=_plain(title))
    rounds_shown = sorted({server_round for values in series.values() for server_round, _ in values})
    # Few rounds are marked themselves: for a single one the locator would invent fractions.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if len(rounds_shown) > 10 else FixedLocator(rounds_shown))
    axes.grid(alpha=0.3)
    if 0 < len(series) <= MAX_NAMED:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


def _histogram(axes: "Axes", own: Sequence[float], other: Sequence[float], title: str, fontsize: int) -> None:
    """Two histograms over 0 to 1; a weight that does not vary is a line with its value."""
    kinds = [kind for kind in (("own tasks", own, _OWN), ("other tasks", other, _OTHER)) if kind[1]]
    both = [*own, *other]
    means = ", ".join(f"{name.split()[0]} {sum(alphas) / len(alphas):.3f}" for name, alphas, _ in kinds)
    caption = f"mean: {means}" if both else "no answers"
    if both and max(both) - min(both) < 1e-6:
        caption = f"always {both[0]:.3f}"
        axes.axvline(both[0], color=_OWN, linewidth=3, label=caption)
        axes.set(ylim=(0, 1), yticks=(0, 1))
    else:
        for name, alphas, colour in kinds:
            weights = [1 / len(alphas)] * len(alphas)
            axes.hist(alphas, bins=NUM_BINS, range=(0.0, 1.0), weights=weights, color=colour, alpha=0.6, label=name)
    axes.set_xlim(0, 1)
    axes.set_title(f"{_plain(title)}\n{caption}", fontsize=fontsize)


def _draw_floors(axes: "Axes", points: Sequence[Point], colours: Sequence[str]) -> None:
    """A dashed line where all points share a floor; else a dash for each point, tied to it."""
    for measure, line, dash in (("P", axes.axhline, "_"), ("TTP", axes.axvline, "|")):
        every = [(p, p.get(f"floor_{measure}"), colour) for p, colour in zip(points, colours, strict=True)]
        known = [(point, floor, colour) for point, floor, colour in every if floor is not None]
        floors = [floor for _, floor, _ in known]
        if known and len(known) == len(points) and max(floors) - min(floors) < 0.05:
            line(floors[0], color="grey", linestyle="--", linewidth=1, zorder=0, label=f"floor of {measure}")
        elif known:
            axes.plot([], [], dash, color="grey", label=f"floor of {measure}, each point's own")
            for point, floor, colour in known:
                x, y = (point["TTP"], floor) if measure == "P" else (floor, point["P"])
                axes.plot([point["TTP"], x], [point["P"], y], ":", color=colour, linewidth=0.8, zorder=0)
                axes.plot(x, y, dash, color=colour, zorder=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def _label_points(axes: "Axes", points: Sequence[Point], colours: Sequence[str]) -> None:
    """A label beside each point, clear of the others, of points and of error bars as far as there is room."""
    from matplotlib.text import Text

    scale = axes.figure.dpi / 72
    axes.autoscale_view()
    names = short_names([point["label"] for point in points], 28)
    notes = []
    for point, colour, name in zip(points, colours, names, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 6}
        at = (point["TTP"], point["P"])
        notes.append(axes.annotate(_plain(name), at, (0, 0), textcoords="offset points", arrowprops=line))
        notes[-1].set(color=colour, fontsize=9 if len(points) <= 20 else 7, ha="center", va="center")
    anchors = [tuple(axes.transData.transform(note.xy)) for note in notes]
    # Of a Text: the extent of an Annotation takes in its line.
    extents = [Text.get_window_extent(note) for note in notes]
    taken = [box for point in points for box in _bars(axes, point, 5 * scale)]
    offsets = place_labels(anchors, [(box.width, box.height) for box in extents], taken, axes.bbox.extents, scale)
    for note, (dx, dy) in zip(notes, offsets, strict=True):
        note.set_position((dx / scale, dy / scale))


def _bars(axes: "Axes", point: Point, radius: float) -> Iterable[Box]:
    """What a point and its error bars cover on the canvas, in pixels."""
    x, y, across, up = point["TTP"], point["P"], point["TTP_error"] or 0.0, point["P_error"] or 0.0
    for dx, dy in ((across, 0.0), (0.0, up)):
        (x0, y0), (x1, y1) = axes.transData.transform([(x - dx, y - dy), (x + dx, y + dy)])
        yield x0 - radius, y0 - radius, x1 + radius, y1 + radius


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _write(figure: "Figure", path: Path) -> None:
    """Drawn in memory first, so that a picture that cannot be drawn leaves no file.

    Raises:
        CheckpointError: the file system refuses.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(picture.getvalue())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot write {path}: {error}: make room, or choose another folder") from error
