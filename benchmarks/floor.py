"""What a phase cannot avoid: the frozen base forward and backward to its inputs, on real tokens only.

No adapters, no optimizer, no padding: the tokens of a step are laid end to end and cut into rows of the step's mean
length. The output head runs at label positions only.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dpa_ds.data.batches import IGNORE_INDEX
from dpa_ds.data.prompts import TokenizedExamples


class Floor:
    """The frozen base alone; `micro_batch_tokens` bounds one pass."""

    def __init__(self, base: PreTrainedModel, micro_batch_tokens: int, clock: Callable[[], float]) -> None:
        self._base, self._budget, self._clock = base.requires_grad_(False), micro_batch_tokens, clock

    def run(self, examples: TokenizedExamples, steps: Sequence[Sequence[int]]) -> float:
        """Seconds of one pass over `steps`."""
        batches = [batch for step in steps for batch in self._pack(examples, step)]
        started = self._clock()
        for input_ids, labels in batches:
            self._forward_backward(input_ids, labels)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock() - started

    def _forward_backward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
        inputs = self._base.get_input_embeddings()(input_ids).requires_grad_()
        hidden = self._base.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORE_INDEX
        logits = self._base.get_output_embeddings()(hidden[:, :-1][labelled])
        F.cross_entropy(logits.float(), targets[labelled], reduction="sum").backward()

    def _pack(self, examples: TokenizedExamples, step: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All tokens of the step, as passes of (rows, mean length) and one short row with what is left over."""
        tokens = np.concatenate([examples.input_ids(index) for index in step]).astype(np.int64)
        labels = np.concatenate([_labels(examples, index) for index in step])
        length = len(tokens) // len(step)
        width = max(1, self._budget // length) * length
        whole = len(step) * length
        cuts = [*range(0, whole, width), whole, len(tokens)]
        passes = []
        for start, stop in itertools.pairwise(cuts):
            shape = (-1, length) if stop <= whole else (1, stop - start)
            if stop - start >= 2:
                passes.append(tuple(_tensor(a[start:stop].reshape(shape), self._base.device) for a in (tokens, labels)))
        return passes  # type: ignore[return-value]


def phase_flops(base: PreTrainedModel, examples: TokenizedExamples, steps: Sequence[Sequence[int]]) -> float:
    """Floating-point operations that `steps` need: matrix products of the base, forward and input gradients.

    2 a weight and token forward and 2 backward (frozen weights need no gradient), causal attention at half of the
    square (backward twice the forward), the output head at label positions. Adapters are not counted. Dense models.
    """
    head = base.get_output_embeddings()
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    config = base.config
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    total = 0.0
    for index in (index for step in steps for index in step):
        length = examples.length(index)
        pairs = length * (length + 1) / 2
        total += 4 * weights * length + 12 * pairs * width * config.num_hidden_layers
        total += 4 * head.weight.numel() * examples.num_label_tokens(index)
    return total


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device, clock: Callable[[], float]) -> float:
    """The best of some large square matrix products: what this machine gives right now."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = clock()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (clock() - started))
    return best


def _labels(examples: TokenizedExamples, index: int) -> np.ndarray:
    labels = examples.input_ids(index).astype(np.int64)
    labels[: examples.prompt_lengths[index]] = IGNORE_INDEX
    return labels


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
