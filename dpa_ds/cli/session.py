"""Federated training of a recipe in a job: `build_session`, then `run`."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, Schedule, adapter_table, build_schedule
from dpa_ds.adapters.state import check_tensors, shapes_of
from dpa_ds.config.deepspeed_json import check_stage, load_deepspeed_json
from dpa_ds.config.load import to_yaml
from dpa_ds.config.paths import has_client_files
from dpa_ds.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FederationConfig,
    GenerationConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from dpa_ds.config.validate import agreed_sections, fingerprint_sections, flatten, show
from dpa_ds.data.formats import ExampleFormat, build_format
from dpa_ds.data.references import REPRESENTATIONS
from dpa_ds.data.sources import NO_TASK
from dpa_ds.data.tokenize import warn_of_template
from dpa_ds.distributed.job_store import JobStore, code_fingerprint, package_versions
from dpa_ds.distributed.topology import Topology, describe_rank, plan
from dpa_ds.distributed.world import World, build_world, check_rendezvous, join_leaders
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.engine.profiling import Profile
from dpa_ds.errors import CheckpointError, list_some
from dpa_ds.evaluation.answers import Instance
from dpa_ds.evaluation.dataset import check_test_prompts
from dpa_ds.evaluation.report import write_report
from dpa_ds.evaluation.while_training import Scorer, instances_to_score
from dpa_ds.federation.aggregation.base import ServerOptimizer, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from dpa_ds.federation.clients import (
    ClientBuilder,
    ClientTokens,
    agree_on_client_names,
    build_client_tokenizer,
    embed_references,
    read_hosted,
    tokenize_hosted,
)
from dpa_ds.federation.data_report import report_data
from dpa_ds.federation.loop import run_rounds
from dpa_ds.federation.progress import checked
from dpa_ds.federation.round_evaluation import RoundEvaluation
from dpa_ds.federation.round_state import RoundCommit, RoundSaving, RoundState
from dpa_ds.federation.session import RoundTimer, Session
from dpa_ds.federation.trainer import Trainer
from dpa_ds.inference.weighting import resolve_weighting
from dpa_ds.model.base import load_base, resolve_model
from dpa_ds.model.directory import base_fingerprint, load_tokenizer, read_limits
from dpa_ds.model.precision import check_precision
from dpa_ds.runs.folder import MODEL, RunFolder
from dpa_ds.runs.private import open_run_folder
from dpa_ds.runs.resume import (
    RunLock,
    create_private_part,
    find_resume_round,
    validate_private_part,
    validate_run_dir,
)
from dpa_ds.runs.storage import BackgroundWriter, well_formed, write_file
from dpa_ds.runs.trackers import ExperimentTrackers, public_recipe
from dpa_ds.runs.tracking import RESULT, LogFile, Tracker, logger, setup_logging

PLACES = ("data.path", "data.test_path", "model.path")
"""Fields that may differ from group to group: where each keeps its files."""
GLOBAL_SEED = 0
"""Word of the seed of the fresh global adapter."""


def train(config: RunConfig, job: JobStore) -> None:
    """Train `config.method` on all clients, from where the run stopped. Collective: every rank of the job."""
    run(build_session(config, job))


def run(session: Session) -> None:
    """Run all rounds that are left, and report. Collective: every rank of the job."""
    world, run_dir = session.world, session.folder.run_dir
    try:
        with session.writer:
            run_rounds(session)
            if world.leaders is not None and world.leaders.is_coordinator:
                session.tracker.publish()  # of a process that was lost after its last round
    finally:
        # On every rank, also after a signal: when the last rank is here, the job says that all is saved.
        session.tracker.close()
    if world.leaders is not None and world.leaders.is_coordinator:
        warn_of_absent_clients(session)
        logger.log(RESULT, write_report(run_dir, world.topology.num_groups, time.monotonic() - session.started))
    world.close()


def warn_of_absent_clients(session: Session) -> None:
    """Name the clients that no round holds: their groups, which have launchers of their own, were never there."""
    folder = session.folder
    present = set(folder.clients(folder.latest_round()))
    absent = [label for client_id, label in enumerate(session.labels) if client_id not in present]
    if absent:
        logger.warning(
            f"{list_some(absent)}: no round has a local adapter of theirs, because their rank groups were in none; "
            "to train them, raise federation.num_rounds and start all groups again"
        )


def build_session(config: RunConfig, job: JobStore) -> Session:
    """Everything that the rounds need. Collective: every rank of the job.

    What is cheap to check comes first, and the run folder is written to last: a mistake of the user costs seconds and
    leaves nothing behind.
    """
    started = time.monotonic()
    aggregation = build_aggregation(config.federation, config.seed)
    place = find_place(config, job)
    world, schedule = place.world, place.schedule
    base, tokens = prepare_data(config.model, config.data, config.evaluation, config.generation, config.seed, place)
    labels, instances = agree_on_tasks(config.data, config.seed, config.evaluation, job, place, tokens)
    report_data(tokens, labels, job, world, config.metrics.share)
    # After the data: loading the base and starting DeepSpeed take long, and a wrong file is to be reported before.
    model = load_model(base, config.model, config.lora, config.train, config.engine, world)
    builder = ClientBuilder(config.seed, world, model.adapters, place.folder)
    clients, aggregation.reduction.leader_state = builder.build(tokens, place.completed_rounds)
    profile = Profile(config.run_dir / "profile" if config.tracking.profile else None, world)
    engine = AdapterEngine(model.adapters, world, config.train, model.deepspeed_json, profile)
    if schedule.weighted_by_instance:
        embed_references(clients, model.adapters, config.weighting, config.seed, base.pad_id, config.train)
    state = restore_server_state(place, model.adapters, aggregation.server_optimizer, config.seed)
    check_rendezvous(config.cluster.rendezvous if world.is_leader else None, config.federation.timeout_seconds)
    # Everything that a user can get wrong was read by now: from here on the run exists.
    create_run(place, to_yaml(config), fingerprint_sections(config), base.fingerprint, config.model.path)
    tracker = build_tracker(place, config.tracking, config.metrics, flatten(config))
    writer = BackgroundWriter()
    layout = describe_layout(engine, config.train, config.federation)
    saving = RoundSaving(place.folder, writer, config.checkpoint, layout)
    round_state = RoundState(saving, world, job, config.federation.on_bad_update, state, place.completed_rounds)
    batching = engine.rows.batching(config.train.micro_batch_tokens, base.pad_id)
    trainer = Trainer(
        engine, schedule, config.train, config.seed, batching, aggregation.transforms, round_state, tracker
    )
    scorer = None
    if instances is not None:
        weighting = resolve_weighting(config.weighting, config.method, len(place.names))
        scorer = Scorer(engine, world, base.example_format, weighting, config.generation, instances)
    # Last of all: from here on the other groups wait for this one, where each has a launcher of its own.
    facts = group_facts(config.name, agreed_sections(flatten(config)), base.fingerprint, world.topology.num_groups)
    join_leaders(config.federation, config.cluster, config.run_dir, facts, job, world)
    return Session(
        seed=config.seed,
        federation=config.federation,
        share=config.metrics.share,
        world=world,
        clients=clients,
        labels=labels,
        trainer=trainer,
        aggregation=aggregation,
        evaluation=RoundEvaluation(config.evaluation, config.federation.num_rounds, trainer, scorer, tracker),
        round_state=round_state,
        commit=RoundCommit(place.folder, writer, world, config.checkpoint.keep_rounds, model.adapters),
        folder=place.folder,
        lock=place.lock,
        writer=writer,
        tracker=tracker,
        timer=RoundTimer(profile),
        started=started,
    )


# ---- the run and its place in the job -------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where this rank stands: in the job, and in the run that the job continues."""

    schedule: Schedule
    names: list[str]
    """Of all clients, by id."""
    folder: RunFolder
    lock: RunLock
    completed_rounds: int
    world: World
    log_file: LogFile | None
    """Of rank 0 of each job."""


def find_place(config: RunConfig, job: JobStore) -> Place:
    """Divide the ranks among the clients, and find the round to resume after. Collective: every rank of the job.

    Raises:
        ClusterError, CheckpointError: ranks and clients do not fit, or the run folder is another job's or
        another run's.
        ConfigError: ZeRO-3 is to divide a quantised base.
    """
    zero = load_deepspeed_json(config.engine.deepspeed_config).get("zero_optimization", {})
    check_stage(config.model.quantization, int(zero.get("stage", 0)))
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(job.launch.global_rank == 0, config.tracking.quiet)
    schedule = build_schedule(config.method)
    names = agree_on_client_names(config.data, config.seed, schedule.pooled, job)
    topology = plan(config.cluster, job.launch.job_world_size, len(names))
    job.describe_rank = partial(describe_rank, topology, job.hosts)
    own_group = topology.group_of_rank(job.launch.global_rank)
    folder = open_run_folder(config.run_dir, config.private_dir, own_group)
    log_file = None
    if job.launch.global_rank == 0:
        log_file = LogFile(find_log_path(folder, config.cluster.group, config.metrics))
        logger.addHandler(log_file)
    lock = RunLock(config.run_dir, config.cluster.group, config.checkpoint.grace_seconds)

    def find_round() -> int:
        lock.acquire()  # first: what another job is writing must not be read
        return find_resume_round(folder, fingerprint_sections(config), config.resume)

    completed = int(job.broadcast_from_rank_zero("completed_rounds", find_round))
    world = build_world(job, topology, config.cluster, config.federation.timeout_seconds)
    if world.is_leader:
        validate_private_part(folder, fingerprint_sections(config))
    if world.is_coordinator:
        device = world.device.type
        if device == "cpu":
            threads = torch.get_num_threads()
            device = f"cpu, {threads} threads a rank" if threads > 1 else "cpu, 1 thread a rank"
        logger.info(
            f"{config.name}: {config.method.name}, {topology.num_clients} clients in {topology.num_groups} rank groups "
            f"({topology.job_world_size} ranks), ZeRO stage {zero.get('stage', 0)}, {config.model.numbers}, "
            f"{device}"
        )
        for line in describe_groups(topology, job.hosts, config.cluster.rendezvous):
            logger.info(f"  {line}")
        logger.info(f"  {folder.describe_parts()}")
        if completed:
            logger.info(f"  continues after round {completed} of {config.federation.num_rounds}")
        if schedule.weighted_by_instance and config.weighting.num_references == 1:
            logger.warning(
                "weighting.num_references 1: the mean that leaves a client is the embedding of one private prompt, "
                "and whoever guesses the prompt can tell that it is this one; take more (5 is the paper's)"
            )
    return Place(schedule, names, folder, lock, completed, world, log_file)


def describe_groups(topology: Topology, hosts: Sequence[str], rendezvous: str | None) -> Iterator[str]:
    """A line for each rank group of this job, and one for those with launchers of their own.

    Args:
        hosts: host of each rank of the job.
    """
    for group, leader, size in zip(topology.groups, topology.leaders, topology.group_sizes, strict=True):
        of_group = ", ".join(dict.fromkeys(hosts[leader : leader + size]))
        clients = ", ".join(map(str, topology.clients_of_group(group)))
        ranks = "1 rank" if size == 1 else f"{size} ranks"
        yield f"group {group}: {ranks} on {of_group}; clients {clients}"
    if topology.num_groups_elsewhere:
        yield f"{topology.num_groups_elsewhere} more with launchers of their own, by {rendezvous}"


def create_run(
    place: Place, recipe: str, fingerprint: Mapping[str, Any], base_fingerprint: str, base_path: str
) -> None:
    """Write what makes the folder a run: its lock, its recipe, what its base model is.

    The coordinator does, and of a group's private part its leader; others return at once.

    Args:
        fingerprint: of the recipe, `fingerprint_sections`.
        base_fingerprint: of the base model's files.
        base_path: where they are.

    Raises:
        CheckpointError: another job has begun the run meanwhile, or the file system refuses.
    """
    run_dir = place.folder.run_dir
    if place.world.is_coordinator:
        place.lock.create()
        # Again: groups with launchers of their own begin a run together, each with a lock of its own.
        validate_run_dir(place.folder, fingerprint)
        write_file(run_dir / "config.yaml", recipe)
        write_file(run_dir / MODEL, json.dumps({"fingerprint": base_fingerprint, "path": base_path}))
    if place.world.is_leader:
        create_private_part(place.folder, recipe)
    if place.log_file is not None:
        place.log_file.begin()


def find_log_path(folder: RunFolder, group: int | None, metrics: MetricsConfig) -> Path:
    """Where what the console says goes: beside the curves of single clients, whose losses it has.

    Args:
        group: of the job, where each rank group has a launcher, and a log file, of its own.
    """
    place = folder.own_part if metrics.share == "sums" else folder.run_dir
    return place / ("log.txt" if group is None else f"log_group_{group}.txt")


def build_tracker(place: Place, tracking: TrackingConfig, metrics: MetricsConfig, recipe: Mapping[str, Any]) -> Tracker:
    """Reports the numbers of this rank: curves of single clients go where the recipe allows them to be seen.

    Args:
        recipe: the whole of it, by dotted keys.
    """
    folder, world = place.folder, place.world
    trackers = ExperimentTrackers(folder.run_dir, tracking, public_recipe(recipe))
    run_dir = folder.run_dir if world.is_leader else None
    if not world.is_leader or metrics.share == "per_client":
        return Tracker(run_dir, world.is_coordinator, tracking, trackers=trackers)
    earlier = [folder.run_dir, *folder.private_places]
    return Tracker(run_dir, world.is_coordinator, tracking, folder.own_part, earlier, trackers)


# ---- what the session is made of ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundBase:
    """The base model on disk, before it is loaded."""

    directory: Path
    example_format: ExampleFormat
    """How texts become the tokens that it reads."""
    pad_id: int
    fingerprint: str
    """Of its files, and of its chat template where that is used."""


def prepare_data(
    model: ModelConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    generation: GenerationConfig,
    seed: int,
    place: Place,
) -> tuple[FoundBase, list[ClientTokens]]:
    """Read the data of the hosted clients, find the base, and tokenise. Collective: all ranks of the group.

    Raises:
        DataError: the data is not usable, or the model cannot read it, or not answer the prompts of the test data.
        ConfigError, ModelError: the base is not there, or its precision does not fit the device.
        CheckpointError: it is another one than that of the run.
    """
    world, folder = place.world, place.folder
    texts = read_hosted(data, seed, place.schedule.pooled, world)
    check_precision(model.precision, world.device)
    with world.leader_first():  # a GGUF file is converted once
        directory = resolve_model(model, data.cache_dir)
    tokenizer = load_tokenizer(directory)
    example_format = build_format(tokenizer, data)
    base = FoundBase(
        directory, example_format, int(tokenizer.pad_token_id), base_fingerprint(directory, example_format)
    )
    folder.check_model(base.fingerprint)
    limits = read_limits(directory)
    if world.is_coordinator:
        warn_of_template(data.template)
        if any(client.has_unread_input for client in texts):
            logger.warning(
                "rows have a column 'input' that no prompt has: set data.input_column: input, unless that is meant"
            )
        if not has_client_files(data.test_path):
            check_test_prompts(data, seed, evaluation, example_format, limits, generation.max_new_tokens)
    if folder.own_part != folder.run_dir:
        data = replace(data, cache_dir=str(folder.own_part.parent))  # tokens are the clients' texts
    client_tokenizer = build_client_tokenizer(data, evaluation, generation, example_format, limits)
    return base, tokenize_hosted(texts, client_tokenizer, world)


@dataclass(frozen=True)
class LoadedModel:
    """The frozen base with its adapters, before there is an engine."""

    adapters: AdapterModel
    deepspeed_json: dict[str, Any]
    """Under ZeRO-3 the base is partitioned by it already."""


def load_model(
    base: FoundBase, model: ModelConfig, lora: LoraConfig, train: TrainConfig, engine: EngineConfig, world: World
) -> LoadedModel:
    """Load the base and add the adapters. Collective: all ranks of the group.

    Raises:
        ConfigError, ModelError: files or adapters do not fit the device or one another.
    """
    path = engine.deepspeed_config
    deepspeed_json = build_deepspeed_json(load_deepspeed_json(path), path, train, model.precision, world.world_size)
    loaded = load_base(model, base.directory, deepspeed_json, world.device)
    return LoadedModel(AdapterModel(loaded, adapter_table(lora), lora), deepspeed_json)


def restore_server_state(
    place: Place, adapters: AdapterModel, server_optimizer: ServerOptimizer, seed: int
) -> ServerState:
    """The server state after the last complete round, or a fresh one; an empty one on ranks that are no leaders.

    Raises:
        CheckpointError, ModelError: the round is damaged, or belongs to another model.
    """
    if not place.world.is_leader:
        return ServerState.empty()
    reference_mean, counted = torch.zeros(0, 0), torch.zeros(0)
    if place.schedule.weighted_by_instance:
        reference_mean = torch.zeros(len(REPRESENTATIONS), adapters.hidden_size)
        counted = torch.zeros(len(place.names))
    if place.completed_rounds == 0:
        adapter = adapters.initial_state(GLOBAL, (seed, GLOBAL_SEED))
        optimizer = server_optimizer.initial_tensors(adapter)
        return ServerState(adapter, reference_mean, optimizer=optimizer, references_counted=counted)
    saved = place.folder.load_newest(place.completed_rounds, GLOBAL)
    if saved is None:
        round_dir = place.folder.round_dir(place.completed_rounds)
        raise CheckpointError(f"{round_dir} has no global adapter: delete it")
    adapters.check_shapes(GLOBAL, saved.weights)
    nothing = {"reference_mean": reference_mean, "weight": torch.zeros(1), "counted": counted}
    mean = saved.extras.get("reference_mean", nothing)
    round_dir = place.folder.round_dir(place.completed_rounds)
    if "counted" not in mean:
        raise CheckpointError(
            f"{round_dir} was written by an older version, which did not keep whose references are in the reference "
            "mean: train again, or resume with that version"
        )
    with well_formed(round_dir / GLOBAL, f"delete {round_dir} to continue from the round before"):
        expected = {"reference_mean": reference_mean, "counted": counted}
        check_tensors({name: mean[name] for name in expected}, shapes_of(expected))
        optimizer = saved.extras.get("server_optimizer", {})
        check_tensors(optimizer, shapes_of(server_optimizer.initial_tensors(saved.weights)))
        return ServerState(
            adapter=saved.weights,
            reference_mean=mean["reference_mean"],
            reference_weight=float(mean["weight"]),
            optimizer=optimizer,
            scalars=checked(saved.info["scalars"], dict[str, float], "scalars"),
            references_counted=mean["counted"],
        )


def group_facts(name: str, agreed: Mapping[str, Any], base_fingerprint: str, num_groups: int) -> dict[str, str]:
    """What must be equal in all groups of a run that have launchers of their own: else their averages mean nothing.

    Args:
        name: of the run.
        agreed: what of the recipe must be equal, `agreed_sections`.
    """
    facts = {key: show(value) for key, value in agreed.items() if key not in PLACES}
    return facts | {
        "name of the run": name,
        "code of dpa_ds": code_fingerprint(),
        "package versions": package_versions(),
        "base model": base_fingerprint,
        "number of groups": str(num_groups),
    }


def describe_layout(engine: AdapterEngine, train: TrainConfig, federation: FederationConfig) -> dict[str, Any]:
    """What must be equal for the work inside a round to be resumed bit for bit."""
    return {
        "ranks": engine.world.world_size,
        "zero_stage": engine.stage,
        "num_rounds": federation.num_rounds,
        "micro_batch_tokens": train.micro_batch_tokens,
    }


def agree_on_tasks(
    data: DataConfig,
    seed: int,
    evaluation: EvaluationConfig,
    job: JobStore,
    place: Place,
    clients: Sequence[ClientTokens],
) -> tuple[list[str], list[Instance] | None]:
    """Label of every client, and what is scored while training; None: nothing is. Collective: all ranks of the job.

    Raises:
        ConfigError, DataError: the test data is not usable, or has no such task.
    """
    labels, trained_tasks = exchange_labels(job, place.world, clients, place.names)
    if not evaluation.scores_every_rounds:
        return labels, None
    return labels, instances_to_score(data, seed, evaluation, trained_tasks)


def exchange_labels(
    job: JobStore, world: World, clients: Sequence[ClientTokens], names: Sequence[str]
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
