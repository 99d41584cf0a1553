"""Memory of a training step, to be compared with `dpa_ds.planning`: tests/multirank/test_planning_measured.py runs it.

A job of N ranks (gloo, CPU) takes two steps of this project's engine on a random Llama. The second one
is measured: bytes of all live tensor storages before it, plus the high-water mark of torch's allocator inside it, as
torch.profiler records it. Rows are of equal length, and every row has the same share of labels, as the plan assumes.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def measure(job: Any, setting: Setting, argv: list[str]) -> dict[str, int]:
    """Bytes on this rank in the second of two steps of the local phase, both adapters active.

    Collective: all ranks of `job`, which are one rank group.

    Returns:
        resting: live tensor storages before the step; peak: their number and the allocator's high-water mark on top.
    """
    import torch

    from dpa_ds.model.dual_adapter import Phase

    engine = _build(job, argv)
    engine.activate(Phase("local", 0.5))
    step = _step(setting, job.launch.job_world_size)
    engine.train_step(step, 1e-3)
    gc.collect()
    resting = sum(_live_storages().values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.train_step(step, 1e-3)
    return {"resting": resting, "peak": resting + _high_water_mark(profiler)}


def write_model(folder: Path, setting: Setting) -> Path:
    """A random Llama of that size, with its own weights for the output head, saved to `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = [name for name in vars(setting) if name not in ("rows", "length", "label_share")]
    config = LlamaConfig(**{name: getattr(setting, name) for name in names}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _build(job: Any, argv: list[str]) -> Any:
    from dpa_ds.config_loader import load_config, load_deepspeed_json
    from dpa_ds.distributed.topology import plan_topology
    from dpa_ds.distributed.world import build_world
    from dpa_ds.model.base import load_base
    from dpa_ds.model.dual_adapter import DualAdapter
    from dpa_ds.model.engine import AdapterEngine, build_deepspeed_json

    config, size = load_config(argv), job.launch.job_world_size
    world = build_world(job, plan_topology(size, 1, size), config.cluster, 60.0)
    ds_json = build_deepspeed_json(load_deepspeed_json(config.engine.deepspeed_config), config, size)
    adapters = DualAdapter(load_base(config.model, Path(config.model.path), ds_json), config.lora)
    return AdapterEngine(adapters, world, config.train, ds_json)


def _step(setting: Setting, world_size: int) -> Any:
    import torch

    from dpa_ds.data.batches import IGNORE_INDEX, MicroBatch, StepBatch

    shape = (setting.rows, setting.length)
    input_ids = torch.randint(setting.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, : round(setting.length * (1 - setting.label_share))] = IGNORE_INDEX
    num_labels = int((labels != IGNORE_INDEX).sum()) * world_size
    tokens = input_ids.numel() * world_size
    return StepBatch([MicroBatch(input_ids, labels)], num_labels, setting.rows * world_size, tokens, tokens)


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
