"""Evaluation of a trained run, from a config and a job: the table of contents."""

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dpa_ds.checkpoint import RunFolder, write_file
from dpa_ds.config import RunConfig
from dpa_ds.data.prompts import tokenize_prompts
from dpa_ds.data.sources import read_test_rows
from dpa_ds.distributed.job import Job
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World, build_world
from dpa_ds.errors import CheckpointError, ClusterError, ConfigError, DataError
from dpa_ds.evaluation.answering import Answerer, load_finite, load_personality
from dpa_ds.evaluation.answers import Instance, append_answers, read_answers
from dpa_ds.evaluation.report import write_evaluation
from dpa_ds.evaluation.weighting import describe_weighting, resolve_weighting
from dpa_ds.evaluation.work import answer_piece, plan_pieces
from dpa_ds.federation.methods import Schedule, build_schedule
from dpa_ds.model.base import (
    check_precision,
    fits_one_rank,
    load_base,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from dpa_ds.model.dual_adapter import DualAdapter
from dpa_ds.model.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.tracking import Tracker, logger, setup_logging

PARTITIONED = {"zero_optimization": {"stage": 3}}
"""DeepSpeed JSON of a base that is divided among the ranks of a group."""


def evaluate(config: RunConfig, job: Job) -> Path:
    """Score the clients of a trained run on test instances, from where an interrupted evaluation stopped.

    Returns the folder of the report. Collective: every rank of the job.
    """
    started = time.monotonic()
    setup_logging(is_main=job.launch.global_rank == 0)
    schedule, folder = build_schedule(config.method), RunFolder(config.run_dir)
    server_round = folder.latest_round()
    if server_round == 0:
        raise CheckpointError(f"{config.run_dir} has no complete round yet: train it with launch/run.py first")
    clients = choose_clients(config, folder.clients(server_round))
    instances = choose_instances(config)

    directory, world, partitioned = place_base(config, job, len(clients))
    fingerprint = model_fingerprint(directory)
    folder.check_model(fingerprint)
    answerer = build_answerer(config, schedule, folder, server_round, directory, world, partitioned)
    personalities = {client: load_personality(folder, server_round, client) for client in clients}
    prompts = tokenize_instances(config, instances, answerer)

    settings = describe_settings(config, answerer, server_round, fingerprint, instances)
    report_dir = config.run_dir / "evaluations" / name_of(settings)
    answers_dir = report_dir / "answers"
    if world.is_main:
        write_file(report_dir / "settings.json", json.dumps(settings, indent=1))
        answers_dir.mkdir(exist_ok=True)
    job.barrier("folder")
    done = {answer.key for answer in read_answers(answers_dir)}
    job.barrier("known")  # nobody answers before everybody has read what is there

    pieces = plan_pieces(
        instances, [len(prompt) for prompt in prompts], clients, config.generation, world.topology.num_groups
    )
    total = len(clients) * len(instances)
    missing = total - sum((c, i.task, i.row) in done for c in clients for i in instances)
    tracker = Tracker(None, world.is_main, config.tracking)
    if world.is_main:
        logger.info(
            f"{config.name} after round {server_round}: {len(clients)} clients x {len(instances)} instances, "
            f"{settings['weighting']}; {total - missing} of {total} answers are there already"
        )
    mine = answers_dir / f"rank_{job.launch.global_rank:04d}.jsonl"
    shown = 0
    with tracker.progress(missing, unit="answer"):
        while (number := draw(job, world)) < len(pieces):
            for batch in answer_piece(pieces[number], instances, prompts, personalities, answerer, world, done):
                append_answers(mine, batch)
                answered = job.draw("answered", len(batch)) + len(batch)
                tracker.advance(instances[pieces[number].instances[0]].task, answered - shown)
                shown = answered
    job.barrier("answered")
    if world.is_main:
        text = write_evaluation(
            report_dir, instances, list(read_answers(answers_dir)), [p.info for p in personalities.values()], settings
        )
        logger.info(f"{text}\ntook {time.monotonic() - started:.0f} s")
    world.close()
    return report_dir


def choose_clients(config: RunConfig, existing: list[int]) -> list[int]:
    """`evaluation.clients`, or all.

    Raises:
        ConfigError: the run has no such client.
    """
    chosen = existing if config.evaluation.clients is None else sorted(set(config.evaluation.clients))
    unknown = sorted(set(chosen) - set(existing))
    if unknown:
        raise ConfigError(f"{config.run_dir} has no client {unknown}: its clients are {existing}")
    return chosen


def choose_instances(config: RunConfig) -> list[Instance]:
    """The test instances: `evaluation.tasks`, the first `instances_per_task` of each.

    Raises:
        ConfigError: the test data has no such task.
        DataError: there is no test data.
    """
    seen: Counter[str] = Counter()
    instances = []
    for example in read_test_rows(config.data, config.seed, config.evaluation.split):
        task = example.task or "all"
        instances.append(Instance(task, seen[task], example.instruction, example.output))
        seen[task] += 1
    if config.evaluation.tasks is not None:
        unknown = sorted(set(config.evaluation.tasks) - seen.keys())
        if unknown:
            raise ConfigError(f"the test data has no task {unknown}: its tasks are {sorted(seen)}")
        instances = [instance for instance in instances if instance.task in config.evaluation.tasks]
    if not instances:
        raise DataError("there is nothing to evaluate: the test data has no rows")
    limit = config.evaluation.instances_per_task
    chosen = [instance for instance in instances if limit is None or instance.row < limit]
    return sorted(chosen, key=lambda instance: (instance.task, instance.row))


def place_base(config: RunConfig, job: Job, num_clients: int) -> tuple[Path, World, bool]:
    """Model directory, world, and whether the base is divided: one copy a rank where it fits, else one for all ranks.

    Collective: every rank of the job.

    Raises:
        ClusterError: it neither fits one rank nor are there more.
    """
    check_precision(config.model.precision)
    size = job.launch.job_world_size
    directory = Path(str(job.decide("model", lambda: str(resolve_model(config.model, config.data.cache_dir)))))
    fits = config.evaluation.sharding == "never" or fits_one_rank(
        directory, config.model.precision, job.hosts.count(job.launch.hostname)
    )
    fits = bool(job.decide("fits", lambda: fits))
    partitioned = config.evaluation.sharding == "always" or not fits
    if not fits and size == 1:
        raise ClusterError(
            f"the base in {directory} does not fit the memory of one rank: start several, or use model.precision bf16"
        )
    sizes = (size,) if partitioned else (1,) * size
    world = build_world(job, Topology(sizes, num_clients), config.cluster, config.federation.timeout_seconds)
    return directory, world, partitioned


def build_answerer(
    config: RunConfig,
    schedule: Schedule,
    folder: RunFolder,
    server_round: int,
    directory: Path,
    world: World,
    partitioned: bool,
) -> Answerer:
    """The base with the run's global adapter. Collective where it is partitioned: all ranks of the group.

    Raises:
        CheckpointError, ModelError: adapters or base cannot be used.
    """
    shared = load_finite(folder, server_round, "global")
    ds_json = build_deepspeed_json(PARTITIONED if partitioned else {}, config, world.world_size)
    adapters = DualAdapter(load_base(config.model, directory, ds_json), config.lora)
    if partitioned:
        install = AdapterEngine(adapters, world, config.train, ds_json).write_state
    else:
        adapters.base_model.to(world.device)  # type: ignore[arg-type]
        install = adapters.load_state
    adapters.check_shapes("global", shared.weights)
    install("global", shared.weights)
    means = shared.extras.get("mean_states", {"mean_states": torch.zeros(0, 0)})["mean_states"]
    tokenizer = load_tokenizer(directory)
    return Answerer(
        adapters, tokenizer, resolve_weighting(config, schedule), config.generation, means, install, partitioned
    )


def tokenize_instances(config: RunConfig, instances: list[Instance], answerer: Answerer) -> list[list[int]]:
    """Prompt tokens of each instance.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    prompts = tokenize_prompts([i.instruction for i in instances], answerer.tokenizer, config.data.template)
    context = getattr(answerer.adapters.base_model.config.get_text_config(), "max_position_embeddings", None)
    for instance, prompt in zip(instances, prompts, strict=True):
        if context is not None and len(prompt) + config.generation.max_new_tokens > context:
            raise DataError(
                f"row {instance.row} of task {instance.task} has {len(prompt)} tokens: with generation.max_new_tokens "
                f"{config.generation.max_new_tokens} that is more than the model's context of {context}; shorten or remove it"
            )
    return prompts


def describe_settings(
    config: RunConfig, answerer: Answerer, server_round: int, fingerprint: str, instances: list[Instance]
) -> dict[str, Any]:
    """All that decides an answer: an evaluation continues only where every one of these is the same."""
    weighting = answerer.weighting
    texts = json.dumps([[i.task, i.row, i.instruction, i.reference] for i in instances])
    return {
        "run": config.name,
        "method": config.method.name,
        "seed": config.seed,
        "round": server_round,
        "weighting": describe_weighting(weighting, config.weighting.num_references),
        "kind": weighting.kind,
        "lambda": weighting.scale,
        "beams": config.generation.num_beams,
        "max_new_tokens": config.generation.max_new_tokens,
        "split": config.evaluation.split,
        "precision": config.model.precision,
        "base": fingerprint,
        "instances": len(instances),
        "data": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }


def name_of(settings: dict[str, Any]) -> str:
    """Folder of an evaluation: readable, and another one for other settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{settings['split']}-{settings['kind']}-{digest}"


def draw(job: Job, world: World) -> int:
    """The next piece of work, the same on all ranks of the group. Collective: all ranks of the group."""
    number = job.draw("piece") if world.is_leader else 0
    return int(world.broadcast_(torch.tensor([number])).item())
