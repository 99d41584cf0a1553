"""Learning rate of a step."""

import math

from dpa_ds.config import TrainConfig


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a phase of `total_steps`, as transformers' schedules without warm-up."""
    match train.lr_schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - step / total_steps
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
    return train.learning_rate * factor
