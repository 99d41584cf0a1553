"""A LLaMA-shaped model with random weights on one device: what a step and an answer take, beside the plan and the peak.

    python benchmarks/large_model.py --model llama-13b --gpu h100-80g --length 2048 --rows 4
    python benchmarks/large_model.py --model llama-7b --gpu h100-80g --recompute --compile
    python benchmarks/large_model.py --model llama-1b --layers 2 --gpu cpu --length 128 --rows 2     # a trial
    without a GPU

Speed does not depend on the weights. Training: local phase, both adapters mixed in; MFU counts 4 N a token (2
forward, 2 for the gradient of the inputs) whatever is recomputed. Answers: each row with a weight of its own,
against the same
model with one adapter merged into its weights.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from table import where_and_when

from dpa_ds.planning.hardware import GPUS, parse_cluster
from dpa_ds.planning.shapes import PRESETS, Shape, read_shape


def main() -> None:
    """Entry point."""
    args = _parse()
    if args.gpu == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported
    shape = read_shape(args.model, args.model if args.model in PRESETS else None)
    shape = replace(shape, layers=args.layers) if args.layers else shape
    where = where_and_when(args.gpu, ("torch", "deepspeed", "transformers"))
    print(f"{where}; {shape.parameters / 1e9:.2f} G parameters")
    engine, config = _build(shape, args)
    measure_steps(engine, config, shape, args)
    if args.answers:
        measure_answers(engine.adapters, args)


def measure_steps(engine: Any, config: Any, shape: Shape, args: argparse.Namespace) -> None:
    """Print tokens/s and MFU of optimizer steps (median, lowest, highest), and the peak of the memory beside
    the plan."""
    import torch
    from planner import Setting, _step

    from dpa_ds.adapters.methods import Phase
    from dpa_ds.planning.plan import OVERHEAD, judge, layout_of
    from dpa_ds.planning.scenario import Workload, scenario_of

    setting = Setting(vocab_size=shape.vocab, rows=args.rows, length=args.length, label_share=args.label_share)
    step, tokens = _step(setting, 1), args.rows * args.length
    engine.activate(Phase("local", 0.5))
    for _ in range(2):
        engine.train_step(step, 1e-4)
    on_gpu = torch.cuda.is_available() and args.gpu != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rates = sorted(tokens / _seconds(lambda: engine.train_step(step, 1e-4), on_gpu) for _ in range(args.repeats))
    flops = parse_cluster(f"gpu={args.gpu}").flops
    median, share = statistics.median(rates), 4 * shape.parameters / flops
    print(
        f"step of {args.rows} x {args.length} tokens: {median:.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
        f"MFU {median * share:.1%} of {flops / 1e12:g} TFLOP/s"
    )
    scenario = scenario_of(config, shape, _zero(config), Workload())
    layout = replace(layout_of(scenario, 1), tokens=tokens, labels=round(tokens * args.label_share))
    plan = judge(scenario, parse_cluster(f"gpu={args.gpu}"), layout)
    planned = plan.total - OVERHEAD
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        print(f"peak {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB: {peak / planned:.3f}")
    else:
        print(f"planned {planned / 1e9:.2f} GB (measured on a GPU only; on a CPU: benchmarks/planner.py)")


def measure_answers(adapters: Any, args: argparse.Namespace) -> None:
    """Print new tokens/s with a weight for each row, and the ratio to one adapter merged into the base."""
    import torch

    from dpa_ds.config.schema import GenerationConfig
    from dpa_ds.inference.generation import generate

    adapters.base_model.gradient_checkpointing_disable()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 1000, (args.answers, args.prompt), generator=draw).tolist()
    alphas = torch.linspace(0.1, 0.9, args.answers)
    config = GenerationConfig(num_beams=1, max_new_tokens=args.new_tokens)
    on_gpu = torch.cuda.is_available() and args.gpu != "cpu"

    def answer() -> Any:  # no token ends an answer: all are of full length
        return generate(adapters, prompts, alphas, config, pad_id=0, eos_id=-1)

    model, ids = adapters.base_model, torch.tensor(prompts, device=adapters.device)
    words = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}

    def answer_merged() -> Any:  # by transformers alone
        return model.generate(ids, attention_mask=torch.ones_like(ids), **words)

    weighted, merged = [], []
    for _ in range(args.repeats + 1):
        weighted.append(_seconds(answer, on_gpu))
        adapters.set_mix(adapters.no_mix)
        adapters.peft_model.merge_adapter(["global"])
        merged.append(_seconds(answer_merged, on_gpu))
        adapters.peft_model.unmerge_adapter()
    ratios = sorted(m / w for m, w in zip(merged[1:], weighted[1:], strict=True))
    rate = args.answers * args.new_tokens / statistics.median(weighted[1:])
    print(
        f"{args.answers} answers of {args.new_tokens} tokens: {rate:.0f} tokens/s, {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}) times one merged adapter"
    )


def _build(shape: Shape, args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpa_ds.adapters.adapter_model import AdapterModel
    from dpa_ds.adapters.methods import adapter_table
    from dpa_ds.config.load import load_config
    from dpa_ds.distributed.job_store import JobStore
    from dpa_ds.distributed.launchers import Launch
    from dpa_ds.distributed.topology import Topology
    from dpa_ds.distributed.world import build_world
    from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
    from dpa_ds.model.base import DTYPES, load_base

    transformers.utils.logging.set_verbosity_error()
    argv = [f"--config={Path(__file__).parents[1] / 'launch/recipes/paper.yaml'}", "--lora.dropout=0"]
    argv += [f"--model.precision={args.precision}", f"--engine.deepspeed_config={args.deepspeed_config}"]
    argv += [f"--model.gradient_checkpointing={str(args.recompute).lower()}", f"--model.attention={args.attention}"]
    config = load_config(argv)
    llama = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=args.length,
    )
    world = build_world(JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0)), Topology((1,), 1), config.cluster, 600.0)
    file_json = {"zero_optimization": _zero(config)}
    ds_json = build_deepspeed_json(file_json, "benchmarks/large_model.py", config.train, config.model.precision, 1)
    torch.set_default_dtype(DTYPES[args.precision])
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(world.device):
            LlamaForCausalLM(llama).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        base = load_base(config.model, Path(folder), ds_json, world.device)
    if args.compile:
        for layer in base.model.layers:
            layer.compile()
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    return AdapterEngine(adapters, world, config.train, ds_json), config


def _zero(config: Any) -> Any:
    from dpa_ds.config.deepspeed_json import load_deepspeed_json

    return load_deepspeed_json(config.engine.deepspeed_config)["zero_optimization"]


def _seconds(work: Callable[[], Any], on_gpu: bool) -> float:
    import torch

    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="llama-7b", help=f"{', '.join(PRESETS)}, or a directory with a config.json (%(default)s)"
    )
    parser.add_argument("--layers", type=int, help="only so many of its layers")
    parser.add_argument("--gpu", choices=GPUS, default="h100-80g", help="whose peak is meant (%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2", "eager"), default="sdpa")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero0.json", help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="examples of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (%(default)s)")
    parser.add_argument("--label_share", type=float, default=0.25, help="of these, to be predicted (%(default)s)")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile for each decoder layer")
    parser.add_argument("--answers", type=int, default=16, help="answers in a batch; 0: none (%(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
