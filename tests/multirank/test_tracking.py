"""What a run writes down: TensorBoard, metrics.jsonl and results.json tell the same numbers."""

import json
from pathlib import Path

import pytest

from dpa_ds.runs.tracking import read_records
from tests import tiny
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
        written = [(event.step, event.value) for event in rounds.Scalars(tag) if event.step > 0]
        recorded = [(r["round"], r[tag]) for r in records if r["kind"] == "round" and r["round"] > 0]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in recorded], tag
    client = events("client_02")  # 9 examples, batch 4: three steps a phase; hosted by the first of two groups
    for adapter in ("global", "local"):
        rates = [event.value for event in client.Scalars(f"{adapter}/lr")]
        assert rates == pytest.approx([1e-2 * (1 - k / 3) for k in (0, 1, 2)] * 2, rel=1e-6)
        assert [event.step for event in client.Scalars(f"{adapter}/grad_norm")] == list(range(6))
        losses = [event.value for event in client.Scalars(f"{adapter}/loss")]
        means = [r[f"{adapter}_loss"] for r in records if r["kind"] == "client" and r["client"] == 2][1:]
        assert [sum(losses[:3]) / 3, sum(losses[3:]) / 3] == pytest.approx(means, rel=1e-6)
    held_out = [event.value for event in client.Scalars("held_out/loss")]
    course = json.loads((run_dir / "results.json").read_text())["clients"][2]["held_out_loss"]
    assert held_out == pytest.approx([value for _, value in course], rel=1e-6)
    assert (run_dir / "held_out_loss.png").stat().st_size > 10_000
