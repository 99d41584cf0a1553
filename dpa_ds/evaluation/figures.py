"""An evaluation as pictures (PNG): heat map, alpha, P against TTP, and curves over rounds.

Each picture is a function that makes a figure, and one that writes it whole or not at all. matplotlib is imported when
it is needed: it takes a second, and most commands plot nothing.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpa_ds.config.extras import missing
from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.answers import Answer
from dpa_ds.evaluation.layout import short_names
from dpa_ds.evaluation.tables import (
    MAIN_METRIC,
    METRIC_NAMES,
    Json,
    client_labels,
    highest_floor,
    task_names,
    task_score,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT_LOSS = "held-out loss per answer token"
NUM_BINS = 50
MAX_PANELS = 16
MAX_NAMED = 20
"""Lines and points of a picture up to which each has a look of its own and a name in the legend."""
MAX_NUMBERED = 60
"""Points up to which each is a number that the legend explains; beyond, the report's tables tell them apart."""
_MAX_SQUARES = 16
"""Rows and columns up to which the cells of a heat map are wide enough for their numbers."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Seven, with ten colours: no two of MAX_NAMED points look alike, and neighbours differ in both."""
_ROWS_OF_LEGEND = 20
_LONGEST_NAME = 40
_OWN, _OTHER, _FRAME = "#1b6ca8", "#e08a1e", "#d1261b"


@dataclass(frozen=True)
class Score:
    """One coordinate of a point, 0 to 100."""

    mean: float
    error: float | None = None
    """Standard error; None: unknown."""
    floor: float | None = None
    """What needs no model; None: not shown."""


@dataclass(frozen=True)
class Point:
    """A client or a method in the plot of P against TTP."""

    label: str
    p: Score
    ttp: Score


def heat_map(summary: Json, path: Path, metric: str = MAIN_METRIC) -> bool:
    """Write the scores, clients x tasks.

    Returns:
        whether there is a picture, as all of these: not without matplotlib.

    Raises:
        CheckpointError: the file cannot be written.
    """
    return _draw(path, lambda: heat_map_figure(summary, metric))


def alpha_histograms(answers: Iterable[Answer], clients: Sequence[ClientInfo], path: Path) -> bool:
    """Write how alpha is distributed, on own tasks against other tasks."""
    return _draw(path, lambda: alpha_figure(answers, clients))


def p_against_ttp(points: Sequence[Point], path: Path) -> bool:
    """Write P against TTP of clients or of methods."""
    return _draw(path, lambda: p_against_ttp_figure(points))


def curves(series: Mapping[str, Sequence[tuple[int, float]]], path: Path, ylabel: str, title: str) -> bool:
    """Write one line a method over the rounds."""
    return _draw(path, lambda: curves_figure(series, ylabel, title))


# ---- heat map --------------------------------------------------------------------------------------------------


def heat_map_figure(summary: Json, metric: str = MAIN_METRIC) -> "Figure":
    """Clients (rows) x tasks: own tasks framed, the best floors as the last row; no numbers beyond 16 x 16."""
    import numpy as np
    from matplotlib.figure import Figure

    clients, tasks = summary["clients"], summary["tasks"]
    num_rows = len(clients) + 1
    is_numbered = max(num_rows, len(tasks)) <= _MAX_SQUARES
    side, font_size, frame_width = 0.34, 7, 1
    if is_numbered:
        side, font_size, frame_width = 0.75, 10, 2
    figure = Figure(figsize=(max(6.0, 4 + side * len(tasks)), 2.4 + side * 0.7 * num_rows), layout="constrained")
    axes = figure.add_subplot()
    image = np.full((num_rows, len(tasks)), math.nan)
    some_below = False
    for row, client in enumerate(clients):
        for column, task in enumerate(tasks):
            score = task_score(client, task, metric)
            if score is None:
                continue
            image[row, column] = score.mean
            some_below |= score.below
            if score.own:
                _frame(axes, row, column, frame_width)
            if is_numbered:
                _write_number(axes, row, column, score.mean, score.below)
    for column, task in enumerate(tasks):
        floor = highest_floor(task, metric).score
        image[-1, column] = floor
        if is_numbered:
            _write_number(axes, num_rows - 1, column, floor)
    shown = axes.imshow(np.ma.masked_invalid(image), cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor("#dddddd")
    axes.axhline(len(clients) - 0.5, color="white", linewidth=4)
    _name_rows_and_columns(axes, summary, font_size)
    axes.set_title(f"{METRIC_NAMES.get(metric, metric)} by client and task (framed: own tasks)")
    if is_numbered and some_below:
        axes.set_xlabel("!: below the best floor", loc="left")
    figure.colorbar(shown, ax=axes, label=f"{METRIC_NAMES.get(metric, metric)} (0 to 100)")
    return figure


def _frame(axes: "Axes", row: int, column: int, width: int) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.47, row - 0.45)
    axes.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=_FRAME, linewidth=width))


def _write_number(axes: "Axes", row: int, column: int, score: float, below: bool = False) -> None:
    text = f"{score:.1f}"
    if below:
        text += "!"
    colour = "black"
    if score > 60:  # the upper end of the colour map is dark
        colour = "white"
    axes.text(column, row, text, ha="center", va="center", color=colour)


def _name_rows_and_columns(axes: "Axes", summary: Json, font_size: int) -> None:
    tasks = short_names(task_names(summary), 24)
    clients = short_names(client_labels(summary), 28)
    rows = [*map(_plain, clients), "best floor"]
    axes.set_xticks(range(len(tasks)), [*map(_plain, tasks)], fontsize=font_size)
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows, fontsize=font_size)


# ---- alpha -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Alphas:
    """Weights of the local adapter in answers to own and to other tasks."""

    own: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)


def alpha_figure(answers: Iterable[Answer], clients: Sequence[ClientInfo]) -> "Figure":
    """One panel for all clients and one for each of the first 16; bars are shares of the answers of their kind."""
    from matplotlib.figure import Figure

    of_all, by_client = _collect_alphas(answers, clients)
    shown = clients[:MAX_PANELS]
    num_columns = max(1, min(4, len(shown)))
    num_rows = math.ceil(len(shown) / num_columns)
    figure = Figure(figsize=(max(6.5, 3 * num_columns), 2.9 + 1.7 * num_rows), layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, num_columns, height_ratios=[1.5] + [1.0] * num_rows)
    title = "All clients"
    if len(clients) > MAX_PANELS:
        title += f"; {len(clients) - MAX_PANELS} of {len(clients)} not shown alone"
    whole = figure.add_subplot(grid[0, :])
    _histogram(whole, of_all, title, font_size=11)
    whole.set_ylabel("share of answers")
    whole.legend(loc="upper right")
    names = short_names([client.label for client in clients], 28)
    for place, client in enumerate(shown):
        panel = figure.add_subplot(grid[1 + place // num_columns, place % num_columns])
        _histogram(panel, by_client[client.client], names[place], font_size=9)
        panel.tick_params(labelsize=8)
    figure.suptitle("Alpha, the weight of the local adapter")
    figure.supxlabel("alpha", fontsize="medium")
    return figure


def _collect_alphas(answers: Iterable[Answer], clients: Sequence[ClientInfo]) -> tuple[_Alphas, dict[int, _Alphas]]:
    """The weights of all `clients`, and client -> its weights."""
    of_all = _Alphas()
    by_client = {client.client: _Alphas() for client in clients}
    own_tasks = {client.client: set(client.own_tasks) for client in clients}
    for answer in answers:
        if answer.client not in by_client:
            continue
        of_client = by_client[answer.client]
        if answer.task in own_tasks[answer.client]:
            of_all.own.append(answer.alpha)
            of_client.own.append(answer.alpha)
        else:
            of_all.other.append(answer.alpha)
            of_client.other.append(answer.alpha)
    return of_all, by_client


def _histogram(axes: "Axes", alphas: _Alphas, title: str, font_size: int) -> None:
    """Two histograms over 0 to 1; a weight that does not vary is a line with its value."""
    both = [*alphas.own, *alphas.other]
    if not both:
        caption = "no answers"
    elif max(both) - min(both) < 1e-6:
        caption = f"always {both[0]:.3f}"
        axes.axvline(both[0], color=_OWN, linewidth=3, label=caption)
        axes.set(ylim=(0, 1), yticks=(0, 1))
    else:
        means = []
        for kind, values, colour in (("own", alphas.own, _OWN), ("other", alphas.other, _OTHER)):
            if values:
                shares = [1 / len(values)] * len(values)
                label = f"{kind} tasks"
                axes.hist(values, NUM_BINS, range=(0.0, 1.0), weights=shares, color=colour, alpha=0.6, label=label)
                means.append(f"{kind} {sum(values) / len(values):.3f}")
        caption = f"mean: {', '.join(means)}"
    axes.set_xlim(0, 1)
    axes.set_title(f"{_plain(title)}\n{caption}", fontsize=font_size)


# ---- P against TTP ---------------------------------------------------------------------------------------------


def p_against_ttp_figure(points: Sequence[Point]) -> "Figure":
    """TTP to the right, P up, with error bars and floors; the legend beside the plot names the points."""
    from matplotlib.figure import Figure

    # The figure grows with its legend: the plot keeps its size.
    num_columns = 1
    if len(points) <= MAX_NUMBERED:
        num_columns = math.ceil(len(points) / _ROWS_OF_LEGEND)
    figure = Figure(figsize=(7 + 3 * num_columns, 6), layout="constrained")
    axes = figure.add_subplot()
    names = short_names([point.label for point in points], _LONGEST_NAME)
    for place, (point, name) in enumerate(zip(points, names, strict=True)):
        x, y, colour = point.ttp.mean, point.p.mean, _colour(place)
        axes.errorbar(x, y, point.p.error, point.ttp.error, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
        label = None
        if len(points) <= MAX_NUMBERED:
            label = _plain(name)
        axes.plot(x, y, linestyle="none", color=colour, label=label, **_marker(place, len(points)))
    _plot_floors(axes, points)
    axes.margins(0.08)  # markers and the ends of error bars keep clear of the frame
    axes.set(xlabel="TTP (all trained tasks)", ylabel="P (own tasks)", title="P against TTP")
    axes.grid(alpha=0.3)
    _legend_beside(axes, num_columns)
    return figure


def _colour(place: int) -> str:
    return f"C{place % 10}"


def _marker(place: int, num_points: int) -> dict[str, Any]:
    """Shape and size of a point; the shape is its number where there are too many for shapes."""
    if num_points <= MAX_NAMED:
        return {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 7}
    if num_points <= MAX_NUMBERED:
        digits = str(place + 1)
        # The size bounds the longer side: two digits of it would else be smaller than one.
        return {"marker": f"${digits}$", "markersize": 4 + 3 * len(digits)}
    return {"marker": "o", "markersize": 4}


def _plot_floors(axes: "Axes", points: Sequence[Point]) -> None:
    """A dashed line where all points share a floor; else a dash for each point."""
    grey_line: dict[str, Any] = {"color": "grey", "linestyle": "--", "linewidth": 1, "zorder": 0}
    shared_p = _shared_value([point.p.floor for point in points])
    shared_ttp = _shared_value([point.ttp.floor for point in points])
    own_p, own_ttp = {}, {}
    for place, point in enumerate(points):
        if point.p.floor is not None:
            own_p[place] = (point.ttp.mean, point.p.floor)
        if point.ttp.floor is not None:
            own_ttp[place] = (point.ttp.floor, point.p.mean)
    if shared_p is not None:
        axes.axhline(shared_p, label="floor of P", **grey_line)
    else:
        _plot_own_floors(axes, points, own_p, "_", "floor of P, each point's own")
    if shared_ttp is not None:
        axes.axvline(shared_ttp, label="floor of TTP", **grey_line)
    else:
        _plot_own_floors(axes, points, own_ttp, "|", "floor of TTP, each point's own")


def _plot_own_floors(
    axes: "Axes", points: Sequence[Point], floors: Mapping[int, tuple[float, float]], dash: str, label: str
) -> None:
    """A dash at each of `floors` (place of its point -> TTP, P), tied to the point by a dotted line."""
    if not floors:
        return
    axes.plot([], [], dash, color="grey", label=label)
    for place, (ttp, p) in floors.items():
        point = points[place]
        axes.plot([point.ttp.mean, ttp], [point.p.mean, p], ":", color=_colour(place), linewidth=0.8, zorder=0)
        axes.plot(ttp, p, dash, color=_colour(place), zorder=0)


def _shared_value(floors: Sequence[float | None]) -> float | None:
    """The floor of all points, where all have one and it is the same but for rounding."""
    known = [floor for floor in floors if floor is not None]
    if not known or len(known) < len(floors) or max(known) - min(known) >= 0.05:
        return None
    return known[0]


# ---- curves ----------------------------------------------------------------------------------------------------


def curves_figure(series: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, title: str) -> "Figure":
    """One line a method over the rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    all_rounds: set[int] = set()
    for place, (name, course) in enumerate(series.items()):
        ordered = sorted(course)
        rounds = [server_round for server_round, _ in ordered]
        values = [value for _, value in ordered]
        all_rounds.update(rounds)
        marker = ""
        if len(course) <= 30:
            marker = "o"
        # Ten colours: the lines that would repeat them are dashed, then dotted.
        line = ("-", "--", ":")[place // 10 % 3]
        axes.plot(rounds, values, line, marker=marker, markersize=4, color=_colour(place), label=_plain(name))
    axes.set(xlabel="round", ylabel=_plain(ylabel), title=_plain(title))
    if len(all_rounds) > 10:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        # Few rounds are marked themselves: for a single one the locator would invent fractions.
        axes.xaxis.set_major_locator(FixedLocator(sorted(all_rounds)))
    axes.grid(alpha=0.3)
    if len(series) <= MAX_NAMED:
        _legend_beside(axes, num_columns=1)
    return figure


# ---- all pictures ----------------------------------------------------------------------------------------------


def _legend_beside(axes: "Axes", num_columns: int) -> None:
    """To the right of the plot, where it hides nothing; the layout makes room for it."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", ncols=num_columns)


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _draw(path: Path, build: Callable[[], "Figure"]) -> bool:
    """Whether the picture was written: a run's results do not depend on it."""
    if missing("figures"):
        return False
    _write(build(), path)
    return True


def _write(figure: "Figure", path: Path) -> None:
    """Rendered in memory first, so that a picture that cannot be rendered leaves no file.

    Raises:
        CheckpointError: the file system refuses.
    """
    # dpi: about 1200 x 700 pixels, so that numbers in cells can be read in a report.
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
        raise CheckpointError(f"cannot write {path}: {error}: make room, then run the same command again") from error
