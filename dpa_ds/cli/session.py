"""Federated training of a recipe in a job: `build_session`, then `run`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, LOCAL, Schedule, adapter_table, build_schedule
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import to_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.data.batching import BatchingConfig
from dpa_ds.data.references import REPRESENTATIONS
from dpa_ds.data.sources import NO_TASK
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import Topology, describe_rank, plan
from dpa_ds.distributed.world import World, build_world, join_leaders
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.engine.profiling import Profile
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.report import write_report
from dpa_ds.evaluation.while_training import Scorer, instances_to_score
from dpa_ds.federation.aggregation.base import ServerOptimizer, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from dpa_ds.federation.clients import ClientBuilder, HostedClient, client_names, embed_references
from dpa_ds.federation.loop import run_rounds
from dpa_ds.federation.round_evaluation import RoundEvaluation
from dpa_ds.federation.round_state import RoundCommit, RoundState
from dpa_ds.federation.session import RoundTimer, Session
from dpa_ds.federation.trainer import Trainer
from dpa_ds.inference.weighting import resolve_weighting
from dpa_ds.model.base import check_precision, load_base, resolve_model
from dpa_ds.model.directory import load_tokenizer, model_fingerprint
from dpa_ds.runs.folder import MODEL, RunFolder
from dpa_ds.runs.resume import acquire_run_lock, find_resume_round
from dpa_ds.runs.storage import BackgroundWriter, write_file
from dpa_ds.runs.tracking import Tracker, logger, setup_logging

GLOBAL_SEED = 0
"""Word of the seed of the fresh global adapter."""


def train(config: RunConfig, job: JobStore) -> None:
    """Train `config.method` on all clients, from where the run stopped. Collective: every rank of the job."""
    run(build_session(config, job))


def run(session: Session) -> None:
    """Run all rounds that are left, and report. Collective: every rank of the job."""
    world, run_dir = session.world, session.folder.run_dir
    with session.writer:
        run_rounds(session)
    session.tracker.close()
    if world.leaders is not None and world.leaders.is_coordinator:
        logger.info(write_report(run_dir, world.topology.num_groups, time.monotonic() - session.started))
    world.close()


def build_session(config: RunConfig, job: JobStore) -> Session:
    """Everything that the rounds need. Collective: every rank of the job.

    What is cheap to check comes first, and the run folder is written to last: a mistake of the user costs seconds and leaves
    nothing behind.
    """
    started = time.monotonic()
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    schedule = build_schedule(config.method)
    names = client_names(config.data, config.seed, schedule.pooled)
    topology = plan(config.cluster, job.launch.job_world_size, len(names))
    job.describe_rank = partial(describe_rank, topology, job.hosts)
    folder = RunFolder(config.run_dir)
    completed = int(job.broadcast_from_rank_zero("completed_rounds", lambda: find_start_round(folder, config)))
    world = build_world(job, topology, config.cluster, config.federation.timeout_seconds)
    if world.is_coordinator:
        logger.info(describe(config, job, topology, world, completed))

    model = load_model(config, world, folder)
    builder = ClientBuilder(config.data, config.seed, schedule.pooled, world, model.tokenizer, model.adapters, folder)
    clients, leader_state = builder.build(completed)
    # After the data: DeepSpeed's start takes seconds, and a wrong file is to be reported before.
    profile = Profile(config.run_dir / "profile" if config.tracking.profile else None, world)
    engine = AdapterEngine(model.adapters, world, config.train, model.deepspeed_json, profile)
    pad_id = int(model.tokenizer.pad_token_id)
    batching = BatchingConfig(config.train.micro_batch_tokens, pad_id, engine.packing.supports_prefix)
    if schedule.weighted_by_instance:
        num_references = config.weighting.num_references
        embed_references(clients, model.adapters, num_references, config.seed, pad_id, config.train.micro_batch_tokens)
    aggregation = build_aggregation(config.federation, config.seed)
    aggregation.reduction.leader_state = leader_state
    state = ServerState.empty()
    if world.is_leader:
        state = restore_server_state(
            folder, schedule, model.adapters, aggregation.server_optimizer, config.seed, completed
        )
    labels, trained_tasks = exchange_labels(job, world, clients, names)
    if world.is_coordinator:  # everything that a user can get wrong was read by now: from here on the run exists
        create_run(config, folder, model.fingerprint)
    tracker = Tracker(config.run_dir if world.is_leader else None, world.is_coordinator, config.tracking)
    scorer = None
    if config.evaluation.scores_every_rounds:
        weighting = resolve_weighting(config, schedule, topology.num_clients)
        instances = instances_to_score(config.data, config.seed, config.evaluation, trained_tasks)
        scorer = Scorer(engine, world, model.tokenizer, weighting, config.generation, instances, config.data.template)
    writer = BackgroundWriter()
    layout = describe_layout(config, world, engine)
    on_bad_update = config.federation.on_bad_update
    round_state = RoundState(folder, writer, world, job, config.checkpoint, on_bad_update, layout, state, completed)
    trainer = Trainer(
        engine, world, schedule, config.train, config.seed, batching, aggregation.transforms, round_state, tracker
    )
    peft_configs = {adapter: model.adapters.peft_config(adapter) for adapter in (GLOBAL, LOCAL)}
    return Session(
        seed=config.seed,
        federation=config.federation,
        # Last of all: from here on the other groups wait for this one, where each has a launcher of its own.
        world=join_leaders(config, job, world),
        clients=clients,
        labels=labels,
        trainer=trainer,
        aggregation=aggregation,
        evaluation=RoundEvaluation(config.evaluation, config.federation.num_rounds, trainer, scorer, tracker),
        round_state=round_state,
        commit=RoundCommit(folder, writer, world, config.checkpoint.keep_rounds, peft_configs),
        folder=folder,
        writer=writer,
        tracker=tracker,
        timer=RoundTimer(profile),
        started=started,
    )


# ---- the run and its place in the job -------------------------------------------------------------------------


def find_start_round(folder: RunFolder, config: RunConfig) -> int:
    """The round to resume after, once no other job works on the run. Rank 0."""
    acquire_run_lock(folder, config)
    return find_resume_round(folder, config)


def create_run(config: RunConfig, folder: RunFolder, model_fingerprint: str) -> None:
    """Write what makes the folder a run: its recipe, its lock, its base model. The coordinator."""
    write_file(folder.run_dir / "config.yaml", to_yaml(config))
    acquire_run_lock(folder, config, creates=True)
    model = {"fingerprint": model_fingerprint, "path": config.model.path}
    write_file(folder.run_dir / MODEL, json.dumps(model))


def describe_layout(config: RunConfig, world: World, engine: AdapterEngine) -> dict[str, Any]:
    """What must be equal for the work inside a round to be restored."""
    return {
        "ranks": world.world_size,
        "zero_stage": engine.stage,
        "num_rounds": config.federation.num_rounds,
        "micro_batch_tokens": config.train.micro_batch_tokens,
    }


def describe(config: RunConfig, job: JobStore, topology: Topology, world: World, completed: int) -> str:
    """The whole picture at start: groups, hosts, clients, ZeRO stage, precision."""
    zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
    lines = [
        f"{config.name}: {config.method.name}, {topology.num_clients} clients in {topology.num_groups} rank groups "
        f"({topology.job_world_size} ranks), ZeRO stage {zero.get('stage', 0)}, {config.model.precision}, "
        f"{world.device.type}",
    ]
    for group, leader, size in zip(topology.groups, topology.leaders, topology.group_sizes, strict=True):
        hosts = ", ".join(dict.fromkeys(job.hosts[leader : leader + size]))
        clients = ", ".join(map(str, topology.clients_of_group(group)))
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        lines.append(f"  group {group}: {ranks} on {hosts}; clients {clients}")
    if topology.num_groups_elsewhere:
        lines.append(
            f"  {topology.num_groups_elsewhere} more with launchers of their own, by {config.cluster.rendezvous}"
        )
    if completed:
        lines.append(f"  continues after round {completed} of {config.federation.num_rounds}")
    return "\n".join(lines)


# ---- what the session is made of ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """The frozen base with its adapters, before there is an engine."""

    tokenizer: PreTrainedTokenizerBase
    adapters: AdapterModel
    deepspeed_json: dict[str, Any]
    """Under ZeRO-3 the base is partitioned by it already."""
    fingerprint: str
    """Of the base model's files."""


def load_model(config: RunConfig, world: World, folder: RunFolder) -> LoadedModel:
    """Load the base that the run was begun with. Collective: all ranks of the group.

    Raises:
        ConfigError, ModelError, CheckpointError: precision, files or base model do not fit the device or the run.
    """
    check_precision(config.model.precision)
    with world.leader_first():  # a GGUF file is converted once
        directory = resolve_model(config.model, config.data.cache_dir)
    fingerprint = model_fingerprint(directory)
    folder.check_model(fingerprint)
    tokenizer = load_tokenizer(directory)
    file_json = load_deepspeed_json(config.engine.deepspeed_config)
    deepspeed_json = build_deepspeed_json(
        file_json, config.engine.deepspeed_config, config.train, config.model.precision, world.world_size
    )
    base = load_base(config.model, directory, deepspeed_json)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    return LoadedModel(tokenizer, adapters, deepspeed_json, fingerprint)


def restore_server_state(
    folder: RunFolder,
    schedule: Schedule,
    adapters: AdapterModel,
    server_optimizer: ServerOptimizer,
    seed: int,
    completed_rounds: int,
) -> ServerState:
    """The server state after `completed_rounds`, or a fresh one. Leaders only.

    Raises:
        CheckpointError, ModelError: the round is damaged, or belongs to another model.
    """
    hidden_size = int(adapters.base_model.config.get_text_config().hidden_size)
    fresh_mean = torch.zeros(0, 0)
    if schedule.weighted_by_instance:
        fresh_mean = torch.zeros(len(REPRESENTATIONS), hidden_size)
    if completed_rounds == 0:
        adapter = adapters.initial_state(GLOBAL, (seed, GLOBAL_SEED))
        return ServerState(adapter, fresh_mean, optimizer=server_optimizer.initial_tensors(adapter))
    saved = folder.load_newest(completed_rounds, GLOBAL)
    if saved is None:
        raise CheckpointError(f"{folder.round_dir(completed_rounds)} has no global adapter: delete it")
    adapters.check_shapes(GLOBAL, saved.weights)
    mean = saved.extras.get("reference_mean", {"reference_mean": fresh_mean, "weight": torch.zeros(1)})
    return ServerState(
        adapter=saved.weights,
        reference_mean=mean["reference_mean"],
        reference_weight=float(mean["weight"]),
        optimizer=saved.extras.get("server_optimizer", {}),
        scalars=saved.info["scalars"],
    )


def exchange_labels(
    job: JobStore, world: World, clients: Sequence[HostedClient], names: Sequence[str]
) -> tuple[list[str], frozenset[str]]:
    """Label of every client, for messages, and the tasks that some client trains on. Collective: all ranks of the job.

    Of clients hosted in other jobs only the name is known here, and not the tasks.
    """
    if world.is_leader:
        for client in clients:
            job.publish(f"client/{client.client_id}", (client.label, client.tasks or (NO_TASK,)))
    labels = list(names)
    trained_tasks: set[str] = set()
    for group in world.topology.groups:
        for client_id in world.topology.clients_of_group(group):
            labels[client_id], tasks = job.lookup(f"client/{client_id}")
            trained_tasks.update(tasks)
    return labels, frozenset(trained_tasks)
