"""What a run writes down: TensorBoard, metrics.jsonl and results.json tell the same numbers."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.runs.curves import tag_of
from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.faults.checks import curves_are_whole
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank


def test_numbers_agree(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    run_on_ranks(train_on_rank, 2, tmp_path, tiny.recipe(model, data, tmp_path / "runs", tracking__tensorboard=True))
    run_dir = tmp_path / "runs" / "tiny"
    records = read_records(run_dir / "metrics.jsonl")
    assert [(r["kind"], r["round"]) for r in records] == [
        entry for r in range(3) for entry in [("client", r)] * 4 + [("round", r)]
    ]

    def events(source: str) -> EventAccumulator:
        return EventAccumulator(str(run_dir / "tensorboard" / source)).Reload()

    rounds = events("rounds")
    for tag in ("seconds/train", "seconds/aggregate", "seconds/save", "bytes_handed/update", "tokens_per_second"):
        written = [(event.step, event.value) for event in rounds.Scalars(tag_of(tag)) if event.step > 0]
        recorded = [(r["round"], r[tag]) for r in records if r["kind"] == "round" and r["round"] > 0]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in recorded], tag
    client = events("client_02")  # 9 examples, batch 4: three steps a phase; hosted by the first of two groups
    for adapter in ("global", "local"):
        rates = [event.value for event in client.Scalars(f"optimizer/{adapter}_lr")]
        assert rates == pytest.approx([1e-2 * (1 - k / 3) for k in (0, 1, 2)] * 2, rel=1e-6)
        assert [event.step for event in client.Scalars(f"optimizer/{adapter}_grad_norm")] == list(range(6))
        losses = [event.value for event in client.Scalars(f"loss/{adapter}")]
        means = [r[f"{adapter}_loss"] for r in records if r["kind"] == "client" and r["client"] == 2][1:]
        assert [sum(losses[:3]) / 3, sum(losses[3:]) / 3] == pytest.approx(means, rel=1e-6)
    held_out = [event.value for event in client.Scalars("loss/held_out")]
    course = json.loads((run_dir / "results.json").read_text())["clients"][2]["held_out_loss"]
    assert held_out == pytest.approx([value for _, value in course], rel=1e-6)
    assert (run_dir / "held_out_loss.png").stat().st_size > 10_000


class Killed(BaseException):
    """Ends a rank as it stands: nothing of the package catches it."""


def train_until_killed(job: Any, argv: Sequence[str], num_rounds: int) -> None:
    """Train until round `num_rounds` has been drawn, and end before it counts."""
    loop: Any = importlib.import_module("dpa_ds.federation.loop")
    exchange = loop.exchange_metrics
    num_drawn = 0

    def exchange_until(*args: Any) -> Any:
        nonlocal num_drawn
        num_drawn += 1
        if num_drawn > num_rounds:  # the first is round 0, or the first one of a process that resumes
            raise Killed
        return exchange(*args)

    loop.exchange_metrics = exchange_until
    try:
        train_on_rank(job, argv)
    except Killed:
        return
    finally:
        loop.exchange_metrics = exchange
    raise AssertionError("it was not killed")


@pytest.mark.parametrize("method", ["feddpa_t", "feddpa_f"])
def test_curves_are_whole_after_kills_an_extension_and_on_other_layouts(tmp_path: Path, method: str) -> None:
    """Killed before round 0 counts, in round 2 on one group, ended on two, and extended on one group again."""
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")

    def arguments(num_rounds: int) -> list[str]:
        overrides = {"method__name": method, "federation__num_rounds": num_rounds, "train__local_epochs": 2.0}
        return tiny.recipe(model, data, tmp_path / "runs", tracking__tensorboard=True, **overrides)

    run_on_ranks(train_until_killed, 1, tmp_path, arguments(3), 0)
    run_on_ranks(train_until_killed, 1, tmp_path, arguments(3), 2)
    log = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    run_on_ranks(train_on_rank, 2, tmp_path, arguments(3))
    curves_are_whole(tmp_path / "runs" / "tiny")
    run_on_ranks(train_on_rank, 1, tmp_path, arguments(5))
    continued = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert continued.startswith(log)
    assert "continues after round 3 of 5" in continued
    curves_are_whole(tmp_path / "runs" / "tiny")
