"""The model of a round against closed forms, and its fit against planted costs."""

import itertools

import pytest

from dpa_ds.planning.round_model import Costs, Point, Work, fit, predict_without, simulate

COSTS = Costs(token=1e-3, step=0.05, round=0.4)
ONE = Work(tokens=2000, steps=10)


def test_closed_forms() -> None:
    alone = simulate([[ONE]], 1, COSTS)
    assert (alone.seconds, alone.waiting) == (pytest.approx(2 + 0.5 + 0.4), 0)
    assert simulate([[ONE] * 3], 1, COSTS).seconds == pytest.approx(3 * 2.5 + 0.4)
    assert simulate([[ONE]] * 3, 1, COSTS).seconds == pytest.approx(alone.seconds)
    assert simulate([[ONE]], 4, COSTS).seconds == pytest.approx(0.5 + 0.5 + 0.4)


def test_a_straggler_is_waited_for() -> None:
    found = simulate([[ONE], [ONE], [Work(6000, 30)], [ONE]], 1, COSTS)
    assert found.seconds == pytest.approx(7.5 + 0.4)
    assert found.waiting == pytest.approx(3 * 5 / (4 * 7.5))


def test_work_that_costs_nothing_is_not_waited_for() -> None:
    """Two noisy points may be fitted by the cost of a round alone."""
    assert simulate([[ONE], [ONE]], 1, Costs(0.0, 0.0, 0.8)).waiting == 0


def test_the_ring_sends_an_adapter_twice_at_most() -> None:
    assert simulate([[ONE]], 1, COSTS, 1e6, 1e6).reduce == 0
    assert simulate([[ONE]] * 4, 1, COSTS, 1e6, 1e6).reduce == pytest.approx(1.5)


def planted(costs: Costs) -> list[Point]:
    points = []
    for ranks, num_groups, clients in itertools.product((1, 2), (1, 2), (4, 8)):
        work = [Work(1000.0 * (k + 1), 5.0 + 3 * (k % 3)) for k in range(clients)]
        groups = tuple(tuple(work[group::num_groups]) for group in range(num_groups))
        points.append(Point(groups, ranks, simulate(groups, ranks, costs).seconds))
    return points


@pytest.mark.parametrize("costs", [COSTS, Costs(1e-3, 0.0, 0.0), Costs(2e-4, 0.1, 0.0)])
def test_fit_finds_planted_costs(costs: Costs) -> None:
    points = planted(costs)
    found = fit(points)
    assert (found.token, found.step, found.round) == pytest.approx((costs.token, costs.step, costs.round), abs=1e-9)
    for left_out, point in enumerate(points):
        assert predict_without(points, left_out) == pytest.approx(point.seconds, rel=1e-6)


def test_costs_are_never_negative() -> None:
    """Rounds that get shorter with more steps: no cost explains that, and none becomes negative for it."""
    points = [Point(((Work(1000, steps),),), 1, 10 - steps) for steps in (1.0, 2.0, 5.0)]
    assert min(vars(fit(points)).values()) >= 0
