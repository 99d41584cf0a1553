"""Comparisons of methods: the differences and weights are those computed by hand, and the tables show them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import ConfigError
from dpa_ds.evaluation.answers import Answer
from dpa_ds.evaluation.metrics import METRICS
from dpa_ds.evaluation.statistics import ScoreTable
from dpa_ds.experiments.compare import build_plan
from dpa_ds.experiments.comparison import Evaluated, Line, compare_lines, describe_weights
from dpa_ds.experiments.comparison_tables import comparison_markdown, comparison_table
from tests.unit.test_evaluation_tables import shown, table_with

UNWEIGHTED = {"P_to_cosine": None, "TTP_to_cosine": None, "weights": None}
CLIENTS = (ClientInfo(0, "first", ("a",)), ClientInfo(1, "second", ("b",)))


def evaluated(scores: dict[tuple[int, str], float], alphas: dict[tuple[int, str], Sequence[float]]) -> Evaluated:
    """Two instances in each cell, with the same score, and the weights of their answers."""
    cells = {cell: np.full((2, len(METRICS)), score) for cell, score in scores.items()}
    answers = [Answer(*cell, row, alpha, "") for cell, two in alphas.items() for row, alpha in enumerate(two)]
    return Evaluated(ScoreTable(CLIENTS, cells), answers)


def constant(alpha: float) -> dict[tuple[int, str], Sequence[float]]:
    return {(client, task): (alpha, alpha) for client in (0, 1) for task in "ab"}


COSINE = evaluated({(0, "a"): 60, (0, "b"): 40, (1, "a"): 30, (1, "b"): 50}, constant(0.5))
CENTRED = evaluated(
    {(0, "a"): 70, (0, "b"): 40, (1, "a"): 20, (1, "b"): 56},
    {(0, "a"): (0.25, 0.5), (0, "b"): (0.0, 0.0), (1, "a"): (0.0, 0.25), (1, "b"): (0.75, 1.0)},
)
FEDIT = evaluated(dict.fromkeys(COSINE.table.cells, 45.0), constant(0.0))


def test_each_weighting_is_set_against_the_cosine_of_its_method() -> None:
    """P: (70 + 56) / 2 - (60 + 50) / 2 = 8; TTP: (55 + 38) / 2 - (50 + 40) / 2 = 1.5, the same for every resample."""
    lines = [
        Line("feddpa_t", "cosine 0.5", [COSINE]),
        Line("feddpa_t", "centred_cosine", [CENTRED]),
        Line("fedit", "global", [FEDIT]),
    ]
    comparison = compare_lines(lines, {"P": 1.0, "TTP": 2.0}, [0])
    by_line = {(line["method"], line["weighting"]): line for line in comparison["methods"]}
    centred = by_line["feddpa_t", "centred_cosine"]
    assert centred["P_to_cosine"] == pytest.approx({"mean": 8.0, "low": 8.0, "high": 8.0})
    assert centred["TTP_to_cosine"] == pytest.approx({"mean": 1.5, "low": 1.5, "high": 1.5})
    assert centred["P_difference"]["mean"] == pytest.approx(63 - 45)
    for names in (("feddpa_t", "cosine 0.5"), ("fedit", "global")):
        assert (by_line[names]["P_to_cosine"], by_line[names]["TTP_to_cosine"]) == (None, None)
    table = table_with(comparison_markdown(comparison), "TTP - cosine")
    assert [list(map(shown, row)) for row in table[1:]] == [
        ["feddpa_t", "centred_cosine", "+8.00 [+8.00, +8.00] *", "+1.50 [+1.50, +1.50] *"]
    ]


def test_weights_on_own_and_on_other_tasks_over_all_seeds() -> None:
    assert describe_weights([CENTRED, COSINE]) == {
        "own": {"num_answers": 8, "mean": (2.5 + 4 * 0.5) / 8, "min": 0.25, "max": 1.0, "share_zero": 0.0},
        "other": {"num_answers": 8, "mean": (0.25 + 4 * 0.5) / 8, "min": 0.0, "max": 0.5, "share_zero": 3 / 8},
    }
    own_only = Evaluated(CENTRED.table, [a for a in CENTRED.answers if (a.client, a.task) in ((0, "a"), (1, "b"))])
    assert describe_weights([own_only])["other"] is None


def test_the_oracle_has_no_weight_and_no_weighting() -> None:
    alone = {"global": COSINE, "local": CENTRED, "cosine": COSINE}
    lines = [Line("feddpa_f", weighting, [evaluation]) for weighting, evaluation in alone.items()]
    *_, oracle = compare_lines(lines, {"P": 1.0, "TTP": 2.0}, [0])["methods"]
    assert oracle["weighting"].startswith("oracle")
    assert oracle["P"]["mean"] == pytest.approx((70 + 56) / 2)
    assert (oracle["weights"], oracle["P_to_cosine"]) == (None, None)


def make_comparison(seeds: Sequence[int]) -> dict[str, Any]:
    error = 0.25 if len(seeds) > 1 else None
    fedit = {"P": {"mean": 60.0, "standard_error": error}, "TTP": {"mean": 61.0, "standard_error": error}}
    feddpa = {"P": {"mean": 63.0, "standard_error": error}, "TTP": {"mean": 62.5, "standard_error": error}}
    return {
        "baseline": "fedit",
        "seeds": list(seeds),
        "methods": [
            {"method": "fedit", "weighting": "global", **fedit, "P_difference": None, "TTP_difference": None, **UNWEIGHTED, "floors": {"P": 58.0, "TTP": 62.0}},
            {
                "method": "feddpa_t",
                "weighting": "dynamic",
                **feddpa,
                "P_difference": {"mean": 3.0, "low": 0.004, "high": 5.0},
                "TTP_difference": {"mean": 1.5, "low": -0.1, "high": 3.0},
                "P_to_cosine": {"mean": 0.5, "low": 0.25, "high": 1.0},
                "TTP_to_cosine": {"mean": -0.5, "low": -1.0, "high": 0.25},
                "weights": {
                    "own": {"num_answers": 8, "mean": 0.25, "min": 0.125, "max": 0.5, "share_zero": 0.0},
                    "other": {"num_answers": 24, "mean": 0.0625, "min": 0.0, "max": 0.25, "share_zero": 0.75},
                },
                "floors": {"P": 58.0, "TTP": 62.0},
            },
        ],
    }  # fmt: skip


def test_comparison_marks_differences_and_floors() -> None:
    comparison = make_comparison([0, 1, 2])
    header, *rows = table_with(comparison_markdown(comparison), "method")
    assert header == ["method", "weighting", "P", "floor", "TTP", "floor", "P - fedit", "TTP - fedit"]
    assert list(map(shown, rows[0])) == ["fedit", "global", "60.00 ± 0.25", "58.00", "61.00 ± 0.25!", "62.00", "-", "-"]
    assert list(map(shown, rows[1])) == [
        "feddpa_t", "dynamic", "63.00 ± 0.25", "58.00", "62.50 ± 0.25", "62.00",
        "+3.00 [+0.00, +5.00] *", "+1.50 [-0.10, +3.00]",
    ]  # fmt: skip
    lines = comparison_table(comparison).splitlines()
    assert lines[4].split() == " ".join(map(shown, rows[1])).split()
    assert lines[6] == "3 seeds (0, 1, 2): mean ± standard error over the seeds"


def test_comparison_of_one_seed_says_so() -> None:
    text = comparison_table(make_comparison([7]))
    assert "1 seed (7): no standard error over seeds exists" in text
    assert "±" not in text


def test_negative_differences_are_marked_too() -> None:
    comparison = make_comparison([0, 1])
    comparison["methods"][1]["P_difference"] = {"mean": -2.0, "low": -3.0, "high": -1.0}
    assert "-2.00 [-3.00, -1.00] *" in comparison_table(comparison)


def test_weights_are_shown_for_own_and_for_other_tasks() -> None:
    header, *rows = table_with(comparison_markdown(make_comparison([0])), "own tasks: mean")
    assert header[2:6] == ["own tasks: answers", "own tasks: mean", "own tasks: min to max", "own tasks: exactly 0"]
    assert [list(map(shown, row)) for row in rows] == [
        ["feddpa_t", "dynamic", "8", "0.250", "0.125 to 0.500", "0%", "24", "0.062", "0.000 to 0.250", "75%"]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("feddpa_t,fedavg", "0", None, "1"), r"--methods \['fedavg'\] are unknown: choose among feddpa_t,"),
        (("feddpa_t", "one", None, "1"), "--seeds and --tuning_instances are whole numbers, such as 0,1,2"),
        (("feddpa_t", "0", None, "0"), "--tuning_instances must be >= 1, got 0"),
        (("feddpa_t", "0", "dot", "1"), "--weightings dot is unknown: choose among cosine, centred_cosine"),
        (("feddpa_t", "0", "cosine:x", "1"), "--weightings cosine:x: scales are numbers"),
        (("feddpa_t", "0", "local:1", "1"), "local is one adapter alone and takes no scale"),
        (("feddpa_t", "0", "fixed:0.5|1.5", "1"), r"fixed:0.5\|1.5: scales of fixed must be in \[0, 1\], got 1.5"),
        (("feddpa_t", "0", "cosine, l2:-1", "1"), "--weightings l2:-1: scales of l2 must be finite and >= 0, got -1"),
        (("feddpa_t", "0", "cosine:nan", "1"), "scales of cosine must be finite and >= 0, got nan"),
        (
            ("fedit,local", "0", "cosine", "1"),
            "--weightings is for methods with both adapters, feddpa_t and feddpa_f, but",
        ),
    ],
)
def test_words_that_are_refused(words: tuple[str, str, str | None, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plan(*words)


def test_what_is_named_twice_is_done_once() -> None:
    plan = build_plan("fedit,feddpa_t,fedit", "1,0,1", "cosine,cosine:1|1|2, cosine", "3")
    assert (plan.methods, plan.seeds) == (("fedit", "feddpa_t"), (1, 0))
    assert [(c.kind, c.scales) for c in plan.weightings] == [("cosine", ()), ("cosine", (1.0, 2.0))]
