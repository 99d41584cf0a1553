"""Each key that a DeepSpeed JSON may have: a written adapter is what the next step starts from, and what is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa_ds.config.deepspeed_json import _KEYS
from dpa_ds.engine.engine import UNSUPPORTED
from tests import tiny
from tests.multirank.test_engine import GLOBAL, build, randomised, working_copy
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
ZERO = "zero_optimization."
TRIED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "communication_data_type": ("fp32", (1, 2, 3)),
    "data_types.grad_accum_dtype": ("fp32", (1, 2, 3)),
    "zero_allow_untested_optimizer": (True, (1, 2, 3)),
    "zero_force_ds_cpu_optimizer": (True, (1, 2, 3)),
    "wall_clock_breakdown": (True, (1, 2, 3)),
    "memory_breakdown": (True, (1, 2, 3)),
    "timers.throughput.enabled": (True, (1, 2, 3)),
    "timers.throughput.synchronized": (True, (1, 2, 3)),
    ZERO + "contiguous_gradients": (False, (1, 2)),
    ZERO + "overlap_comm": (True, (1, 2, 3)),
    ZERO + "reduce_scatter": (False, (1, 2, 3)),
    ZERO + "reduce_bucket_size": (100, (1, 2, 3)),
    ZERO + "use_multi_rank_bucket_allreduce": (False, (1, 2, 3)),
    ZERO + "allgather_partitions": (False, (1, 2)),
    ZERO + "allgather_bucket_size": (100, (1, 2)),
    ZERO + "sub_group_size": (500, (3,)),
    ZERO + "stage3_prefetch_bucket_size": (0, (3,)),
    ZERO + "stage3_param_persistence_threshold": (0, (3,)),
    ZERO + "stage3_model_persistence_threshold": (10, (3,)),
    ZERO + "stage3_max_live_parameters": (100, (3,)),
    ZERO + "stage3_max_reuse_distance": (0, (3,)),
    ZERO + "stage3_module_granularity_threshold": (50, (3,)),
    ZERO + "stage3_use_all_reduce_for_fetch_params": (True, (3,)),
    ZERO + "stage3_allgather_sequential": (True, (3,)),
    ZERO + "memory_efficient_linear": (False, (3,)),
    ZERO + "log_trace_cache_warnings": (True, (3,)),
    ZERO + "enable_sanity_checks": (True, (3,)),
    ZERO + "offload_optimizer": ({"device": "cpu"}, (1, 2, 3)),
    ZERO + "offload_param": ({"device": "cpu"}, (3,)),
}
"""Key -> a value that is not DeepSpeed's default (or not ours), and the ZeRO stages that know it."""
ELSEWHERE = {
    "comms_logger.": "it counts bytes",
    "aio.": "it takes a disk: tests/launch runs zero3_offload_nvme where there is libaio",
    "bf16.": "its overflow check, in test_engine.py",
    "fp16.": "loss scales, in test_engine.py",
    ZERO + "stage": "every test",
    ZERO + "zero_hpz_partition_size": "test_invariance.py",
    ZERO + "offload_": "the two sections above",
}
"""Beginning of a key -> why it is not tried here."""


def test_no_key_is_allowed_that_was_not_tried() -> None:
    for key in _KEYS:
        refused = key.removeprefix(ZERO) in UNSUPPORTED
        assert key in TRIED or refused or key.startswith(tuple(ELSEWHERE)), key


def with_keys(stage: int, values: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    for key, value in values.items():
        *sections, name = key.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return content


def errors_of_keys(
    job: Any, argv: Sequence[str], stage: int, jsons: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """For each JSON: how far the working copy and the master are from what was written after a step at learning rate 0,
    and how far a real step is from that of an engine without the JSON's keys."""
    errors = {}
    engine, _ = build(job, argv)
    world = engine.world
    _, _, expected = steps(job, argv, stage, {}, world)
    for name, values in jsons.items():
        copied, read, stepped = steps(job, argv, stage, values, world)
        errors[name] = [copied, read, float((stepped - expected).norm() / expected.norm())]
    return errors


def steps(
    job: Any, argv: Sequence[str], stage: int, values: dict[str, Any], world: Any
) -> tuple[float, float, torch.Tensor]:
    """Distances of the working copy and the master from what was written, and what a real step adds (leader)."""
    from dpa_ds.config.schema import TrainConfig
    from dpa_ds.engine.engine import build_deepspeed_json

    size = job.launch.job_world_size
    ds_json = build_deepspeed_json(with_keys(stage, values), "mine.json", TrainConfig(), "fp32", size)
    engine, step = build(job, argv, world=world, **ds_json)
    engine.activate(GLOBAL)
    written = randomised(engine.adapters.initial_state("global", (3,)))
    engine.write_state("global", written)
    engine.train_step(step(0), 0.0)
    copied = flat(working_copy(engine, "global"))
    read = engine.read_state("global")
    engine.train_step(step(1), 1e-2)
    stepped = engine.read_state("global")
    target = flat(written)
    if read is None:  # not the leader
        return distance(copied, target), 0.0, target
    return distance(copied, target), distance(flat(read), target), flat(stepped) - target


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[key].flatten() for key in sorted(state)])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_key_neither_moves_nor_changes_an_adapter(stage: int, tmp_path: Path) -> None:
    """Half a minute a stage: an engine for each key. On three ranks, where no size divides evenly, all keys together."""
    argv = tiny.recipe(tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    known = {key: value for key, (value, stages) in TRIED.items() if stage in stages}
    each = {key: {key: value} for key, value in known.items()}
    # Which two do not go together.
    together = {key: value for key, value in known.items() if key != "zero_force_ds_cpu_optimizer"}
    for num_ranks, jsons in ((2, each), (3, {"all": together})):
        for rank, errors in enumerate(run_on_ranks(errors_of_keys, num_ranks, tmp_path, argv, stage, jsons)):
            for name, (copied, read, stepped) in errors.items():
                assert (copied, read) == (0.0, 0.0), (num_ranks, rank, name)
                assert stepped < 1e-4, (num_ranks, rank, name, stepped)
