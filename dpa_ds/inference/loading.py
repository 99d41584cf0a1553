"""A trained run becomes an Predictor: where the base is placed, and its adapters installed."""

from pathlib import Path

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, adapter_table, build_schedule
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World, build_world
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.errors import ClusterError, ModelError
from dpa_ds.inference.client_model import Install, Predictor
from dpa_ds.inference.weighting import resolve_weighting
from dpa_ds.model.base import check_precision, fits_one_rank, load_base, resolve_model
from dpa_ds.model.directory import load_tokenizer
from dpa_ds.runs.folder import RunFolder

PARTITIONED = {"zero_optimization": {"stage": 3}}
"""DeepSpeed JSON of a base that is divided among the ranks of a group."""


def place_base(config: RunConfig, job: JobStore, num_clients: int) -> tuple[Path, World, bool]:
    """Model directory, world, and whether the base is divided: one copy a rank where it fits, else one for all ranks.

    Collective: every rank of the job.

    Raises:
        ClusterError: it neither fits one rank nor are there more.
        ModelError: it is not where the run found it.
    """
    check_precision(config.model.precision)
    size = job.launch.job_world_size
    directory = Path(str(job.broadcast_from_rank_zero("model", lambda: str(_find_base(config)))))
    fits = config.evaluation.sharding == "never" or fits_one_rank(
        directory, config.model.precision, job.hosts.count(job.launch.hostname)
    )
    fits = bool(job.broadcast_from_rank_zero("fits", lambda: fits))
    partitioned = config.evaluation.sharding == "always" or not fits
    if not fits and size == 1:
        raise ClusterError(
            f"the base in {directory} does not fit the memory of one rank: start several, or use model.precision bf16"
        )
    sizes = (size,) if partitioned else (1,) * size
    world = build_world(job, Topology(sizes, num_clients), config.cluster, config.federation.timeout_seconds)
    return directory, world, partitioned


def build_predictor(
    config: RunConfig,
    folder: RunFolder,
    server_round: int,
    directory: Path,
    world: World,
    partitioned: bool,
) -> Predictor:
    """The base with the run's global adapter. Collective where it is partitioned: all ranks of the group.

    Raises:
        ConfigError: the weighting does not go with the run.
        CheckpointError, ModelError: adapters or base cannot be used.
    """
    weighting = resolve_weighting(config, build_schedule(config.method), len(folder.clients(server_round)))
    shared = folder.load_adapter(server_round, GLOBAL)
    file_json = PARTITIONED if partitioned else {}
    ds_json = build_deepspeed_json(
        file_json, config.engine.deepspeed_config, config.train, config.model.precision, world.world_size
    )
    base = load_base(config.model, directory, ds_json)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    if partitioned:
        install: Install = AdapterEngine(adapters, world, config.train, ds_json).write_state
    else:
        adapters.base_model.to(world.device)  # type: ignore[arg-type]
        install = adapters.load_state
    adapters.check_shapes(GLOBAL, shared.weights)
    install(GLOBAL, shared.weights)
    means = shared.extras.get("reference_mean", {"reference_mean": torch.zeros(0, 0)})["reference_mean"]
    tokenizer = load_tokenizer(directory)
    return Predictor(
        adapters,
        tokenizer,
        weighting,
        config.generation,
        means,
        install,
        partitioned,
    )


def _find_base(config: RunConfig) -> Path:
    try:
        return resolve_model(config.model, config.data.cache_dir)
    except ModelError as error:
        raise ModelError(f"{error}; if the base has moved, say where it is with --model.path") from error
