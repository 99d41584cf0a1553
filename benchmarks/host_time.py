"""What the host does for a micro-batch, and how many kernels it launches: `python benchmarks/host_time.py`.

A GPU that computes a layer in 3 ms waits for a host that needs longer to launch its kernels. Here 32 layers of a model
so narrow that arithmetic costs nothing, forward and backward with both adapters, on one CPU thread. Attention segment
by segment, and in one call: torch's kernel for that needs a GPU, so that a stand-in is called, which computes nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from table import where_and_when
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import LOCAL, adapter_table
from dpa_ds.config.schema import LoraConfig
from dpa_ds.data.batching import MicroBatch
from dpa_ds.engine import varlen_attention
from dpa_ds.engine.packed_attention import Kernel, PackedAttention

NUM_LAYERS = 32
KERNELS: tuple[Kernel, Kernel] = ("segments", "varlen")


@dataclass(frozen=True)
class Row:
    """A row of examples, by its layout alone."""

    name: str
    segments: tuple[tuple[int, int], ...]
    prefix: int = 0

    def micro_batch(self) -> MicroBatch:
        """Tokens at random, all of them labels."""
        positions = [torch.arange(self.prefix)]
        for rows, length in self.segments:
            positions += [torch.arange(self.prefix, self.prefix + length)] * rows
        position_ids = torch.cat(positions)
        ids = torch.randint(100, (len(position_ids),))
        return MicroBatch(ids, position_ids, ids, self.segments, self.prefix)


ROWS = (
    Row("1 segment", ((24, 12),)),
    Row("12 segments", tuple((2, 6 + k) for k in range(12))),
    Row("12 segments, prefix", tuple((2, 6 + k) for k in range(12)), prefix=4),
)


class LaunchCount(TorchDispatchMode):
    """Counts operations that compute something, as a GPU would be given a kernel for each."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation, in the backward pass too."""
        self.num += not func.is_view
        return func(*args, **(kwargs or {}))


class _NoAttention(torch.autograd.Function):
    """In place of torch's kernel: one operation forward, one for each gradient."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        return query.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def main() -> None:
    """Print a table: kernel by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    print(where_and_when())
    adapters = build()
    varlen_attention.varlen_attn = lambda query, key, value, *_, **__: _NoAttention.apply(query, key, value)  # type: ignore[assignment]
    print(
        f"{NUM_LAYERS} layers, forward and backward, both adapters: launches a layer, ms of the host (lowest to "
        "highest)"
    )
    print(
        "| row | segments: launches | ms | one call: launches | ms | ms, segments / one call |\n"
        "|---|---|---|---|---|---|"
    )
    for row in ROWS:
        works = {kernel: work_of(adapters, row.micro_batch(), kernel) for kernel in KERNELS}
        seconds: dict[Kernel, list[float]] = {kernel: [] for kernel in works}
        for repeat in range(args.repeats + 1):
            for kernel, work in works.items():  # in turns: other programs on the machine slow both
                started = time.process_time()
                work()
                if repeat:  # the first warms up
                    seconds[kernel].append(time.process_time() - started)
        cells = [
            f"{launches(work) / NUM_LAYERS:.0f} | {milliseconds(seconds[kernel])}" for kernel, work in works.items()
        ]
        ratio = statistics.median(seconds["segments"]) / statistics.median(seconds["varlen"])
        print(f"| {row.name} | {' | '.join(cells)} | {ratio:.2f} |")


def build() -> AdapterModel:
    """A narrow model with an adapter in training beside a frozen one."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=100,
        attn_implementation="sdpa",
    )
    lora = LoraConfig(dropout=0.0)
    adapters = AdapterModel(LlamaForCausalLM(config), adapter_table(lora), lora)
    for adapter in adapters.table:
        adapters.set_trainable(adapter, adapter == LOCAL)
    adapters.set_mix(global_local_mix(0.5))
    return adapters


def work_of(adapters: AdapterModel, batch: MicroBatch, kernel: Kernel) -> Callable[[], None]:
    """A forward and backward pass of `batch`."""
    packing = PackedAttention(adapters.base_model, kernel)

    def work() -> None:
        with packing:
            arguments = packing.arguments(batch, torch.device("cpu"))
            logits = adapters.peft_model(input_ids=batch.input_ids[None], use_cache=False, **arguments).logits
            logits.sum().backward()

    return work


def launches(work: Callable[[], None]) -> int:
    """Operations of `work` that are no views."""
    with LaunchCount() as count:
        work()
    return count.num


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and range."""
    return f"{1e3 * statistics.median(seconds):.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"


if __name__ == "__main__":
    main()
