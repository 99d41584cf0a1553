"""Evaluation of a trained run, from a config and a job: the table of contents."""

import json
import time
from pathlib import Path

import torch

from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answers import append_answers, prepare_answers, read_answers, select_answers
from dpa_ds.evaluation.dataset import (
    choose_clients,
    choose_instances,
    describe_settings,
    name_of,
    name_of_part,
    read_instances,
    tokenize_instances,
)
from dpa_ds.evaluation.report import write_evaluation
from dpa_ds.evaluation.runner import EvaluationSet, answer_work_item
from dpa_ds.inference.client_model import Predictor, describe_client, load_client_model
from dpa_ds.inference.loading import build_predictor, place_base
from dpa_ds.model.directory import model_fingerprint
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import write_file
from dpa_ds.runs.tracking import Tracker, logger, setup_logging

STOP = -1
"""Drawn in place of a work item where a signal asked the job to stop."""


def evaluate(config: RunConfig, job: JobStore) -> Path:
    """Score the clients of a trained run on test instances, from where an interrupted evaluation stopped.

    All parts of an evaluation share their answers; each has a report of its own, so that none replaces a fuller one.
    Returns the folder of the report. Collective: every rank of the job.
    """
    started = time.monotonic()
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    folder = RunFolder(config.run_dir)
    server_round = int(
        job.broadcast_from_rank_zero("round", folder.trained_round)
    )  # a training that continues beside does not matter
    clients = choose_clients(config, folder.clients(server_round))
    everything = read_instances(config)
    instances = choose_instances(config, everything)

    directory, world, partitioned = place_base(config, job, len(clients))
    fingerprint = model_fingerprint(directory)
    folder.check_model(fingerprint)
    predictor = build_predictor(config, folder, server_round, directory, world, partitioned)
    client_models = {client: load_client_model(folder, server_round, client) for client in clients}
    for client_model in client_models.values():
        predictor.check_references(client_model)
        predictor.adapters.check_shapes("local", client_model.local_state)
    prompts = tokenize_instances(config, instances, predictor)

    settings = describe_settings(config, predictor.weighting, folder, server_round, fingerprint, everything)
    evaluation_dir = config.run_dir / "evaluations" / name_of(settings)
    answers_dir = evaluation_dir / "answers"
    if world.is_coordinator:
        write_file(evaluation_dir / "settings.json", json.dumps(settings, indent=1))
        prepare_answers(answers_dir)
        logger.info(f"{config.name} after round {server_round}, {settings['weighting']}")
    job.barrier("folder")
    answer_missing(config, job, world, predictor, EvaluationSet(instances, prompts, client_models), answers_dir)
    covered = {name: getattr(config.evaluation, name) for name in ("clients", "tasks", "instances_per_task")}
    report_dir = evaluation_dir / name_of_part(**covered)
    if world.is_coordinator:
        answers = select_answers(read_answers(answers_dir), clients, instances)
        everyone = [describe_client(folder, server_round, client) for client in folder.clients(server_round)]
        described = {"run": config.name, **settings, **covered}
        text = write_evaluation(report_dir, instances, answers, everyone, described)
        logger.info(f"{text}\nanswers: {answers_dir}\ntook {time.monotonic() - started:.0f} s")
    world.close()
    return report_dir


def answer_missing(
    config: RunConfig,
    job: JobStore,
    world: World,
    predictor: Predictor,
    evaluation_set: EvaluationSet,
    answers_dir: Path,
) -> None:
    """Answer what is not in `answers_dir` yet, each rank into a file of its own. Collective: every rank of the job."""
    done = {answer.key for answer in read_answers(answers_dir)}
    job.barrier("known")  # nobody answers before everybody has read what is there
    total, missing = len(evaluation_set.keys), len(evaluation_set.keys - done)
    tracker = Tracker(None, world.is_coordinator, config.tracking)
    if world.is_coordinator:
        num_clients, num_instances = len(evaluation_set.client_models), len(evaluation_set.instances)
        known = f"{total - missing} of {total} answers are there already"
        logger.info(f"{num_clients} clients x {num_instances} instances; {known}")
    items = evaluation_set.plan(config.generation, world.topology.num_groups)
    mine = answers_dir / f"rank_{job.launch.global_rank:04d}.jsonl"
    shown = 0
    with tracker.progress(missing, unit="answer"):
        while (number := draw(job, world)) < len(items):
            for batch in answer_work_item(items[number], evaluation_set, predictor, world, done):
                append_answers(mine, batch)
                answered = job.fetch_add("answered", len(batch)) + len(batch)
                tracker.advance(evaluation_set.instances[items[number].instances[0]].task, answered - shown)
                shown = answered
                if job.stop_requested and world.world_size == 1:  # else at the next item, together
                    job.preempt()
    job.timeout_seconds = config.federation.timeout_seconds  # others may still have a whole work item to do
    job.barrier("answered")


def draw(job: JobStore, world: World) -> int:
    """The next work item, the same on all ranks of the group. Collective: all ranks of the group.

    Raises:
        Preempted: a signal asked the job to stop; what was answered is saved.
    """
    number = (STOP if job.stop_requested else job.fetch_add("work_item")) if world.is_leader else 0
    number = int(world.broadcast_(torch.tensor([number])).item())
    if number == STOP:
        job.preempt()
    return number
