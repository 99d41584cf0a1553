"""Out of memory, said in one line: what the planner expected, and what to lower."""

import contextlib
from collections.abc import Callable, Iterator

from dpa_ds.adapters.methods import build_schedule
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.schema import GenerationConfig, RunConfig, TrainConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import plan
from dpa_ds.errors import DpaError, MemoryLimitError

SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of the errors that torch, CUDA and its libraries raise where memory is short."""
_MOST_CHARACTERS = 200
"""Of torch's own message; what follows is about the allocator."""


@contextlib.contextmanager
def memory_errors(remedy: str, expected: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn a lack of memory, of the device or of the host, into one MemoryLimitError.

    Args:
        remedy: what to lower.
        expected: says what the planner had expected; called only when memory was short.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in SIGNS):
            raise
        what = str(error).strip().partition("\n")[0][:_MOST_CHARACTERS] or "the host has none left"
        figure = "" if expected is None else expected()
        raise MemoryLimitError(f"out of memory: {what}. {figure}{remedy}") from error


def training_remedy(train: TrainConfig, generation: GenerationConfig) -> str:
    """What to lower where training needs too much."""
    return (
        f"Lower train.micro_batch_tokens (now {train.micro_batch_tokens}), or set "
        "model.gradient_checkpointing: true; if it happened while answers were generated, lower "
        f"generation.batch_tokens (now {generation.batch_tokens}). launch/plan.py shows which layouts fit"
    )


def generation_remedy(generation: GenerationConfig) -> str:
    """What to lower where a trained run is used."""
    return (
        f"Lower generation.batch_tokens (now {generation.batch_tokens}), or start more ranks with "
        "--evaluation.sharding always: each then holds its share of the base"
    )


def expected_memory(config: RunConfig, job: JobStore) -> str:
    """The planner's figure for a training step on this rank; empty where it has none for the model."""
    # Imported here, because a run that has enough memory needs none of it.
    from dpa_ds.federation.clients import client_names
    from dpa_ds.model.base import resolve_model
    from dpa_ds.planning.memory import step_bytes
    from dpa_ds.planning.plan import OVERHEAD, layout_of
    from dpa_ds.planning.scenario import Workload, scenario_of
    from dpa_ds.planning.shapes import read_shape

    try:
        names = client_names(config.data, config.seed, build_schedule(config.method).pooled)
        topology = plan(config.cluster, job.launch.job_world_size, len(names))
        group = topology.group_of_rank(job.launch.global_rank)
        num_ranks = topology.group_sizes[group - topology.first_group]
        shape = read_shape(str(resolve_model(config.model, config.data.cache_dir)), preset=None)
        zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
        scenario = scenario_of(config, shape, zero, Workload(clients=len(names)))
        num_bytes = sum(step_bytes(shape, scenario.lora, layout_of(scenario, num_ranks)).values()) + OVERHEAD
    except DpaError:  # not a model that the planner knows: the message does without
        return ""
    return f"The planner expects {num_bytes / 1e9:.1f} GB on a rank of this recipe. "
