"""Evaluation of a trained run, from a config and a job to a report: the table of contents."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dpa_ds.adapters.methods import LOCAL
from dpa_ds.config.schema import RunConfig, TrackingConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answers import append_answers, prepare_answers
from dpa_ds.evaluation.dataset import (
    choose_clients,
    choose_instances,
    describe_settings,
    name_of,
    read_instances,
    tokenize_instances,
)
from dpa_ds.evaluation.parts import Evaluation, EvaluationFolders, write_reports
from dpa_ds.evaluation.work_items import EvaluationSet, answer_work_item
from dpa_ds.inference.client_model import ClientModel, Predictor, load_client_model
from dpa_ds.inference.loading import build_predictor, place_base
from dpa_ds.inference.weighting import resolve_weighting
from dpa_ds.model.directory import base_fingerprint
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.private import open_run_folder
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import RESULT, Tracker, logger, setup_logging

STOP = -1
"""Stands for a work item where a signal asked the job to stop."""


def evaluate(config: RunConfig, job: JobStore) -> Path | None:
    """Score the clients of a trained run on test instances, from where an interrupted evaluation stopped.

    All parts of an evaluation share their answers; each has a report of its own, so that none replaces a fuller one.
    Returns the folder of the report, on the coordinator.
    Collective: every rank of the job.
    """
    started = time.monotonic()
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(job.launch.global_rank == 0, config.tracking.quiet)
    folder = open_run_folder(config.run_dir, config.private_dir, group=None)
    # One rank looks, for all: a training that is still running may complete a round meanwhile.
    server_round = int(job.broadcast_from_rank_zero("round", folder.hold_trained_round))
    existing = folder.clients(server_round)
    clients = choose_clients(config.evaluation.clients, folder, server_round)
    everything = read_instances(config.data, config.seed, config.evaluation.split)
    instances = choose_instances(everything, config.evaluation)

    weighting = resolve_weighting(config.weighting, config.method, len(existing))
    base = place_base(
        job,
        config.model,
        config.data,
        config.evaluation.sharding,
        config.cluster,
        config.federation.timeout_seconds,
        len(clients),
    )
    world = base.world
    fingerprint = base_fingerprint(base.directory, base.example_format)
    folder.check_model(fingerprint)
    max_new_tokens = config.generation.max_new_tokens
    prompts = tokenize_instances(instances, base.example_format, base.limits, max_new_tokens)
    predictor = build_predictor(base, config.lora, config.generation, weighting, folder, server_round)
    client_models = load_clients(folder, server_round, clients, predictor)
    evaluation_set = EvaluationSet(instances, prompts, client_models)

    settings = describe_settings(config, weighting, folder, server_round, fingerprint, everything)
    folders = EvaluationFolders(folder, server_round, name_of(settings))
    if world.is_coordinator:
        write_file(folders.common / "settings.json", json.dumps(settings, indent=1))
        for answers_dir in {folders.answers_dir(client) for client in clients}:
            prepare_answers(answers_dir)
        logger.info(f"{config.name} after round {server_round}, {settings['weighting']}")
    job.barrier("folder")
    answer_missing(job, world, predictor, evaluation_set, folders, config.tracking)
    # Others may still have a whole work item to do.
    job.timeout_seconds = config.federation.timeout_seconds
    job.barrier("answered")

    report_dir = None
    if world.is_coordinator:
        described = {"run": config.name, **settings}
        wanted = None if config.evaluation.clients is None else clients
        evaluation = Evaluation(folders, config.evaluation, clients, wanted, instances, everything, described)
        report_dir, text = write_reports(evaluation, config.metrics.share)
        answers_dir = folders.answers_dir(clients[0])
        logger.log(RESULT, f"{text}\nanswers: {answers_dir}\ntook {time.monotonic() - started:.0f} s")
    world.close()
    return report_dir


def load_clients(
    folder: RunFolder, server_round: int, clients: Sequence[int], predictor: Predictor
) -> dict[int, ClientModel]:
    """Client id -> its model after `server_round`, checked against `predictor` before anything is answered.

    Raises:
        CheckpointError: a client's files are damaged, or lack what the weighting needs.
        ModelError: a local adapter does not fit the base.
    """
    client_models = {client: load_client_model(folder, server_round, client) for client in clients}
    for client_model in client_models.values():
        predictor.check_references(client_model)
        predictor.adapters.check_shapes(LOCAL, client_model.local_state)
    return client_models


def answer_missing(
    job: JobStore,
    world: World,
    predictor: Predictor,
    evaluation_set: EvaluationSet,
    folders: EvaluationFolders,
    tracking: TrackingConfig,
) -> None:
    """Answer what is not in `folders` yet, each rank into a file of its own. Collective: every rank of the job.

    Raises:
        Preempted: a signal asked the job to stop; what was answered is saved.
    """
    done = {answer.key for answer in folders.read_answers()}
    # Nobody answers before everybody has read what is there: work items are planned alike, and skipped alike.
    job.barrier("known")
    total = len(evaluation_set.keys)
    num_missing = len(evaluation_set.keys - done)
    if world.is_coordinator:
        num_clients = len(evaluation_set.client_models)
        num_instances = len(evaluation_set.instances)
        known = f"{total - num_missing} of {total} answers are there already"
        logger.info(f"{num_clients} clients x {num_instances} instances; {known}")
    items = evaluation_set.plan(predictor.generation, world.topology.num_groups)
    file_name = f"rank_{job.launch.global_rank:04d}.jsonl"
    answers_dirs = {client: folders.answers_dir(client) for client in evaluation_set.client_models}
    tracker = Tracker(None, world.is_coordinator, tracking)
    num_shown = 0
    with tracker.progress(num_missing, unit="answer"):
        while (number := next_work_item(job, world)) < len(items):
            item = items[number]
            task = evaluation_set.instances[item.instances[0]].task
            for batch in answer_work_item(item, evaluation_set, predictor, world, done):
                for answers_dir in set(answers_dirs.values()):
                    of_place = [answer for answer in batch if answers_dirs[answer.client] == answers_dir]
                    append_answers(answers_dir / file_name, of_place)
                num_answered = job.fetch_add("answered", len(batch)) + len(batch)
                tracker.advance(task, num_answered - num_shown)
                num_shown = num_answered
                # Several ranks of a group stop together, before their next item: alone, one would leave the others
                # waiting in a collective.
                if job.stop_requested and world.world_size == 1:
                    job.preempt()


def next_work_item(job: JobStore, world: World) -> int:
    """Number of the next work item, the same on all ranks of the group. Collective: all ranks of the group.

    Raises:
        Preempted: a signal asked the job to stop; what was answered is saved.
    """
    number = 0
    if world.is_leader and job.stop_requested:
        number = STOP
    elif world.is_leader:
        number = job.fetch_add("work_item")
    number = int(world.broadcast_(torch.tensor([number])).item())
    if number == STOP:
        job.preempt()
    return number
