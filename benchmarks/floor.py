"""What a phase cannot avoid: the frozen base forward and backward to its inputs, on real tokens only.

No adapters, no optimizer, no padding: the tokens of a step are packed, and attention sees rows of the step's mean
length. The output head runs at label positions only.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.engine.packed_attention import PackedAttention


class Floor:
    """The frozen base alone; `micro_batch_tokens` bounds one pass."""

    def __init__(self, base: PreTrainedModel, micro_batch_tokens: int, clock: Callable[[], float]) -> None:
        self._base, self._budget, self._clock = base.requires_grad_(False), micro_batch_tokens, clock
        self._packing = PackedAttention(base)

    def run(self, examples: TokenizedExamples, steps: Sequence[Sequence[int]]) -> float:
        """Seconds of one pass over `steps`."""
        passes = [one for step in steps for one in self._passes(examples, step)]
        started = self._clock()
        for one in passes:
            with self._packing:
                self._forward_backward(one)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._clock() - started

    def _forward_backward(self, one: MicroBatch) -> None:
        device = self._base.device
        inputs = self._base.get_input_embeddings()(one.input_ids[None].to(device)).requires_grad_()
        hidden = self._base.base_model(
            inputs_embeds=inputs,
            use_cache=False,
            **self._packing.arguments(one, device),
        ).last_hidden_state
        labelled = (one.targets != IGNORE_INDEX).nonzero().flatten()
        logits = self._base.get_output_embeddings()(hidden[0][labelled.to(device)])
        F.cross_entropy(logits.float(), one.targets[labelled].to(device), reduction="sum").backward()

    def _passes(self, examples: TokenizedExamples, step: Sequence[int]) -> list[MicroBatch]:
        """All tokens of the step, without padding: rows of its mean length and a short one with what is left over."""
        tokens = np.concatenate([examples.input_ids(index) for index in step]).astype(np.int64)
        targets = np.concatenate([_targets(examples, index) for index in step])
        length, passes = len(tokens) // len(step), []
        width = max(1, self._budget // length) * length
        for start in range(0, len(tokens), width):
            ids = torch.from_numpy(tokens[start : start + width])
            rows, rest = divmod(len(ids), length)
            segments = ((rows, length),) * (rows > 0) + ((1, rest),) * (rest > 0)
            positions = torch.arange(length).repeat(rows + 1)[: len(ids)]
            passes.append(MicroBatch(ids, positions, torch.from_numpy(targets[start : start + width]), segments))
        return passes


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


def _targets(examples: TokenizedExamples, index: int) -> np.ndarray:
    targets = np.full(examples.length(index), IGNORE_INDEX, dtype=np.int64)
    for start, stop in examples.label_spans(index):
        targets[start - 1 : stop - 1] = examples.input_ids(index)[start:stop]
    return targets
