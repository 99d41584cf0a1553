"""What each rank finds out before a long job, and what a run of the recipe needs."""

import json
import os
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from dpa_ds.adapters.adapter_model import count_parameters
from dpa_ds.adapters.methods import build_schedule
from dpa_ds.cli.verdicts import FAILED, SLOW_SHARE, Needs, judge, render
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.paths import expand, has_client_files
from dpa_ds.config.schema import DataConfig, EngineConfig, EvaluationConfig, GenerationConfig, ModelConfig, RunConfig
from dpa_ds.data.formats import build_format
from dpa_ds.distributed import probes
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.probes import RankFacts
from dpa_ds.distributed.topology import Topology, describe_rank, plan
from dpa_ds.distributed.world import World, build_world
from dpa_ds.errors import ClusterError
from dpa_ds.evaluation.dataset import check_test_prompts
from dpa_ds.federation.clients import agree_on_client_names, build_client_tokenizer, read_hosted
from dpa_ds.model.base import resolve_model
from dpa_ds.model.directory import load_tokenizer, read_limits
from dpa_ds.model.precision import DTYPES, check_precision
from dpa_ds.model.quantization import base_bytes, check_quantization
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import logger, setup_logging


def preflight(config: RunConfig, job: JobStore, json_path: str | None = None) -> None:
    """Measure, print the table, and write it to `json_path`. Collective: every rank of the job.

    Raises:
        ClusterError: a check failed; the table has the remedy.
        DataError: as `check_data`.
    """
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    pooled = build_schedule(config.method).pooled
    names = agree_on_client_names(config.data, config.seed, pooled, job)
    topology = plan(config.cluster, job.launch.job_world_size, len(names))
    job.describe_rank = partial(describe_rank, topology, job.hosts)
    world = build_world(job, topology, config.cluster, config.federation.timeout_seconds)
    check_precision(config.model.precision, world.device)
    with world.leader_first():
        directory = resolve_model(config.model, config.data.cache_dir)
    if world.is_leader:
        check_data(config.data, config.seed, config.evaluation, config.generation, pooled, directory, world)
    _, global_adapter, local_adapter = count_parameters(directory, config.lora)  # reads no weights
    needs = Needs(
        adapter=4 * global_adapter,
        base_on_rank=base_on_rank(config.model, directory, config.engine, world.world_size),
        rounds_on_disk=disk_bytes(global_adapter, local_adapter, topology.num_clients, config.checkpoint.keep_rounds),
        exchange_seconds=SLOW_SHARE * config.federation.timeout_seconds,
    )
    facts = probe(job, world, config.run_dir, needs.adapter)
    job.publish(f"facts/{job.launch.global_rank}", asdict(facts))
    num_failed = job.broadcast_from_rank_zero("num_failed", partial(report, job, topology, needs, json_path))
    world.close()
    if num_failed:
        raise ClusterError(f"{num_failed} of the checks above failed: mend that before the job is started")


def check_data(
    data: DataConfig,
    seed: int,
    evaluation: EvaluationConfig,
    generation: GenerationConfig,
    pooled: bool,
    directory: Path,
    world: World,
) -> None:
    """Read and tokenize the data of this group's clients as a run does, and the test data. Leaders only.

    Args:
        pooled: all clients' data form a single client.
        directory: of the model.

    Raises:
        DataError: it is not usable, or the model cannot read or answer it.
    """
    example_format, limits = build_format(load_tokenizer(directory), data), read_limits(directory)
    with tempfile.TemporaryDirectory() as cache_dir:  # tokens are the clients' texts, and nothing is to stay
        data = replace(data, cache_dir=cache_dir)
        client_tokenizer = build_client_tokenizer(data, evaluation, generation, example_format, limits)
        for client in read_hosted(data, seed, pooled, world):
            client_tokenizer.tokenize(client)
    if world.is_coordinator and not has_client_files(data.test_path):
        check_test_prompts(data, seed, evaluation, example_format, limits, generation.max_new_tokens)


def base_on_rank(model: ModelConfig, directory: Path, engine: EngineConfig, world_size: int) -> int:
    """Bytes of the frozen weights that a rank keeps: all, or its share under ZeRO-3.

    Raises:
        ConfigError, ModelError: as `check_quantization`.
    """
    zero = load_deepspeed_json(engine.deepspeed_config).get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    kind = check_quantization(model.quantization, directory, stage)
    whole = base_bytes(directory, DTYPES[model.precision], kind)
    if stage == 3:
        return whole // world_size
    return whole


def disk_bytes(global_adapter: int, local_adapter: int, num_clients: int, keep_rounds: int) -> int:
    """Bytes of the checkpoints, from parameters in fp32.

    A round holds the global adapter, and for each client its local one with two moments (method.* may need less).
    """
    of_round = 4 * (global_adapter + 3 * local_adapter * num_clients)
    return of_round * (keep_rounds + 1)  # and the one that is being written


def probe(job: JobStore, world: World, run_dir: Path, adapter_bytes: int) -> RankFacts:
    """What this rank finds out. Collective: every rank of the job."""
    device, device_name, free_device_memory = probes.device_facts(world)
    clock_offset = probes.clock_offset(job)
    gather_bandwidth, gather_latency = probes.gather_speed(world)
    exchange_seconds, exchange_latency = 0.0, 0.0
    if world.leaders is not None and world.topology.num_groups > 1:
        exchange_seconds, exchange_latency = probes.exchange_speed(world.leaders, adapter_bytes)
    return RankFacts(
        rank=job.launch.global_rank,
        host=job.launch.hostname,
        group=world.group,
        address=probes.own_address(),
        device=device,
        device_name=device_name,
        num_threads=probes.num_threads(),
        num_cores=len(os.sched_getaffinity(0)),
        free_device_memory=free_device_memory,
        free_host_memory=probes.free_host_memory(),
        free_disk=probes.free_disk(run_dir),
        sees_token=probes.sees_token(job, run_dir.parent),
        clock_offset=clock_offset,
        gather_bandwidth=gather_bandwidth,
        gather_latency=gather_latency,
        exchange_seconds=exchange_seconds,
        exchange_latency=exchange_latency,
    )


def report(job: JobStore, topology: Topology, needs: Needs, json_path: str | None) -> int:
    """Log the table of all ranks, and write it to `json_path`; the number of failed checks. Rank 0."""
    facts = [RankFacts(**job.lookup(f"facts/{rank}")) for rank in range(topology.job_world_size)]
    rows = judge(facts, topology, needs)
    logger.info(render(rows))
    if json_path is not None:
        found = {
            "ranks": [asdict(fact) for fact in facts],
            "needs": asdict(needs),
            "checks": [asdict(row) for row in rows],
        }
        write_file(expand(json_path, "--json"), json.dumps(found, indent=1))
    return sum(row.verdict == FAILED for row in rows)
