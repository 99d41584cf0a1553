"""Evaluation of a trained run, from a config and a job: the table of contents."""

import json
import time
from pathlib import Path

import torch

from dpa_ds.checkpoint import RunFolder, write_file
from dpa_ds.config import RunConfig
from dpa_ds.distributed.job import Job
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answering import Answerer, describe_client, load_personality
from dpa_ds.evaluation.answers import append_answers, prepare_answers, read_answers, select_answers
from dpa_ds.evaluation.instances import (
    choose_clients,
    choose_instances,
    describe_settings,
    name_of,
    name_of_part,
    read_instances,
    tokenize_instances,
)
from dpa_ds.evaluation.loading import build_answerer, place_base
from dpa_ds.evaluation.report import write_evaluation
from dpa_ds.evaluation.work import Questions, answer_piece
from dpa_ds.model.base import model_fingerprint
from dpa_ds.tracking import Tracker, logger, setup_logging

STOP = -1
"""Drawn in place of a piece of work where a signal asked the job to stop."""


def evaluate(config: RunConfig, job: Job) -> Path:
    """Score the clients of a trained run on test instances, from where an interrupted evaluation stopped.

    All parts of an evaluation share their answers; each has a report of its own, so that none replaces a fuller one.
    Returns the folder of the report. Collective: every rank of the job.
    """
    started = time.monotonic()
    job.watch(config.checkpoint.grace_seconds, config.cluster.silence_seconds)
    setup_logging(is_main=job.launch.global_rank == 0)
    folder = RunFolder(config.run_dir)
    server_round = int(job.decide("round", folder.trained_round))  # a training that goes on beside does not matter
    clients = choose_clients(config, folder.clients(server_round))
    everything = read_instances(config)
    instances = choose_instances(config, everything)

    directory, world, partitioned = place_base(config, job, len(clients))
    fingerprint = model_fingerprint(directory)
    folder.check_model(fingerprint)
    answerer = build_answerer(config, folder, server_round, directory, world, partitioned)
    personalities = {client: load_personality(folder, server_round, client) for client in clients}
    for personality in personalities.values():
        answerer.check_references(personality)
        answerer.adapters.check_shapes("local", personality.local_state)
    prompts = tokenize_instances(config, instances, answerer)

    settings = describe_settings(config, answerer.weighting, folder, server_round, fingerprint, everything)
    evaluation_dir = config.run_dir / "evaluations" / name_of(settings)
    answers_dir = evaluation_dir / "answers"
    if world.is_main:
        write_file(evaluation_dir / "settings.json", json.dumps(settings, indent=1))
        prepare_answers(answers_dir)
        logger.info(f"{config.name} after round {server_round}, {settings['weighting']}")
    job.barrier("folder")
    answer_missing(config, job, world, answerer, Questions(instances, prompts, personalities), answers_dir)
    covered = {name: getattr(config.evaluation, name) for name in ("clients", "tasks", "instances_per_task")}
    report_dir = evaluation_dir / name_of_part(**covered)
    if world.is_main:
        answers = select_answers(read_answers(answers_dir), clients, instances)
        everyone = [describe_client(folder, server_round, client) for client in folder.clients(server_round)]
        described = {"run": config.name, **settings, **covered}
        text = write_evaluation(report_dir, instances, answers, everyone, described)
        logger.info(f"{text}\nanswers: {answers_dir}\ntook {time.monotonic() - started:.0f} s")
    world.close()
    return report_dir


def answer_missing(
    config: RunConfig, job: Job, world: World, answerer: Answerer, questions: Questions, answers_dir: Path
) -> None:
    """Answer what is not in `answers_dir` yet, each rank into a file of its own. Collective: every rank of the job."""
    done = {answer.key for answer in read_answers(answers_dir)}
    job.barrier("known")  # nobody answers before everybody has read what is there
    total, missing = len(questions.keys), len(questions.keys - done)
    tracker = Tracker(None, world.is_main, config.tracking)
    if world.is_main:
        num_clients, num_instances = len(questions.personalities), len(questions.instances)
        known = f"{total - missing} of {total} answers are there already"
        logger.info(f"{num_clients} clients x {num_instances} instances; {known}")
    pieces = questions.plan(config.generation, world.topology.num_groups)
    mine = answers_dir / f"rank_{job.launch.global_rank:04d}.jsonl"
    shown = 0
    with tracker.progress(missing, unit="answer"):
        while (number := draw(job, world)) < len(pieces):
            for batch in answer_piece(pieces[number], questions, answerer, world, done):
                append_answers(mine, batch)
                answered = job.draw("answered", len(batch)) + len(batch)
                tracker.advance(questions.instances[pieces[number].instances[0]].task, answered - shown)
                shown = answered
                if job.stop_requested and world.world_size == 1:  # else at the next piece, together
                    job.preempt()
    job.timeout_seconds = config.federation.timeout_seconds  # others may still have a whole piece to do
    job.barrier("answered")


def draw(job: Job, world: World) -> int:
    """The next piece of work, the same on all ranks of the group. Collective: all ranks of the group.

    Raises:
        Preempted: a signal asked the job to stop; what was answered is saved.
    """
    number = (STOP if job.stop_requested else job.draw("piece")) if world.is_leader else 0
    number = int(world.broadcast_(torch.tensor([number])).item())
    if number == STOP:
        job.preempt()
    return number
