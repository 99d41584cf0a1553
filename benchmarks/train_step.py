"""Examples per second of one client's phases, against the plain Trainer and against the frozen base alone.

    python benchmarks/train_step.py --model .cache/demo/SmolLM2-135M-Instruct --data .cache/demo/federation

All variants run in this process, in turns, on the same examples in the same optimizer steps. The losses of ours and
of the Trainer are compared before any number is printed: what is timed is the same work.
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from floor import Floor, matmul_flops_per_second, phase_flops
from progress import measuring
from table import Steps, Variant, draw, processor, render, summarize, where_and_when

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import Phase, adapter_table
from dpa_ds.config.schema import DataConfig, EngineConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from dpa_ds.data.batching import step_indices
from dpa_ds.data.formats import build_format
from dpa_ds.data.sources import read_client
from dpa_ds.data.tokenize import TokenizedExamples, tokenize_examples
from dpa_ds.model.base import load_base
from dpa_ds.model.directory import load_tokenizer
from dpa_ds.model.precision import DTYPES

# cpu: CPU time of this process, which other programs on the machine lengthen far less than wall time.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# Largest relative difference of the first step's loss; bf16 keeps 8 bits, and the stacks round in different places.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


# Ours, and ours without one of its parts: how much each gains.
PARTS = {
    "ours": {},
    "ours, no prefix": {"prefix_sharing": False},
    "ours, PEFT layers": {"peft_layers": True},
    "ours, neither": {"prefix_sharing": False, "peft_layers": True},
}


def main() -> None:
    """Entry point."""
    args = _parse()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    result = measure(args)
    print(render(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.picture:
        draw(result, Path(args.picture))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the stacks, time them in turns, check that they did the same work."""
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    config = _recipe(args, device)
    tokenizer = load_tokenizer(Path(args.model))
    client = read_client(config.data, config.seed, args.client)
    examples = tokenize_examples(
        client.train, build_format(tokenizer, config.data), config.data.max_length, client.name
    )
    steps = step_indices(len(examples), args.batch_size, args.steps, (config.seed,))
    assert all(len(step) == args.batch_size for step in steps), "fewer --steps: the last step of an epoch is short"

    measuring("load the base for each stack")
    base = load_base(config.model, Path(args.model), {}, device)
    variants = [*_stacks(config, args, tokenizer, examples, steps, device), *_floors(base, args, examples, steps)]
    flops = phase_flops(base, examples, steps)
    peak = 0.0
    for variant in variants:
        measuring(f"warm up {variant.name}, {variant.phase}")
        variant.run(steps[:1])
    for repeat in range(1, args.repeats + 1):
        for variant in variants:
            measuring(f"repeat {repeat} of {args.repeats}: {variant.name}, {variant.phase}")
            seconds, variant.losses = variant.run(steps)
            variant.seconds.append(seconds)
        peak = max(peak, matmul_flops_per_second(DTYPES[config.model.precision], device, CLOCKS[args.clock]))
    loss_difference = _check_losses(variants, LOSS_TOLERANCE[config.model.precision])

    lengths = [examples.length(index) for step in steps for index in step]
    return {
        "where": where_and_when(_hardware(device), ("torch", "deepspeed", "transformers", "peft")),
        "model": Path(args.model).name,
        "data": f"{Path(args.data).name}, client {args.client}",
        "setting": f"{config.model.precision}, {args.steps} steps of {args.batch_size} examples, "
        f"{args.repeats} repeats, {args.clock} time, {Path(args.deepspeed_config).name}, "
        f"at most {args.micro_batch_tokens} tokens a pass",
        "tokens_per_example": [min(lengths), round(statistics.fmean(lengths), 1), max(lengths)],
        "first_loss_relative_difference": loss_difference,
        "matmul_peak_flops_per_second": peak,
        "phase_flops": flops,
        "variants": summarize(variants, len(lengths), sum(lengths), flops, peak),
    }


def _stacks(
    config: RunConfig,
    args: argparse.Namespace,
    tokenizer: Any,
    examples: TokenizedExamples,
    steps: Steps,
    device: torch.device,
) -> list[Variant]:
    """Ours and the Trainer's, for both phases, all from the same weights."""
    # Imported here: both import DeepSpeed, which must find the device that was asked for.
    from dpa_engine import DpaEngine, random_state, world_of_one_rank
    from plain_trainer import PlainTrainer

    model = load_base(config.model, Path(args.model), {}, device)
    plain = PlainTrainer(model, tokenizer, config.lora, config.train, device, CLOCKS[args.clock])
    base = load_base(config.model, Path(args.model), {}, device)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    states = {adapter: random_state(adapters, adapter) for adapter in adapters.table}
    world = world_of_one_rank(config)
    pad_id, clock = int(tokenizer.pad_token_id), CLOCKS[args.clock]
    ours = DpaEngine(adapters, config, examples, states, pad_id, clock, world)
    beside = None
    if args.beside:
        other = replace(config, model=replace(config.model, precision=args.beside))
        base = load_base(other.model, Path(args.model), {}, device)
        adapters = AdapterModel(base, adapter_table(other.lora), other.lora)
        beside = DpaEngine(adapters, other, examples, states, pad_id, clock, world)
    variants = []
    for phase in (Phase("global", 0.0), Phase("local", config.method.alpha)):
        for name, how in PARTS.items() if args.parts else [("ours", {})]:
            run = lambda chosen, phase=phase, how=how: ours.run(phase, chosen, **how)  # noqa: E731
            computed = sum(ours.build(step, how.get("prefix_sharing", True)).computed_tokens for step in steps)
            variants.append(Variant(name, phase.trainable, computed, run))
        if beside is not None:
            run = lambda chosen, phase=phase: beside.run(phase, chosen)  # noqa: E731
            computed = sum(beside.build(step).computed_tokens for step in steps)
            variants.append(Variant(f"ours, {args.beside}", phase.trainable, computed, run))
        for size in args.trainer_batch:
            run = lambda chosen, phase=phase, size=size: plain.run(phase, states, examples, chosen, size)  # noqa: E731
            computed = sum(plain.computed_tokens(examples, step, size) for step in steps)
            variants.append(Variant(f"Trainer, batch {size}", phase.trainable, computed, run))
    return variants


def _floors(base: Any, args: argparse.Namespace, examples: TokenizedExamples, steps: Steps) -> list[Variant]:
    real = sum(examples.length(index) for step in steps for index in step)
    variants = []
    for budget in args.floor_tokens:
        floor = Floor(base, budget, CLOCKS[args.clock])
        run = lambda chosen, floor=floor: (floor.run(examples, chosen), [])  # noqa: E731
        variants.append(Variant(f"floor, {budget} tokens", "any", real, run))
    return variants


def _check_losses(variants: Sequence[Variant], tolerance: float) -> float:
    """Largest relative difference between the first losses of ours and of others in the same phase; NaN
    without others."""
    first = {v.phase: v.losses[0] for v in variants if v.name == "ours"}
    others = (v for v in variants if v.losses and v.name != "ours")
    worst = max((abs(v.losses[0] / first[v.phase] - 1) for v in others), default=nan)
    assert not worst > tolerance, [(v.phase, v.name, v.losses) for v in variants]
    assert len(set(first.values())) == len(first), f"the phases have the same loss, so alpha has no effect: {first}"
    return worst


def _recipe(args: argparse.Namespace, device: torch.device) -> RunConfig:
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return RunConfig(
        model=ModelConfig(path=args.model, precision=precision),
        lora=LoraConfig(dropout=0.0),  # the stacks draw dropout in different order
        data=DataConfig(path=args.data),
        train=TrainConfig(batch_size=args.batch_size, micro_batch_tokens=args.micro_batch_tokens),
        engine=EngineConfig(deepspeed_config=args.deepspeed_config),
    )


def _hardware(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {threads}"
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {threads}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/demo/SmolLM2-135M-Instruct", help="Hugging Face model directory")
    parser.add_argument("--data", default=".cache/demo/federation", help="federation in the authors' layout")
    parser.add_argument("--client", type=int, default=0, help="whose examples (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 elsewhere")
    parser.add_argument("--beside", choices=("fp32", "bf16"), help="time ours in this precision, too")
    parser.add_argument("--batch_size", type=int, default=16, help="examples per optimizer step (default: 16)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per run (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant (default: 3)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall time, or CPU time for a machine that others use as well (default: wall)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    parser.add_argument(
        "--micro_batch_tokens", type=int, default=4096, help="bound on one pass of ours (default: 4096)"
    )
    parser.add_argument("--deepspeed_config", default="ds_configs/zero1.json")
    parser.add_argument(
        "--trainer_batch",
        type=int,
        nargs="*",
        help="the Trainer's batch sizes to try (default: 4, 8, the whole step); no number: without the Trainer",
    )
    parser.add_argument("--parts", action="store_true", help="also time ours without each of its parts")
    parser.add_argument(
        "--floor_tokens", type=int, nargs="+", default=[1024, 4096], help="the floor's pass sizes (default: 1024 4096)"
    )
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--picture", help="also draw it to this file (PNG)")
    args = parser.parse_args()
    if args.clock == "cpu" and (args.device != "cpu" or args.threads != 1):
        parser.error("--clock cpu adds up the time of all threads: it needs --device cpu --threads 1")
    if args.trainer_batch is None:
        args.trainer_batch = [n for n in (4, 8) if n < args.batch_size] + [args.batch_size]
    if any(args.batch_size % size for size in args.trainer_batch):
        parser.error(f"--trainer_batch {args.trainer_batch} must divide --batch_size {args.batch_size}")
    return args


if __name__ == "__main__":
    main()
