"""A LLaMA-shaped base of random weights, made on the device, and the project's engine over it.

Speed does not depend on the weights, and a file of them would have to travel.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.dpa_engine import random_state
from benchmarks.gpu.results import Results
from benchmarks.gpu.settings import Setting, num_prompt_tokens
from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import LOCAL, Phase, adapter_table
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.data.batching import StepBatch, build_step
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import build_world
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.model.precision import DTYPES
from dpa_ds.planning.hardware import parse_cluster
from dpa_ds.planning.shapes import Shape

PHASE = Phase(LOCAL, 0.5)
"""The one that costs more: both adapters take part."""
SHORT_PREFIX = 4
"""Tokens that all short examples begin with: those of `### Instruction:` and a line break."""
MIXED_PREFIX = 18
"""Tokens that all mixed examples begin with: an instruction."""


class Bench:
    """The base, its adapters and the engine of one process, which measures use in turns."""

    def __init__(self, setting: Setting, gpu: str, results: Results) -> None:
        self.setting = setting
        self.results = results
        self.shape = setting.shape
        self.config = setting.config()
        self.peak_flops = parse_cluster(f"gpu={gpu}").flops
        job = JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))
        self.world = build_world(job, Topology((1,), 1), self.config.cluster, federation_timeout_seconds=600.0)
        self.device = self.world.device
        self.on_gpu = self.device.type == "cuda"
        file_json = load_deepspeed_json(setting.deepspeed_config)
        ds_json = build_deepspeed_json(
            file_json, setting.deepspeed_config, self.config.train, setting.precision, world_size=1
        )
        self.base = self.random_base()
        if setting.recompute:
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if setting.compiled:
            # Whether a step can be compiled is what a dry run shows; machine code takes a C++ compiler and minutes.
            backend = "inductor" if self.on_gpu else "eager"
            for layer in self.base.model.layers:
                layer.compile(backend=backend)
        self.adapters = AdapterModel(self.base, adapter_table(self.config.lora), self.config.lora)
        self.states = {adapter: random_state(self.adapters, adapter) for adapter in self.adapters.table}
        self.engine = AdapterEngine(self.adapters, self.world, self.config.train, ds_json)
        for adapter, state in self.states.items():
            self.engine.write_state(adapter, state)

    def random_base(self) -> Any:
        """A base whose weights are the same in every call."""
        torch.manual_seed(0)
        torch.set_default_dtype(DTYPES[self.setting.precision])
        try:
            if self.setting.quantization == "none":
                with self.device:
                    base = LlamaForCausalLM(llama_config(self.shape))
            else:
                base = random_quantized(llama_config(self.shape), self.setting.quantization, self.device)
        finally:
            torch.set_default_dtype(torch.float32)
        # A model that is loaded has them in fp32 too: in bf16 far positions would be wrong.
        assert base.model.rotary_emb.inv_freq.dtype == torch.float32
        base.config.use_cache = False
        base.generation_config = GenerationConfig()
        return base

    def build(self, examples: TokenizedExamples, token_budget: int, prefix_sharing: bool = True) -> StepBatch:
        """One step of all `examples`, at most `token_budget` tokens a pass."""
        batching = self.engine.rows.batching(token_budget, pad_id=0)
        if not prefix_sharing:
            batching = replace(batching, prefix_sharing=False)
        return build_step(examples, range(len(examples)), 0, 1, batching)

    def train(self, step: StepBatch) -> torch.Tensor:
        """One optimizer step at learning rate 0, so that all variants start from the same weights; its loss."""
        return self.engine.train_step(step, 0.0).loss_share

    def seconds(self, work: Callable[[], Any]) -> float:
        """What `work` takes, until the device has finished it."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def in_turns(
        self, works: Mapping[str, Callable[[], Any]], states: Mapping[str, AbstractContextManager[None]] | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each of `works` in every repeat, after one that is not counted.

        In turns, so that a machine that becomes slower or faster does so for all alike.

        Args:
            states: the context in which a work runs, by its name; entering and leaving it is not timed.
        """
        states = states or {}
        found: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(self.setting.repeats + 1):
            for name, work in works.items():
                with states.get(name, nullcontext()):
                    seconds = self.seconds(work)
                if repeat > 0:
                    found[name].append(seconds)
        return found

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what a measure no longer refers to."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def put_step(self, measure: str, variant: str, step: StepBatch) -> None:
        """Time `step`, and put its speed, its peak of memory and what it consists of."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        loss = float(self.train(step))
        seconds = self.in_turns({"step": lambda: self.train(step)})["step"]
        self.results.put(
            measure,
            variant,
            **self.speed(step.real_tokens, seconds),
            **self.memory(),
            loss=loss,
            num_passes=len(step.micro_batches),
            num_segments=[len(micro_batch.segments) for micro_batch in step.micro_batches],
            prefix=step.micro_batches[0].prefix,
            computed_share=round(step.computed_tokens / step.real_tokens, 4),
        )

    def speed(self, num_tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
        """Tokens/s and MFU at the median.

        MFU counts 4 N FLOPs a token, whatever is recomputed: 2 N forward, 2 N for the gradient of the inputs.
        """
        rate = num_tokens / statistics.median(seconds)
        return {
            "num_tokens": num_tokens,
            "seconds": [round(one, 4) for one in seconds],
            "tokens_per_second": round(rate, 1),
            "mfu": round(4 * self.shape.parameters * rate / self.peak_flops, 4),
        }

    def memory(self) -> dict[str, float | None]:
        """Peaks of torch's allocator since they were reset, in GB; None on a CPU."""
        if not self.on_gpu:
            return {"peak_gb": None, "reserved_gb": None}
        return {
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
        }


def random_quantized(config: LlamaConfig, kind: str, device: torch.device) -> Any:
    """A Llama whose linear layers are quantised as they are made: in 16 bits it may be larger than the device."""
    from dpa_ds.model.quantized_layers import settle_layers

    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not base.lm_head:
            weight = torch.randn(module.weight.shape, device=device).mul_(0.02)
            base.set_submodule(path, quantized_layer(weight, kind))
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # embedding, output head and norms; those are 1, and a little more
                filled = torch.randn(parameter.shape, device=device).mul_(0.02).add_(float(parameter.dim() == 1))
                module.register_parameter(name, torch.nn.Parameter(filled))
    with device:
        base.model.rotary_emb = type(base.model.rotary_emb)(config)
    settle_layers(base)
    return base


def quantized_layer(weight: torch.Tensor, kind: str) -> torch.nn.Module:
    """A linear layer that holds `weight` in `kind`, on the weight's device."""
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    from dpa_ds.model.quantized_layers import Int8Linear

    if kind == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return Int8Linear(codes, scales, None)
    outputs, inputs = weight.shape
    layer = Linear4bit(inputs, outputs, False, weight.dtype, compress_statistics=False, quant_type=kind, device="meta")
    quantized = Params4bit(weight, compress_statistics=False, quant_type=kind, module=layer)
    layer.weight = quantized.to(weight.device)
    return layer


def llama_config(shape: Shape) -> LlamaConfig:
    """transformers' config of a model of that shape."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )


def long_examples(setting: Setting) -> TokenizedExamples:
    """Rows of equal length: one segment a pass."""
    return random_examples([setting.length] * setting.rows, prefix=0, vocab=setting.shape.vocab)


def short_examples(setting: Setting) -> TokenizedExamples:
    """The paper's step: 64 examples of 40 to 104 tokens, mean 69, which begin alike. Many segments a pass."""
    draw = random.Random(1)
    lengths = []
    for _ in range(64):
        lengths.append(min(104, max(40, round(draw.gauss(69, 12)))))
    return random_examples(lengths, SHORT_PREFIX, setting.shape.vocab)


def mixed_examples(setting: Setting) -> TokenizedExamples:
    """64 examples of 40 to 512 tokens, evenly in the logarithm: as many segments, less alike."""
    draw = random.Random(0)
    lengths = []
    for _ in range(64):
        lengths.append(int(40 * 12.8 ** draw.random()))
    return random_examples(lengths, MIXED_PREFIX, setting.shape.vocab)


def random_examples(lengths: Sequence[int], prefix: int, vocab: int) -> TokenizedExamples:
    """Examples of random tokens, of which the first `prefix` are common; the last quarter of each is the answer."""
    draw = np.random.default_rng(0)
    rows = []
    for length in lengths:
        row = draw.integers(3, vocab, length)
        row[:prefix] = np.arange(3, 3 + prefix)
        rows.append(row)
    return TokenizedExamples(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        spans=np.array([(num_prompt_tokens(length), length) for length in lengths], dtype=np.int32),
        span_offsets=np.arange(len(lengths) + 1),
        num_dropped=0,
    )
