"""Attention over a row of several examples in one call: torch's variable-length flash attention (CUDA, 16 bit).

Segment by segment (`packed_attention.py`) a GPU is given a few small kernels for each segment of each layer, and waits
for the host. Here the number of kernels does not depend on the segments. With a shared prefix, keys and values are
[prefix, own tokens] for every example, while queries stay where they are: the causal mask is aligned with the last
key, so that each query sees the prefix and its own past.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from dpa_ds.data.batching import MicroBatch
from dpa_ds.distributed.device import send

MIN_CAPABILITY = (8, 0)
"""The oldest CUDA devices that torch's flash attention runs on: Ampere."""
MOST_HEAD_DIM = 256
"""The widest heads that it takes, in multiples of 8."""
# Of torch 2.13; 2.11 has no such argument.
_SHARES_KEY_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class PrefixCopies:
    """Where the keys of a row with a shared prefix lie once every example has a copy of the prefix before its own."""

    source: torch.Tensor
    """For each key of the copies, its position in the row, int64, shape (keys,)."""
    own: torch.Tensor
    """For each token of the row, where the copies have it first, int64, shape (tokens,)."""
    prefixes: torch.Tensor
    """Positions of the copies of the prefix, the original left out, int64, shape (examples, prefix)."""


@dataclass(frozen=True)
class Borders:
    """Where the examples of a row begin and end. Made once a forward pass, for all of its layers."""

    queries: torch.Tensor
    """Cumulative lengths, int32 on the device, shape (sequences + 1,); a shared prefix is a sequence of its own."""
    keys: torch.Tensor
    """Likewise, of keys and values."""
    longest_query: int
    longest_key: int
    copies: PrefixCopies | None
    """None where the row has no shared prefix: keys are then where queries are."""


def find_borders(micro_batch: MicroBatch, device: torch.device) -> Borders:
    """The borders of a micro-batch. Found on the CPU and sent without waiting for the device."""
    prefix = micro_batch.prefix
    lengths = []
    for rows, length in micro_batch.segments:
        lengths += [length] * rows
    first = [prefix] if prefix else []
    queries = torch.tensor([*first, *lengths])
    keys = queries if not prefix else torch.tensor([prefix, *(prefix + length for length in lengths)])
    return Borders(
        queries=send(_cumulated(queries).int(), device),
        keys=send(_cumulated(keys).int(), device),
        longest_query=int(queries.max()),
        longest_key=int(keys.max()),
        copies=_find_copies(prefix, lengths, device) if prefix else None,
    )


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    borders: Borders,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example of the row, after its prefix.

    Args:
        query, key, value: shape (1, heads, tokens, head_dim).

    Returns:
        the output, shape (1, tokens, heads, head_dim), and no weights.
    """
    assert attention_mask is None, "rows of examples have no mask"
    assert dropout == 0.0, "the base has no dropout (model/base.py)"
    queries = query[0].transpose(0, 1)
    keys = key[0].transpose(0, 1)
    values = value[0].transpose(0, 1)
    if borders.copies is not None:
        keys, values = _copy_prefix(keys, borders.copies), _copy_prefix(values, borders.copies)
    # Its window is the number of tokens before the own one; -1: all of them, and 0 after it.
    window = -1 if sliding_window is None else sliding_window - 1
    output = _attend(queries, keys, values, borders, scaling, window)
    return output.unsqueeze(0), None


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    borders: Borders,
    scaling: float | None,
    window: int,
) -> torch.Tensor:
    """The one call: (tokens, heads, head_dim) each -> (tokens, heads, head_dim)."""
    extra: dict[str, Any] = {}
    if keys.shape[1] != queries.shape[1]:
        if _SHARES_KEY_HEADS:
            extra["enable_gqa"] = True
        else:
            repeats = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    output = varlen_attn(
        queries,
        keys,
        values,
        borders.queries,
        borders.keys,
        borders.longest_query,
        borders.longest_key,
        scale=scaling,
        window_size=(window, 0),
        **extra,
    )
    assert isinstance(output, torch.Tensor)
    return output


class _CopyPrefix(torch.autograd.Function):
    """Gathers keys; its gradient is a sum in a fixed order, where that of `index_select` adds in any order."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, copies: PrefixCopies) -> torch.Tensor:
        ctx.copies = copies
        return row.index_select(0, copies.source)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        copies: PrefixCopies = ctx.copies
        num_copies, prefix = copies.prefixes.shape
        of_row = gradient.index_select(0, copies.own)
        of_copies = gradient.index_select(0, copies.prefixes.flatten())
        of_copies = of_copies.view(num_copies, prefix, *of_copies.shape[1:])
        of_row[:prefix] += of_copies.sum(0)
        return of_row, None


def _copy_prefix(row: torch.Tensor, copies: PrefixCopies) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (keys, heads, head_dim)."""
    copied = _CopyPrefix.apply(row, copies)  # type: ignore[no-untyped-call]
    assert isinstance(copied, torch.Tensor)
    return copied


def _find_copies(prefix: int, lengths: list[int], device: torch.device) -> PrefixCopies:
    source, own, prefixes = [torch.arange(prefix)], [torch.arange(prefix)], []
    start, place = prefix, prefix  # of the example in the row, and of its copy of the prefix among the keys
    for length in lengths:
        prefixes.append(torch.arange(place, place + prefix))
        own.append(torch.arange(place + prefix, place + prefix + length))
        source += [torch.arange(prefix), torch.arange(start, start + length)]
        start += length
        place += prefix + length
    return PrefixCopies(
        source=send(torch.cat(source), device),
        own=send(torch.cat(own), device),
        prefixes=send(torch.stack(prefixes), device),
    )


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
