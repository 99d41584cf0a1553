"""Training loss and tokens per second, for the console while a client trains."""

import time
from collections import deque
from dataclasses import dataclass

import torch

from dpa_ds.data.batching import IGNORE_INDEX, StepBatch

NUM_SHOWN_STEPS = 20
"""What is shown is the mean over so many steps."""


@dataclass(frozen=True)
class _Measured:
    """One optimizer step."""

    loss: torch.Tensor
    """Mean over the label tokens of this rank, on the device: nobody waits for it before it is shown."""
    tokens: int
    seconds: float


class TrainingMeter:
    """Of the last steps of one phase, as this rank sees them: the loss is that of its own examples, tokens per second
    are those of its rank group."""

    def __init__(self) -> None:
        self._steps: deque[_Measured] = deque(maxlen=NUM_SHOWN_STEPS)
        self._last_time = time.monotonic()

    def begin_phase(self) -> None:
        """Forget the phase before."""
        self._steps.clear()
        self._last_time = time.monotonic()

    def add(self, step: StepBatch, loss_share: torch.Tensor) -> None:
        """Count a step.

        Args:
            loss_share: this rank's part of the mean loss over the label tokens of the whole step.
        """
        now = time.monotonic()
        own_tokens = sum(int((micro.targets != IGNORE_INDEX).sum()) for micro in step.micro_batches)
        if own_tokens:  # else it had dummies only
            loss = loss_share * (step.num_label_tokens / own_tokens)
            self._steps.append(_Measured(loss, step.real_tokens, now - self._last_time))
        self._last_time = now

    def describe(self) -> str:
        """Such as `loss 0.7731, 1240 tokens/s`; empty before the first step."""
        steps = list(self._steps)
        if not steps:
            return ""
        if len(steps) > 1:
            steps.pop()  # the device may still be computing it: it is waited for only where it is the first
        loss = float(torch.stack([step.loss for step in steps]).mean())
        tokens = sum(step.tokens for step in steps)
        seconds = sum(step.seconds for step in steps)
        return f"loss {loss:.4f}, {tokens / max(seconds, 1e-9):.0f} tokens/s"
