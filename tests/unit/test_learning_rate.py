"""The course of the learning rate within a phase, against transformers' schedules without warm-up."""

import pytest
import torch
from transformers import get_scheduler

from dpa_ds.config.schema import TrainConfig
from dpa_ds.federation.trainer import learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_equals_transformers(schedule: str, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=total)
    config = TrainConfig(learning_rate=3e-4, lr_schedule=schedule)  # type: ignore[arg-type]
    for step in range(total):
        assert learning_rate(config, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
