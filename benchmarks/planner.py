"""What a training step takes, beside what `dpa_ds.planning` says: `python benchmarks/planner.py`.

Every case is a job of ranks (gloo, CPU, one thread each) that takes steps of this project's engine on a random Llama: a
global phase, then a local one, so that both adapters have their optimizer state. Memory: bytes of all live
tensor storages before the last step, plus the high-water mark of torch's allocator inside it, as torch.profiler
records it. Rows are of
equal length, and every row has the same share of labels, as the plan assumes. Seconds, in fp32: the median of more such
steps, beside the plan for all FLOP/s of a large matrix product and all bandwidth of an all-gather in the same call.
ZeRO-3's gathers: bytes that a rank receives in a step, beside the plan and the floor, which is the base once.
"""

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RANKS, REPEATS = 2, 5
SMALL_BUCKETS = {
    "reduce_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_max_reuse_distance": 20_000_000,
    "stage3_param_persistence_threshold": 1000,
}
"""So that what is measured is the model, not DeepSpeed's buckets."""


@dataclass(frozen=True)
class Setting:
    """A random Llama and one micro-batch."""

    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 16000
    rows: int = 4
    length: int = 128
    label_share: float = 0.5


LARGE, SMALL = Setting(), Setting(256, 688, 6, vocab_size=4000)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    stage: int
    precision: str = "fp32"
    recompute: bool = False
    dropout: float = 0.0
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    quantization: str = "none"

    @property
    def name(self) -> str:
        """For the table."""
        words = [f"ZeRO {self.stage}", self.precision, f"r {self.rank}, {len(self.targets)} layers"]
        if self.recompute:
            words.append("recompute")
        if self.quantization != "none":
            words.append(self.quantization)
        if self.dropout > 0:
            words.append(f"dropout {self.dropout}")
        return ", ".join(words)


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = [
    *(Case(stage) for stage in range(4)),
    *(Case(stage, "bf16") for stage in range(4)),
    Case(0, recompute=True),
    Case(3, recompute=True),
    Case(0, dropout=0.05),
    Case(0, "bf16", dropout=0.05),
    Case(3, dropout=0.05),
    *(Case(stage, rank=64, targets=ALL_LINEAR) for stage in range(4)),
    Case(3, rank=64, targets=ALL_LINEAR, recompute=True),
    *(Case(1, quantization=kind) for kind in ("int8", "nf4")),
    *(Case(1, quantization=kind, rank=64, targets=ALL_LINEAR, recompute=True) for kind in ("int8", "nf4")),
]


def main() -> None:
    """Prints one line a case as it is measured, then what was assumed for the plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", type=int, nargs="*", help=f"numbers of the cases (0 to {len(CASES) - 1}); default: all"
    )
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--model", type=Path, help="a directory with a Llama, in the place of the random ones")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests import this file as benchmarks.planner
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    print(f"{datetime.date.today()}; {options.ranks} ranks of one thread; fp32: {LARGE}; bf16: {SMALL}")
    print(
        f"{'':52}{'MB measured':>12}{'planned':>9}{'ratio':>7}{'s a step':>11}{'planned':>9}{'ratio':>7}"
        f"{'MB gathered':>13}{'planned':>9}{'ratio':>7}{'to floor':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in options.cases or range(len(CASES)):
            case = CASES[number]
            setting = LARGE
            if case.precision == "bf16":  # without native bf16 a CPU takes minutes for a step
                setting = SMALL
            model = options.model
            if model is None:
                model = write_model(Path(folder) / f"model-{setting.hidden_size}", setting)
            argv = write_recipe(Path(folder), model, case)
            found = _on_ranks(options.ranks, Path(folder), setting, argv, timed=case.precision == "fp32")
            print(_line(case, setting, argv, found, options.ranks), flush=True)


def write_recipe(folder: Path, model: Path, case: Case) -> list[str]:
    """The arguments of a recipe for `case`, with a DeepSpeed JSON of small buckets."""
    ds_json = folder / f"zero{case.stage}.json"
    content: dict[str, Any] = {"zero_optimization": {"stage": case.stage, "overlap_comm": False}}
    if case.stage:
        content["zero_optimization"] |= SMALL_BUCKETS
        content["data_types"] = {"grad_accum_dtype": "fp32"}
    ds_json.write_text(json.dumps(content))
    values = {
        "model.path": model,
        "model.precision": case.precision,
        "model.quantization": case.quantization,
        "model.gradient_checkpointing": str(case.recompute).lower(),
        "lora.rank": case.rank,
        "lora.dropout": case.dropout,
        "lora.target_modules": f"[{','.join(case.targets)}]",
        "data.path": folder,
        "engine.deepspeed_config": ds_json,
    }
    recipe = Path(__file__).parents[1] / "launch/recipes/paper.yaml"
    return [f"--config={recipe}", *(f"--{key}={value}" for key, value in values.items())]


def planned(argv: list[str], setting: Setting, flops: float, bandwidth: float, ranks: int) -> Any:
    """The planner's judgement of that micro-batch, for measured FLOP/s and bytes/s, all of which it may use."""
    from dpa_ds.config.deepspeed_json import load_deepspeed_json
    from dpa_ds.config.load import load_config
    from dpa_ds.planning.hardware import parse_cluster
    from dpa_ds.planning.plan import LINK_EFFICIENCY, judge, layout_of
    from dpa_ds.planning.scenario import Workload, scenario_of
    from dpa_ds.planning.shapes import read_shape

    tokens = setting.rows * setting.length
    config = load_config([*argv, f"--train.batch_size={setting.rows * ranks}", f"--train.micro_batch_tokens={tokens}"])
    zero = load_deepspeed_json(config.engine.deepspeed_config)["zero_optimization"]
    shape = read_shape(config.model.path, None)
    scenario = scenario_of(config, shape, zero, Workload(tokens=setting.length))
    layout = replace(layout_of(scenario, ranks), tokens=tokens, labels=round(tokens * setting.label_share))
    cluster = replace(parse_cluster(f"gpus={ranks},gpu=cpu,flops={flops},mfu=1"), link=2 * bandwidth / LINK_EFFICIENCY)
    return judge(scenario, cluster, layout)


def measure(job: Any, setting: Setting, argv: list[str], timed: bool = False) -> dict[str, float]:
    """Of the last step of a local phase after a global one, on this rank.

    Collective: all ranks of `job`, which are one rank group.

    Returns:
        resting: bytes of live tensor storages before the step; peak: these and the allocator's high-water mark on top;
        gathered: bytes that the step's all-gathers received;
        if `timed`, seconds: median of steps; flops: FLOP/s of a large fp32 matrix product; bandwidth: bytes/s
        received in an all-gather.
    """
    import torch

    from benchmarks.floor import matmul_flops_per_second
    from dpa_ds.adapters.methods import Phase

    torch.set_num_threads(1)
    engine = _build(job, argv)
    step = _step(setting, job.launch.job_world_size)
    for phase in (Phase("global", 0.0), Phase("local", 0.5)):
        engine.activate(phase)
        for _ in range(2):  # in the first DeepSpeed still records the order of the parameters
            engine.train_step(step, 1e-3)
    gc.collect()
    resting = sum(_live_storages().values())
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, record_shapes=True) as profiler:
        engine.train_step(step, 1e-3)
    found = {"resting": resting, "peak": resting + _high_water_mark(profiler), "gathered": _gathered(profiler)}
    if not timed:
        return found
    seconds = statistics.median(_seconds(lambda: engine.train_step(step, 1e-3)) for _ in range(REPEATS))
    flops = matmul_flops_per_second(torch.float32, torch.device("cpu"), time.perf_counter)
    return {**found, "seconds": seconds, "flops": flops, "bandwidth": _bandwidth(engine.world)}


def write_model(folder: Path, setting: Setting) -> Path:
    """A random Llama of that size, with its own weights for the output head, saved to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = [name for name in vars(setting) if name not in ("rows", "length", "label_share")]
    config = LlamaConfig(**{name: getattr(setting, name) for name in names}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _build(job: Any, argv: list[str]) -> Any:
    from dpa_ds.adapters.adapter_model import AdapterModel
    from dpa_ds.adapters.methods import adapter_table
    from dpa_ds.config.deepspeed_json import load_deepspeed_json
    from dpa_ds.config.load import load_config
    from dpa_ds.distributed.topology import plan_topology
    from dpa_ds.distributed.world import build_world
    from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
    from dpa_ds.model.base import load_base

    config, size = load_config(argv), job.launch.job_world_size
    world = build_world(job, plan_topology(size, 1, size), config.cluster, 60.0)
    path = config.engine.deepspeed_config
    ds_json = build_deepspeed_json(load_deepspeed_json(path), path, config.train, config.model.precision, size)
    base = load_base(config.model, Path(config.model.path), ds_json, world.device)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    return AdapterEngine(adapters, world, config.train, ds_json)


def _seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _bandwidth(world: Any) -> float:
    """Bytes/s that a rank receives in an all-gather of 64 MB, the best of some."""
    import torch
    import torch.distributed as dist

    mine = torch.zeros(16_000_000)
    everyone = torch.zeros(16_000_000 * world.world_size)
    best = min(_seconds(lambda: dist.all_gather_into_tensor(everyone, mine)) for _ in range(REPEATS))
    return (world.world_size - 1) * mine.nbytes / best


def _on_ranks(ranks: int, folder: Path, setting: Setting, argv: list[str], timed: bool) -> dict[str, float]:
    """What rank 0 measures, except for the peak: the highest."""
    import torch.multiprocessing as mp

    store, results = folder / f"store-{time.monotonic_ns()}", folder / "result"
    mp.spawn(_rank, (ranks, str(store), str(results), setting, argv, timed), nprocs=ranks)
    everyone = [json.loads(Path(f"{results}-{rank}.json").read_text()) for rank in range(ranks)]
    found: dict[str, float] = {**everyone[0], "peak": max(one["peak"] for one in everyone)}
    return found


def _rank(rank: int, ranks: int, store: str, results: str, setting: Setting, argv: list[str], timed: bool) -> None:
    import torch.distributed as dist

    from dpa_ds.distributed.job_store import JobStore
    from dpa_ds.distributed.launchers import Launch

    launch = Launch("env", rank, ranks, rank, "127.0.0.1", 0)
    job = JobStore(launch, dist.FileStore(store, ranks))
    job.hosts = [launch.hostname] * ranks
    Path(f"{results}-{rank}.json").write_text(json.dumps(measure(job, setting, argv, timed)))
    os._exit(0)  # gloo's threads are not waited for


def _line(case: Case, setting: Setting, argv: list[str], found: dict[str, float], ranks: int) -> str:
    from dpa_ds.planning.plan import OVERHEAD

    plan = planned(argv, setting, found.get("flops", 1.0), found.get("bandwidth", 1.0), ranks)
    memory = plan.total - OVERHEAD
    line = f"{case.name:52}{found['peak'] / 1e6:>12.1f}{memory / 1e6:>9.1f}{found['peak'] / memory:>7.3f}"
    times = ""
    if "seconds" in found:
        ratio = found["seconds"] / plan.step_seconds
        times = f"{found['seconds']:>11.3f}{plan.step_seconds:>9.3f}{ratio:>7.2f}"
    if case.stage == 3:
        gathered = found["gathered"]
        floor = plan.memory["base"] * (ranks - 1)  # the shares of the others
        times = f"{times:27}{gathered / 1e6:>13.1f}{plan.gather_bytes / 1e6:>9.1f}"
        times += f"{gathered / plan.gather_bytes:>7.2f}{gathered / floor:>10.2f}"
    return line + times


def _step(setting: Setting, world_size: int) -> Any:
    import torch

    from dpa_ds.data.batching import IGNORE_INDEX, MicroBatch, StepBatch

    shape = (setting.rows, setting.length)
    input_ids = torch.randint(setting.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    targets = input_ids.clone()
    targets[:, : round(setting.length * (1 - setting.label_share))] = IGNORE_INDEX
    positions = torch.arange(setting.length).expand(shape)
    num_targets = int((targets != IGNORE_INDEX).sum()) * world_size
    tokens = input_ids.numel() * world_size
    row = (input_ids.flatten(), positions.flatten(), targets.flatten())
    return StepBatch([MicroBatch(*row, segments=(shape,))], num_targets, setting.rows * world_size, tokens, tokens)


def _live_storages() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor or its gradient refers to."""
    import torch

    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = [t.untyped_storage() for t in tensors if t.device.type != "meta" and t.layout == torch.strided]
    return {s.data_ptr(): s.nbytes() for s in storages}


def _high_water_mark(profiler: Any) -> int:
    """Largest sum of allocations less releases since the profiler started, in bytes."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def _gathered(profiler: Any) -> int:
    """Bytes that all-gathers received: what came out, without the rank's own share."""
    size = {"float": 4, "c10::BFloat16": 2}
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "c10d::_allgather_base_"]
    numels = ([math.prod(shape) for shape in event.shapes()[:2]] for event in found)
    return sum((whole - own) * size[e.dtypes()[0]] for e, (whole, own) in zip(found, numels, strict=True))


if __name__ == "__main__":
    main()
