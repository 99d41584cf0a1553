"""The course of the learning rate within a phase, against transformers' schedules."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from dpa_ds.config.schema import TrainConfig
from dpa_ds.federation.trainer import learning_rate


def rates_of_transformers(schedule: str, num_warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    if schedule == "constant" and num_warmup:
        schedule = "constant_with_warmup"
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=num_warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rates(total: int, **settings: object) -> list[float]:
    config = TrainConfig(learning_rate=3e-4, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_equals_transformers(schedule: str, total: int) -> None:
    expected = rates_of_transformers(schedule, 0, total)
    assert rates(total, lr_schedule=schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.5, 0.6])
@pytest.mark.parametrize("total", [2, 7, 40])
def test_warms_up_as_transformers(schedule: str, ratio: float, total: int) -> None:
    num_warmup = TrainingArguments(output_dir="unused", warmup_steps=ratio).get_warmup_steps(total)
    if num_warmup == total:
        num_warmup -= 1
    expected = rates_of_transformers(schedule, num_warmup, total)
    found = rates(total, lr_schedule=schedule, warmup_ratio=ratio)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == 0.0, "as in transformers"
    assert max(found) == 3e-4


def test_without_warm_up_not_a_bit_changes() -> None:
    for total in range(1, 50):
        assert rates(total) == [3e-4 * (1.0 - step / total) for step in range(total)]


@pytest.mark.parametrize("ratio", [0.1, 0.99])
def test_a_phase_of_one_step_trains(ratio: float) -> None:
    """transformers would take its only step with rate 0."""
    assert rates_of_transformers("linear", 1, 1) == [0.0]
    assert rates(1, warmup_ratio=ratio) == [3e-4]
