"""Attention over examples that are packed in one row: inside each, and nowhere else.

transformers (5.24) passes the keyword arguments of a forward pass to the attention function that
its config names. For `sdpa` that is one of ours: on a GPU in 16 bit all examples in one call
(`varlen_attention.py`), else transformers' own for each segment of equal rows. There is no mask, and
no work between examples. A prefix that all examples share is in the row once; each example's
attention gets a copy of it, so that it computes what it would alone. `flash_attention_2` takes the
borders of the rows itself; for `eager` transformers finds them in the position ids and makes a mask.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AttentionInterface, PreTrainedModel

from dpa_ds.data.batching import IGNORE_INDEX, SEGMENT_OVERHEAD_TOKENS, BatchingConfig, MicroBatch
from dpa_ds.distributed.device import send
from dpa_ds.engine.varlen_attention import MIN_CAPABILITY, MOST_HEAD_DIM, find_borders, varlen_attention
from dpa_ds.model.cpu_attention import sdpa

Kernel = Literal["segments", "varlen"]
"""How `sdpa` computes a row: a call for each segment, or one for all examples."""
NAMES: dict[Kernel, str] = {"segments": "packed_sdpa", "varlen": "packed_varlen"}
"""Names of our attention functions in transformers' table."""
TRIED_PREFIX = 4
"""Tokens of the shared prefix that packed rows are tried with."""


class PackedAttention:
    """A context in which `base` takes rows of several examples, in the forward and in the backward pass.

    Args:
        kernel: how `sdpa` computes a row; None: what fits device and precision of `base`.
    """

    def __init__(self, base: PreTrainedModel, kernel: Kernel | None = None) -> None:
        self._config = base.config.get_text_config()
        self._chosen = str(self._config._attn_implementation)
        self._kernel: Kernel = kernel or choose_kernel(base)
        self.description = "packed: several examples in one row"

    def __enter__(self) -> None:
        if self._chosen == "sdpa":
            self._config._attn_implementation = NAMES[self._kernel]

    def __exit__(self, *_: object) -> None:
        self._config._attn_implementation = self._chosen

    @property
    def supports_prefix(self) -> bool:
        """Whether a pass may begin with a prefix that its examples share."""
        return self._chosen == "sdpa"

    @property
    def prefixes(self) -> tuple[int, ...]:
        """See `Rows`."""
        return (0, TRIED_PREFIX) if self.supports_prefix else (0,)

    def batching(self, token_budget: int, pad_id: int) -> BatchingConfig:
        """How micro-batches are made for this attention."""
        overhead = SEGMENT_OVERHEAD_TOKENS
        if self._chosen == "sdpa" and self._kernel == "varlen":
            overhead = 0  # all segments are one call: then no example is padded
        return BatchingConfig(token_budget, pad_id, self.supports_prefix, overhead)

    def trial(self, sequences: Sequence[torch.Tensor], prefix: int) -> MicroBatch:
        """See `Rows`."""
        suffixes = [sequence[prefix:] for sequence in sequences]
        own = torch.cat(suffixes)
        positions = [torch.arange(prefix), *(torch.arange(prefix, len(sequence)) for sequence in sequences)]
        return MicroBatch(
            input_ids=torch.cat([sequences[0][:prefix], own]),
            position_ids=torch.cat(positions),
            targets=torch.cat([torch.full((prefix,), IGNORE_INDEX), own]),
            segments=tuple((1, len(suffix)) for suffix in suffixes),
            prefix=prefix,
        )

    def inputs(self, micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
        """See `Rows`."""
        return {"input_ids": send(micro_batch.input_ids[None], device), **self.arguments(micro_batch, device)}

    def arguments(self, micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
        """What the forward pass of `micro_batch` takes beside its tokens."""
        return {"position_ids": send(micro_batch.position_ids[None], device), **self._borders(micro_batch, device)}

    def _borders(self, micro_batch: MicroBatch, device: torch.device) -> dict[str, Any]:
        """Where the examples of a row begin and end, as the attention wants it."""
        if self._chosen == "sdpa":
            if self._kernel == "varlen":
                return {"borders": find_borders(micro_batch, device)}
            return {"micro_batch": micro_batch}
        assert micro_batch.prefix == 0, self._chosen
        if self._chosen != "flash_attention_2":
            return {}
        lengths = [0]
        for rows, length in micro_batch.segments:
            lengths += [length] * rows
        borders = send(torch.tensor(lengths).cumsum(0).int(), device)
        longest = max(lengths)
        return {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def takes_packed_rows(base: PreTrainedModel) -> bool:
    """Whether packed rows can be tried: attention can be replaced, and the model takes what tells examples apart."""
    parameters = inspect.signature(base.forward).parameters
    takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    # Llama 4's chunks are in a mask that the model makes, and sequences short enough to try have one chunk.
    has_chunks = getattr(base.config.get_text_config(), "attention_chunk_size", None) is not None
    return base._supports_attention_backend and takes_more and "position_ids" in parameters and not has_chunks


def describe_attention(base: PreTrainedModel) -> str:
    """Which attention computes, and for eager why where the model leaves no choice."""
    name = str(base.config.get_text_config()._attn_implementation)
    if name == "eager" and not base._supports_sdpa:
        return f"eager ({type(base).__name__} has no sdpa)"
    return name


def choose_kernel(base: PreTrainedModel) -> Kernel:
    """One call for all examples where torch has it for the device, the precision and the config of `base`."""
    config = base.config.get_text_config()
    if base.device.type != "cuda" or base.dtype not in (torch.bfloat16, torch.float16):
        return "segments"
    if torch.cuda.get_device_capability(base.device) < MIN_CAPABILITY:
        return "segments"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "varlen" if head_dim % 8 == 0 and head_dim <= MOST_HEAD_DIM else "segments"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    micro_batch: MicroBatch | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row of each segment of `micro_batch`, after its prefix.

    Args:
        query, key, value: shape (1, heads, tokens, head_dim).
        micro_batch: None where a model does not hand it on, which `packing_check` notices by what then comes out.

    Returns:
        the output, shape (1, tokens, heads, head_dim), and no weights.
    """
    if micro_batch is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is None, "rows of examples have no mask"
    segments, prefix = micro_batch.segments, micro_batch.prefix

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(rows, heads, length, head_dim) each -> (rows, length, heads, head_dim)."""
        mask = _window_mask(q.shape[2], kwargs.get("sliding_window"), query.device)
        return sdpa(module, q, k, v, mask, **kwargs)[0]

    sizes = [prefix, *(rows * length for rows, length in segments)]
    queries = torch.split(query, sizes, dim=2)
    keys = torch.split(key, sizes, dim=2)
    values = torch.split(value, sizes, dim=2)
    outputs = []
    if prefix:
        outputs.append(attend(queries[0], keys[0], values[0])[0])
    for i, (rows, length) in enumerate(segments, start=1):
        output = attend(
            _rows_after_prefix(queries[0], queries[i], rows, length),
            _rows_after_prefix(keys[0], keys[i], rows, length),
            _rows_after_prefix(values[0], values[i], rows, length),
        )
        # What the prefix attends to does not depend on what follows: it was computed once, above.
        outputs.append(output[:, prefix:].flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _rows_after_prefix(prefix: torch.Tensor, segment: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Each row of a segment with a copy of the prefix before it.

    (1, heads, prefix, head_dim), (1, heads, rows * length, head_dim)
    -> (rows, heads, prefix + length, head_dim)
    """
    own = torch.unflatten(segment[0], 1, (rows, length)).transpose(0, 1)
    if prefix.shape[2] == 0:
        return own
    return torch.cat([prefix.expand(rows, -1, -1, -1), own], dim=2)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """True where a token attends: itself and the `window` - 1 before it. None where that is all before it."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


# Not compiled with the rest by torch.compile: segments differ in every step, and each would be
# compiled again.
_uncompiled: Any = torch.compiler.disable
AttentionInterface.register(NAMES["segments"], _uncompiled(packed_attention))
AttentionInterface.register(NAMES["varlen"], _uncompiled(varlen_attention))
