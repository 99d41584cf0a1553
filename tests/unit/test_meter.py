"""What the console says of the training: loss and tokens per second of the last steps, and when it is asked for."""

import logging

import pytest
import torch

from dpa_ds.config.schema import TrackingConfig
from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch, StepBatch
from dpa_ds.federation import meter as module
from dpa_ds.federation.meter import TrainingMeter
from dpa_ds.runs.tracking import Tracker


def step_of(own_labels: int, all_labels: int, real_tokens: int) -> StepBatch:
    targets = torch.tensor([IGNORE_INDEX] * 3 + [1] * own_labels)
    micro_batch = MicroBatch(targets, targets, targets, ((1, len(targets)),))
    return StepBatch([micro_batch], all_labels, 1, real_tokens, real_tokens)


def test_loss_is_of_the_own_examples_and_tokens_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the labels are another rank's: this rank's share of a mean loss of 2.0 is 1.0."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    meter = TrainingMeter()
    meter.begin_phase()
    assert meter.describe() == ""
    for share in (1.0, 2.0, 99.0):
        clock[0] += 0.5
        meter.add(step_of(own_labels=4, all_labels=8, real_tokens=50), torch.tensor(share))
    assert meter.describe() == "loss 3.0000, 100 tokens/s", "the newest step is not waited for"
    meter.begin_phase()
    assert meter.describe() == ""


def test_a_rank_with_dummies_only_has_no_loss() -> None:
    meter = TrainingMeter()
    for _ in range(3):
        meter.add(step_of(own_labels=0, all_labels=8, real_tokens=50), torch.tensor(0.0))
    assert meter.describe() == ""


def test_a_line_now_and_then_has_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    """They are asked for where a line is due, and never between: that may wait for the device."""
    num_asked = 0

    def numbers() -> str:
        nonlocal num_asked
        num_asked += 1
        return "loss 0.7000, 12 tokens/s"

    for every_seconds, expected in ((0.0, 3), (1000.0, 0)):
        caplog.clear()
        num_asked = 0
        tracker = Tracker(None, True, TrackingConfig(log_every_seconds=every_seconds))
        with caplog.at_level(logging.INFO, "dpa_ds"), tracker.progress(3):
            for _ in range(3):
                tracker.advance("round 1 client_0 global", numbers=numbers)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == num_asked == expected
        for line in lines:
            assert line.startswith("round 1 client_0 global: ")
            assert "loss 0.7000, 12 tokens/s" in line
