"""How the examples of a micro-batch are placed in the rows of a forward pass.

`packing_check.py` tries the ways in their order, the fastest first, and takes the first that changes no logits:
`PackedAttention`, `PaddedRows`, `SingleRows`. Another way is another class.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dpa_ds.config.ranges import BILLION
from dpa_ds.data.batching import IGNORE_INDEX, BatchingConfig, MicroBatch
from dpa_ds.distributed.device import send


class Rows(Protocol):
    """A way to place examples, and a context for the forward and the backward pass."""

    description: str
    """For the log, after "rows"."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Lengths of a shared prefix to try: 0, and another one where a pass may begin with one."""

    def batching(self, token_budget: int, pad_id: int) -> BatchingConfig:
        """How micro-batches are made for this way."""

    def trial(self, sequences: Sequence[torch.Tensor], prefix: int) -> MicroBatch:
        """A micro-batch of these sequences, (tokens,) each, in this order; all tokens after the prefix have targets."""

    def inputs(self, micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
        """Arguments of the model's forward pass, on their way to the device."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class PaddedRows:
    """Examples of similar length, each in a row of its own and padded on the right to the longest.

    There is no mask: the model is causal, and no token of an example looks at the padding after it. Layers that are no
    attention (convolutions, state spaces) carry their state from left to right, too.
    """

    description = "padded: several examples a pass, because examples that are packed in one row see one another there"
    prefixes = (0,)

    def batching(self, token_budget: int, pad_id: int) -> BatchingConfig:
        """See `Rows`: another segment costs so much that each micro-batch has one."""
        return BatchingConfig(token_budget, pad_id, prefix_sharing=False, segment_overhead=BILLION)

    def trial(self, sequences: Sequence[torch.Tensor], prefix: int) -> MicroBatch:
        """See `Rows`."""
        assert prefix == 0, prefix
        longest = max(map(len, sequences))
        # Padded with a token that the model knows, whatever it is.
        ids = torch.full((len(sequences), longest), int(sequences[0][0]))
        targets = torch.full_like(ids, IGNORE_INDEX)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            targets[row, : len(sequence)] = sequence
        positions = torch.arange(longest).repeat(len(sequences))
        return MicroBatch(ids.flatten(), positions, targets.flatten(), ((len(sequences), longest),))

    def inputs(self, micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
        """See `Rows`. Not even positions: some models have none."""
        (shape,) = micro_batch.segments
        return {"input_ids": send(micro_batch.input_ids.view(shape), device)}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class SingleRows(PaddedRows):
    """One example a pass, as transformers alone computes it."""

    description = "single: one example a pass, because examples change one another in any other way: right, but slow"

    def batching(self, token_budget: int, pad_id: int) -> BatchingConfig:
        """See `Rows`: each example exceeds the budget, and so has a micro-batch of its own."""
        return BatchingConfig(token_budget=1, pad_id=pad_id, prefix_sharing=False)
