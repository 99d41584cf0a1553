"""Federated training, from a config and a job: the table of contents."""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dpa_ds.adapters.dual_lora import DualAdapter
from dpa_ds.adapters.methods import build_schedule
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import to_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.data.batching import BatchingConfig
from dpa_ds.data.sources import NO_TASK
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import Topology, plan_one_group, plan_topology
from dpa_ds.distributed.world import World, build_world, join_leaders
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.engine.profiling import Profile
from dpa_ds.evaluation.report import write_report
from dpa_ds.evaluation.while_training import Scorer
from dpa_ds.federation.aggregation.compression import CompressedAverage
from dpa_ds.federation.aggregation.mean import Aggregator, WeightedAverage
from dpa_ds.federation.clients import client_names, embed_references, host_clients, restore_shared
from dpa_ds.federation.loop import run_rounds
from dpa_ds.federation.round_state import ProgressKeeper
from dpa_ds.federation.session import Federation
from dpa_ds.federation.trainer import ClientTrainer, HostedClient
from dpa_ds.model.base import check_precision, load_base, resolve_model
from dpa_ds.model.directory import load_tokenizer, model_fingerprint
from dpa_ds.runs.folder import MODEL, RunFolder
from dpa_ds.runs.resume import acquire_run_lock, find_resume_round
from dpa_ds.runs.storage import BackgroundWriter, write_file
from dpa_ds.runs.tracking import Tracker, logger, setup_logging


def train(config: RunConfig, job: JobStore) -> None:
    """Train `config.method` on all clients, from where the run stopped. Collective: every rank of the job."""
    started = time.monotonic()
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    schedule = build_schedule(config.method)
    file_json = load_deepspeed_json(config.engine.deepspeed_config)
    names = client_names(config, schedule)
    topology = place(config, job, len(names))
    job.describe_rank = partial(describe_rank, topology, job)
    folder = RunFolder(config.run_dir)
    completed = int(job.broadcast_from_rank_zero("completed_rounds", lambda: find_start_round(folder, config)))

    world = build_world(job, topology, config.cluster, config.federation.timeout_seconds)
    if world.is_coordinator:
        logger.info(describe(config, job, topology, file_json, world, completed))
    check_precision(config.model.precision)
    with world.leader_first():
        directory = resolve_model(config.model, config.data.cache_dir)
    fingerprint = model_fingerprint(directory)
    folder.check_model(fingerprint)
    tokenizer = load_tokenizer(directory)
    pad_id = int(tokenizer.pad_token_id)
    ds_json = build_deepspeed_json(file_json, config, world.world_size)
    adapters = DualAdapter(load_base(config.model, directory, ds_json), config.lora)
    clients = host_clients(config, schedule, world, tokenizer, adapters, completed)
    engine = AdapterEngine(adapters, world, config.train, ds_json)
    batching = BatchingConfig(config.train.micro_batch_tokens, pad_id, prefix_sharing=engine.packing.supports_prefix)
    profile = Profile(config.run_dir / "profile", world) if config.tracking.profile else None
    if profile is not None:
        engine = profile.watch(engine)
    if schedule.weighted_by_instance:
        embed_references(clients, config, adapters, pad_id)

    shared = restore_shared(config, schedule, adapters, completed)
    labels, trained = exchange_labels(job, world, clients, names)
    if world.is_coordinator:  # everything that a user can get wrong was read by now: from here on the run exists
        write_file(config.run_dir / "config.yaml", to_yaml(config))
        acquire_run_lock(folder, config, creates=True)
        write_file(config.run_dir / MODEL, json.dumps({"fingerprint": fingerprint, "path": config.model.path}))
    tracker = Tracker(config.run_dir if world.is_leader else None, world.is_coordinator, config.tracking)
    with BackgroundWriter() as writer:
        keeper = ProgressKeeper(folder, writer, describe_layout(config, world, engine), world.is_leader)
        federation = Federation(
            config=config,
            world=join_leaders(config, job, world),
            trainer=ClientTrainer(engine, world, config, schedule, tracker, batching, job, keeper),
            aggregator=build_aggregator(config, clients),
            clients=clients,
            labels=labels,
            shared=shared,
            folder=folder,
            writer=writer,
            tracker=tracker,
            profile=profile,
            scorer=Scorer(config, schedule, engine, world, tokenizer, trained)
            if config.evaluation.scores_every_rounds
            else None,
        )
        run_rounds(federation, completed)
    tracker.close()
    if world.leaders is not None and world.leaders.is_coordinator:
        logger.info(write_report(config.run_dir, topology.num_groups, time.monotonic() - started))
    world.close()


def build_aggregator(config: RunConfig, clients: Sequence[HostedClient]) -> Aggregator:
    """The recipe's aggregation rule, with what it had kept, whoever hosted these clients then."""
    rules: dict[str, type[WeightedAverage | CompressedAverage]] = {"fp32": WeightedAverage, "int16": CompressedAverage}
    aggregator = rules[config.federation.compression](
        by_num_examples=config.federation.aggregation_weights == "num_examples"
    )
    kept = [client.carried for client in clients if client.carried is not None]
    if kept:
        aggregator.carried = {key: torch.stack([one[key] for one in kept]).sum(0) for key in kept[0]}
    return aggregator


def find_start_round(folder: RunFolder, config: RunConfig) -> int:
    """The round to resume after, once no other job works on the run. Rank 0."""
    acquire_run_lock(folder, config)
    return find_resume_round(folder, config)


def place(config: RunConfig, job: JobStore, num_clients: int) -> Topology:
    """Which rank belongs to which group, in a job of all groups or of one."""
    cluster, size = config.cluster, job.launch.job_world_size
    if cluster.group is not None:
        return plan_one_group(size, num_clients, cluster.group, cluster.num_groups)
    return plan_topology(size, num_clients, cluster.ranks_per_group)


def exchange_labels(
    job: JobStore, world: World, clients: Sequence[HostedClient], names: Sequence[str]
) -> tuple[list[str], frozenset[str]]:
    """Label of every client, for messages, and the tasks that some client trains on. Collective: all ranks of the job.

    Of clients hosted in other jobs only the name is known here, and not the tasks.
    """
    for client in clients if world.is_leader else ():
        job.publish(f"client/{client.client_id}", (client.label, client.tasks or (NO_TASK,)))
    here = (client_id for group in world.topology.groups for client_id in world.topology.clients_of_group(group))
    known = {client_id: job.lookup(f"client/{client_id}") for client_id in here}
    labels = [known[client_id][0] if client_id in known else name for client_id, name in enumerate(names)]
    return labels, frozenset(itertools.chain(*(tasks for _, tasks in known.values())))


def describe_layout(config: RunConfig, world: World, engine: AdapterEngine) -> dict[str, Any]:
    """What must be equal for the work inside a round to be restored."""
    return {
        "ranks": world.world_size,
        "zero_stage": engine.stage,
        "num_rounds": config.federation.num_rounds,
        "micro_batch_tokens": config.train.micro_batch_tokens,
    }


def describe_rank(topology: Topology, job: JobStore, global_rank: int) -> str:
    """What a message calls a rank: its host, its group and the clients that depend on it."""
    group = topology.group_of_rank(global_rank)
    clients = ", ".join(map(str, topology.clients_of_group(group)))
    return f"rank {global_rank} ({job.hosts[global_rank]}, group {group}, clients {clients})"


def describe(
    config: RunConfig, job: JobStore, topology: Topology, file_json: Mapping[str, Any], world: World, completed: int
) -> str:
    """The whole picture at start: groups, hosts, clients, ZeRO stage, precision."""
    stage = file_json.get("zero_optimization", {}).get("stage", 0)
    lines = [
        f"{config.name}: {config.method.name}, {topology.num_clients} clients in {topology.num_groups} rank groups "
        f"({topology.job_world_size} ranks), ZeRO stage {stage}, {config.model.precision}, {world.device.type}",
    ]
    for group, leader, size in zip(topology.groups, topology.leaders, topology.group_sizes, strict=True):
        hosts = ", ".join(dict.fromkeys(job.hosts[leader : leader + size]))
        clients = ", ".join(map(str, topology.clients_of_group(group)))
        lines.append(f"  group {group}: {size} rank{'s' if size > 1 else ''} on {hosts}; clients {clients}")
    if topology.num_groups_elsewhere:
        lines.append(
            f"  {topology.num_groups_elsewhere} more with launchers of their own, by {config.cluster.rendezvous}"
        )
    if completed:
        lines.append(f"  continues after round {completed} of {config.federation.num_rounds}")
    return "\n".join(lines)
