"""What the pictures show is what the numbers say, and a file is a whole PNG or not there."""

import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from test_evaluation_tables import FLAN, make_summary, score_of

from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation import figures
from dpa_ds.evaluation.answers import Answer
from dpa_ds.evaluation.figures import Point, Score

ROUNDS = {"fedit": [(0, 4.0), (1, 3.0)], "feddpa_t": [(1, 2.5), (0, 4.0)]}


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def make_answers(
    num_clients: int, tasks: Sequence[str], alpha: Callable[[bool], float]
) -> tuple[list[Answer], list[ClientInfo]]:
    """Ten answers of each client to each task; client k trained on task k. `alpha` is reported whether the task is its own."""
    clients = [ClientInfo(k, f"client_{k}", (tasks[k],)) for k in range(num_clients)]
    answers = [
        Answer(c.client, t, row, alpha(t in c.own_tasks), "") for c in clients for t in tasks for row in range(10)
    ]
    return answers, clients


def make_points(num_points: int, error: float | None = 0.5, label: str = "method") -> list[Point]:
    generator = random.Random(5)
    return [
        Point(f"{label} {k}", Score(generator.gauss(72, 2), error), Score(generator.gauss(62, 2), error))
        for k in range(num_points)
    ]


def with_floors(point: Point, floor_p: float | None, floor_ttp: float | None) -> Point:
    return Point(point.label, replace(point.p, floor=floor_p), replace(point.ttp, floor=floor_ttp))


def legend_of(figure: Figure) -> Legend:
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return legend


def names_in(legend: Legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def heat_map_parts(figure: Figure) -> tuple[Any, list[str], list[tuple[int, int]]]:
    """Scores as an array, the numbers in reading order, and the framed cells as (row, column)."""
    axes = figure.axes[0]
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return axes.images[0].get_array(), [text.get_text() for text in axes.texts], [
        (round(frame.get_y() + 0.45), round(frame.get_x() + 0.47)) for frame in frames
    ]  # fmt: skip


def test_heat_map_has_scores_floors_and_frames() -> None:
    summary = make_summary(8, FLAN, floor=30.1)
    del summary["clients"][7]["scores"]["coreference"]
    figure = figures.heat_map_figure(summary)
    scores, numbers, frames = heat_map_parts(figure)
    expected = [[score_of(k, place) for place in range(8)] for k in range(8)]
    expected[7][0] = math.nan
    np.testing.assert_allclose(np.ma.filled(scores, math.nan), [*expected, [30.1] * 8])
    assert len(numbers) == 71
    assert numbers[:3] == ["30.0!", "30.1", "30.2"]
    assert numbers[-9:] == [f"{score_of(7, 7):.1f}", *["30.1"] * 8]
    assert frames == [(k, k) for k in range(8)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(FLAN)
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "best floor"
    assert figure.axes[0].images[0].get_clim() == (0, 100)


def test_heat_map_of_another_metric() -> None:
    scores, _, _ = heat_map_parts(figures.heat_map_figure(make_summary(2, FLAN[:3]), "chrf"))
    assert scores[1][2] == pytest.approx(score_of(1, 2) + 3)


def test_large_heat_map_has_no_numbers() -> None:
    scores, numbers, frames = heat_map_parts(figures.heat_map_figure(make_summary(40, [f"t{n}" for n in range(40)])))
    assert (scores.shape, numbers, len(frames)) == ((41, 40), [], 40)


def histogram_shares(axes: Any) -> tuple[list[float], list[float]]:
    """Heights of the bars of own and of other tasks."""
    heights = [bar.get_height() for bar in axes.patches]
    return heights[: figures.NUM_BINS], heights[figures.NUM_BINS :]


def test_alpha_is_shown_as_shares_of_own_and_other_tasks() -> None:
    answers, clients = make_answers(3, FLAN[:4], lambda own: 0.71 if own else 0.15)
    answers[0] = Answer(0, FLAN[0], 0, 0.33, "")
    whole, first, *rest = figures.alpha_figure(answers, clients).axes
    assert len(rest) == 2
    own, other = histogram_shares(first)
    assert {place: share for place, share in enumerate(own) if share} == pytest.approx({16: 0.1, 35: 0.9})
    assert {place: share for place, share in enumerate(other) if share} == pytest.approx({7: 1.0})
    own, other = histogram_shares(whole)
    assert {place: share for place, share in enumerate(own) if share} == pytest.approx({16: 1 / 30, 35: 29 / 30})
    assert first.get_title() == "client_0\nmean: own 0.672, other 0.150"
    assert {axes.get_xlim() for axes in (whole, first, *rest)} == {(0, 1)}


def test_a_fixed_alpha_is_a_line() -> None:
    answers, clients = make_answers(2, FLAN[:2], lambda own: 0.5)
    for axes in figures.alpha_figure(answers, clients).axes:
        assert [line.get_xdata()[0] for line in axes.lines] == [0.5]
        assert list(axes.patches) == []
        assert axes.get_title().endswith("always 0.500")


def test_alpha_of_many_clients_has_16_panels() -> None:
    tasks = [f"t{n}" for n in range(30)]
    figure = figures.alpha_figure(*make_answers(25, tasks, lambda own: 0.6 if own else 0.4))
    assert len(figure.axes) == 1 + 16
    assert figure.axes[0].get_title().startswith("All clients; 9 of 25 not shown alone")


def test_clients_without_other_tasks_or_answers() -> None:
    answers, clients = make_answers(1, FLAN[:1], lambda own: random.Random(0).random())
    answers[0] = Answer(0, FLAN[0], 0, 0.1, "")
    silent = ClientInfo(9, "client_9", (FLAN[1],))
    titles = [axes.get_title() for axes in figures.alpha_figure(answers, [*clients, silent]).axes]
    assert "other" not in titles[1]
    assert titles[2] == "client_9\nno answers"


def points_shown(figure: Figure) -> list[tuple[str, str, float, float]]:
    """Marker, colour and place of each point; the other lines are floors and the ends of error bars."""
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "_", "|")]
    return [(line.get_marker(), line.get_color(), *line.get_xydata()[0].tolist()) for line in lines]


@pytest.mark.parametrize("num_points", [1, 2, 12, 20])
def test_points_have_their_place_and_the_legend_names_each_by_its_look(num_points: int) -> None:
    points = make_points(num_points)
    figure = figures.p_against_ttp_figure(points)
    shown = points_shown(figure)
    assert [(x, y) for _, _, x, y in shown] == [(point.ttp.mean, point.p.mean) for point in points]
    assert len({(marker, colour) for marker, colour, _, _ in shown}) == num_points, "two points look alike"
    legend = legend_of(figure)
    assert names_in(legend) == [point.label for point in points]
    assert [(entry.get_marker(), entry.get_color()) for entry in legend.legend_handles] == [look[:2] for look in shown]


@pytest.mark.parametrize("num_points", [21, 40, 60])
def test_many_points_are_numbers_that_the_legend_explains(num_points: int) -> None:
    points = make_points(num_points, error=None)
    figure = figures.p_against_ttp_figure(points)
    assert [marker for marker, *_ in points_shown(figure)] == [f"${k}$" for k in range(1, num_points + 1)]
    legend = legend_of(figure)
    assert names_in(legend) == [point.label for point in points]
    assert [entry.get_marker() for entry in legend.legend_handles] == [f"${k + 1}$" for k in range(num_points)]


def test_points_beyond_counting_have_no_names() -> None:
    points = [with_floors(point, 50.0, None) for point in make_points(61, error=None)]
    figure = figures.p_against_ttp_figure(points)
    assert len(points_shown(figure)) == 61
    assert names_in(legend_of(figure)) == ["floor of P"]
    assert figures.p_against_ttp_figure(make_points(61)).axes[0].get_legend() is None


@pytest.mark.parametrize("num_points", [1, 9, 40, 60])
def test_the_legend_is_on_the_picture_beside_the_plot(num_points: int) -> None:
    points = make_points(num_points, label="feddpa_t oracle: better adapter per task and more than anybody reads")
    figure = figures.p_against_ttp_figure(points)
    figure.draw_without_rendering()
    legend, axes = legend_of(figure).get_window_extent(), figure.axes[0]
    assert legend.x0 >= axes.bbox.x1
    assert legend.y0 >= 0
    assert legend.y1 <= figure.bbox.y1
    assert legend.x1 <= figure.bbox.x1
    assert axes.bbox.width >= 400, "room for the plot itself"


def test_error_bars_only_where_errors_are_known() -> None:
    first, second = make_points(2)
    points = [replace(first, p=replace(first.p, error=0.25)), second, *make_points(1, error=None)]
    (axes,) = figures.p_against_ttp_figure(points).axes
    assert [len(container.lines[2]) for container in axes.containers] == [2, 2, 0]
    across, up = axes.containers[0].lines[2]
    x, y = first.ttp.mean, first.p.mean
    np.testing.assert_allclose(across.get_segments()[0], [[x - 0.5, y], [x + 0.5, y]])
    np.testing.assert_allclose(up.get_segments()[0], [[x, y - 0.25], [x, y + 0.25]])


def test_a_shared_floor_is_a_line_and_others_are_dashes() -> None:
    points = [with_floors(point, 50.0 + k, 55.0) for k, point in enumerate(make_points(3, error=None))]
    figure = figures.p_against_ttp_figure(points)
    names = [point.label for point in points]
    assert names_in(legend_of(figure)) == [*names, "floor of P, each point's own", "floor of TTP"]
    lines = figure.axes[0].lines
    dashes = [line.get_xydata()[0].tolist() for line in lines if line.get_marker() == "_" and len(line.get_xydata())]
    assert dashes == [[point.ttp.mean, point.p.floor] for point in points]
    (shared,) = [line for line in lines if line.get_linestyle() == "--"]
    assert list(shared.get_xdata()) == [55.0, 55.0]
    first, second = make_points(2)
    some = [with_floors(first, None, None), with_floors(second, 60.0, None)]
    assert names_in(legend_of(figures.p_against_ttp_figure(some)))[2:] == ["floor of P, each point's own"]


def test_curves_are_in_order_of_rounds() -> None:
    (axes,) = figures.curves_figure(ROUNDS, "loss", "Convergence").axes
    assert [line.get_label() for line in axes.lines] == ["fedit", "feddpa_t"]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 4.0], [1, 3.0]], [[0, 4.0], [1, 2.5]]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("round", "loss", "Convergence")
    assert list(axes.get_xticks()) == [0, 1]


def test_names_are_not_read_as_formulas() -> None:
    curves = figures.curves_figure({"$x_1$ and $": [(0, 1.0)]}, "$y$", "$t$")
    points = figures.p_against_ttp_figure([replace(make_points(1)[0], label=r"$\frac")])
    for figure in (curves, points, figures.heat_map_figure(make_summary(1, ["a$b$c"]))):
        figure.draw_without_rendering()
    assert curves.axes[0].get_title() == r"\$t\$"


DRAWINGS: dict[str, Callable[[Path], None]] = {
    "heat map": lambda path: figures.heat_map(make_summary(8, FLAN), path),
    "heat map 1 x 1": lambda path: figures.heat_map(make_summary(1, FLAN[:1]), path),
    "heat map 25 x 30": lambda path: figures.heat_map(make_summary(25, [f"t{n}" for n in range(30)]), path),
    "alpha": lambda path: figures.alpha_histograms(*make_answers(8, FLAN, lambda own: 0.4 + 0.2 * own), path),
    "points": lambda path: figures.p_against_ttp(make_points(9), path),
    "many points": lambda path: figures.p_against_ttp(make_points(60, error=None, label="a long name " * 4), path),
    "more points": lambda path: figures.p_against_ttp(make_points(200, error=None), path),
    "curves": lambda path: figures.curves(ROUNDS, path, "loss", "Convergence"),
    "no curves": lambda path: figures.curves({"fedit": []}, path, "loss", "Convergence"),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_pictures_are_whole_files_of_sensible_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new folder" / "picture.png"
    DRAWINGS[name](path)
    width, height = png_size(path)
    assert 600 <= width <= 2400
    assert 400 <= height <= 1800
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    DRAWINGS["curves"](path)
    before = path.read_bytes()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*picture.png: .*No space left"):
        DRAWINGS["points"](path)
    with pytest.raises(KeyError):
        figures.heat_map({"clients": []}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
