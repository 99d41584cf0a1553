"""A trained run becomes a Predictor: where the base is placed, and its adapters installed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, adapter_table
from dpa_ds.config.schema import (
    ClusterConfig,
    DataConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
)
from dpa_ds.data.formats import ExampleFormat, build_format
from dpa_ds.data.limits import ModelLimits
from dpa_ds.data.references import REPRESENTATIONS
from dpa_ds.distributed.device import claim_device
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World, build_world, world_without_collectives
from dpa_ds.errors import ClusterError, ModelError
from dpa_ds.inference.client_model import Install, Predictor
from dpa_ds.inference.weighting import BASE_ALONE, Weighting
from dpa_ds.model.base import fits_one_rank, load_base, resolve_model
from dpa_ds.model.directory import load_tokenizer, read_limits
from dpa_ds.model.precision import check_precision
from dpa_ds.model.quantization import check_quantization
from dpa_ds.runs.folder import RunFolder, SavedAdapter
from dpa_ds.runs.storage import well_formed

PARTITIONED = {"zero_optimization": {"stage": 3}}
"""DeepSpeed JSON of a base that is divided among the ranks of a group."""


@dataclass(frozen=True)
class PlacedBase:
    """The base, not loaded yet, and the ranks that hold it."""

    config: ModelConfig
    directory: Path
    world: World
    partitioned: bool
    """The ranks of the world divide it (ZeRO-3); else each rank is a world of its own, with a whole copy."""
    example_format: ExampleFormat
    """How texts become the tokens that it reads."""
    limits: ModelLimits


def place_base(
    job: JobStore,
    model: ModelConfig,
    data: DataConfig,
    sharding: Literal["auto", "never", "always"],
    cluster: ClusterConfig,
    federation_timeout_seconds: float,
    num_clients: int,
) -> PlacedBase:
    """One copy of the base on each rank where it fits one, else one for all ranks together.

    Collective: every rank of the job.

    Raises:
        ClusterError: it does not fit one rank, and there is no other.
        ModelError: it is not where the run found it, or has no chat template where the recipe asks for one.
        ConfigError: it is quantised, and would have to be divided.
    """
    num_ranks = job.launch.job_world_size
    ranks_on_host = job.hosts.count(job.launch.hostname)
    device = claim_device(job.launch, ranks_on_host)
    check_precision(model.precision, device)
    directory = Path(job.broadcast_from_rank_zero("model", lambda: str(_find_base(model, data.cache_dir))))
    fits = sharding == "never" or fits_one_rank(model, directory, device, ranks_on_host)
    # Hosts may have different memory: what rank 0 finds counts for all.
    fits = bool(job.broadcast_from_rank_zero("fits", lambda: fits))
    example_format, limits = build_format(load_tokenizer(directory), data), read_limits(directory)
    if not fits and num_ranks == 1:
        raise ClusterError(
            f"the base in {directory} does not fit the memory of one rank: start several, or use model.precision bf16"
        )
    if fits and sharding != "always":
        topology = Topology((1,) * num_ranks, num_clients)
        world = world_without_collectives(job, topology)
        return PlacedBase(model, directory, world, False, example_format, limits)
    check_quantization(model.quantization, directory, stage=3)
    topology = Topology((num_ranks,), num_clients)
    world = build_world(job, topology, cluster, federation_timeout_seconds)
    return PlacedBase(model, directory, world, True, example_format, limits)


def build_predictor(
    base: PlacedBase,
    lora: LoraConfig,
    generation: GenerationConfig,
    weighting: Weighting,
    folder: RunFolder,
    server_round: int,
) -> Predictor:
    """The base with the run's global adapter. Collective where it is partitioned: all ranks of the group.

    Raises:
        CheckpointError, ModelError: adapters or base cannot be used.
    """
    shared = folder.load_adapter(server_round, GLOBAL)
    place = folder.round_dir(server_round)
    with well_formed(place / GLOBAL, f"delete {place} to use the round before, or train again"):
        reference_mean = _reference_mean(shared)
    if base.partitioned:
        adapters, install = _load_partitioned(base, lora)
    else:
        model = load_base(base.config, base.directory, {}, base.world.device)
        adapters = AdapterModel(model, adapter_table(lora), lora)
        install = adapters.load_state
    adapters.check_shapes(GLOBAL, shared.weights)
    weights = shared.weights
    if weighting.kind == BASE_ALONE:  # its local adapter has weight 0, and of zeros the global one adds nothing
        weights = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    install(GLOBAL, weights)
    return Predictor(
        adapters=adapters,
        example_format=base.example_format,
        weighting=weighting,
        generation=generation,
        reference_mean=reference_mean,
        install=install,
        world=base.world,
    )


def _reference_mean(shared: SavedAdapter) -> torch.Tensor:
    """Shape (representations, hidden size), or empty where the run has none. LookupError or ValueError: another."""
    if "reference_mean" not in shared.extras:
        return torch.zeros(0, 0)
    mean = shared.extras["reference_mean"]["reference_mean"]
    if mean.dim() != 2 or len(mean) != len(REPRESENTATIONS) or not mean.isfinite().all():
        raise ValueError(f"reference mean of shape {tuple(mean.shape)}")
    return mean


def _load_partitioned(base: PlacedBase, lora: LoraConfig) -> tuple[AdapterModel, Install]:
    """The model, divided among the ranks by an engine that never trains. Collective: all ranks of the group."""
    # Here, because it imports DeepSpeed, which takes seconds.
    from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json

    train = TrainConfig()  # not used: no step is taken
    precision, world = base.config.precision, base.world
    ds_json = build_deepspeed_json(PARTITIONED, "", train, precision, world.world_size)
    model = load_base(base.config, base.directory, ds_json, world.device)
    adapters = AdapterModel(model, adapter_table(lora), lora)
    return adapters, AdapterEngine(adapters, world, train, ds_json).write_state


def _find_base(config: ModelConfig, cache_dir: str) -> Path:
    try:
        return resolve_model(config, cache_dir)
    except ModelError as error:
        raise ModelError(f"{error}; if the base has moved, say where it is with --model.path") from error
