"""Padded rows beside one example a pass, on a model whose packed rows would leak: `python benchmarks/rows.py`.

A random LFM2 (convolutions and attention), steps of 32 examples of 40 to 120 tokens on one thread of a CPU, each way in
turn. Prints the ratio of their times, and how far their losses are apart.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, Phase, adapter_table
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.schema import ClusterConfig, LoraConfig, TrainConfig
from dpa_ds.data.batching import build_step
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import build_world
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.engine.rows import PaddedRows, Rows, SingleRows

NUM_EXAMPLES = 32
LENGTHS = (40, 120)
VOCAB = 8192


def main(argv: Sequence[str] | None = None) -> None:
    """Print the ratio, its range over the repeats, and the difference of the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    engine, examples = build(arguments.hidden), draw_examples()
    ways: dict[str, Rows] = {"padded": PaddedRows(), "single": SingleRows()}
    run_step(engine, ways["padded"], examples)  # warm
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for name, rows in ways.items():
            taken, losses[name] = run_step(engine, rows, examples)
            seconds[name].append(taken)
    ratios = [single / padded for padded, single in zip(seconds["padded"], seconds["single"], strict=True)]
    apart = abs(losses["padded"] / losses["single"] - 1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}; LFM2 of width {arguments.hidden}, CPU time of one thread")
    print(f"single / padded   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"losses apart, relative   {apart:.1e}")


def build(hidden: int) -> AdapterEngine:
    """An engine of one rank on a random LFM2, its own choice of rows left alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        layer_types=["conv", "conv", "full_attention"] * 2,
        pad_token_id=0,
    )
    base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "in_proj"], dropout=0.0)
    adapters = AdapterModel(base, adapter_table(lora), lora)
    job = JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))
    world = build_world(job, Topology((1,), 1), ClusterConfig(device="cpu"), 60.0)
    train, path = TrainConfig(), "ds_configs/zero1.json"
    ds_json = build_deepspeed_json(load_deepspeed_json(path), path, train, "fp32", 1)
    engine = AdapterEngine(adapters, world, train, ds_json)
    assert type(engine.rows) is PaddedRows, engine.rows.description
    return engine


def draw_examples() -> TokenizedExamples:
    """Random tokens; the last half of each example is its answer."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(*LENGTHS, NUM_EXAMPLES)
    tokens = generator.integers(1, VOCAB, int(lengths.sum())).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedExamples(tokens, starts, lengths // 2, 0)


def run_step(engine: AdapterEngine, rows: Rows, examples: TokenizedExamples) -> tuple[float, float]:
    """CPU seconds of an optimizer step at learning rate 0, which leaves the adapters as they are, and its loss."""
    engine.rows = rows
    engine.activate(Phase(GLOBAL, 0.0))
    step = build_step(examples, range(NUM_EXAMPLES), 0, 1, rows.batching(2048, 0))
    started = time.process_time()
    result = engine.train_step(step, 0.0)
    return time.process_time() - started, float(result.loss_share)


if __name__ == "__main__":
    main()
