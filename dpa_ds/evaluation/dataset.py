"""What an evaluation covers: which clients and instances, as which tokens, under which settings."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dpa_ds.config.schema import RunConfig
from dpa_ds.data.sources import NO_TASK, list_clients, read_clients, read_test_rows
from dpa_ds.data.tokenize import tokenize_prompts
from dpa_ds.errors import ConfigError, DataError
from dpa_ds.evaluation.answers import Instance
from dpa_ds.inference.client_model import Predictor
from dpa_ds.inference.weighting import Weighting, describe_weighting
from dpa_ds.runs.folder import RunFolder

_LONGEST_NAME = 60


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


def read_instances(config: RunConfig) -> list[Instance]:
    """All instances of `evaluation.split`, by task; rows without a task are of NO_TASK.

    Raises:
        DataError: there are none.
    """
    seen: Counter[str] = Counter()
    instances = []
    for example in read_test_rows(config.data, config.seed, config.evaluation.split):
        task = example.task or NO_TASK
        instances.append(Instance(task, seen[task], example.instruction, example.output))
        seen[task] += 1
    if not instances:
        raise DataError("there is nothing to evaluate: the test data has no rows")
    return sorted(instances, key=lambda instance: (instance.task, instance.row))


def choose_instances(config: RunConfig, instances: Sequence[Instance]) -> list[Instance]:
    """Of all `instances` those of `evaluation.tasks`, and the first `evaluation.instances_per_task` of each.

    Raises:
        ConfigError: the test data has no such task.
    """
    wanted, limit = config.evaluation.tasks, config.evaluation.instances_per_task
    existing = {instance.task for instance in instances}
    unknown = sorted(set(wanted or ()) - existing)
    if unknown:
        raise ConfigError(f"the test data has no task {unknown}: its tasks are {sorted(existing)}")
    return [i for i in instances if (wanted is None or i.task in wanted) and (limit is None or i.row < limit)]


def check_some_task_is_trained(config: RunConfig) -> None:
    """Refuse a choice of tasks of which no client trains on any: P and TTP would have no value. Reads all data.

    Raises:
        ConfigError: so it is, or the test data has no such task.
        DataError: a file of the data is not usable.
    """
    scored = {instance.task for instance in choose_instances(config, read_instances(config))}
    clients = read_clients(config.data, config.seed, range(len(list_clients(config.data, config.seed))))
    tasks_of_clients = ({example.task for example in client.train} - {""} for client in clients)
    trained = {task for tasks in tasks_of_clients for task in tasks or {NO_TASK}}
    if not scored & trained:
        raise ConfigError(
            f"no client trains on any of the tasks to be scored, {sorted(scored)}, so P and TTP have no value: choose "
            f"among {sorted(trained)} with evaluation.tasks, or give other test data"
        )


def tokenize_instances(config: RunConfig, instances: Sequence[Instance], predictor: Predictor) -> list[list[int]]:
    """Prompt tokens of each instance.

    Raises:
        DataError: prompt and answer do not fit the model's context.
    """
    prompts = tokenize_prompts([i.instruction for i in instances], predictor.tokenizer, config.data.template)
    for instance, prompt in zip(instances, prompts, strict=True):
        predictor.check_context(len(prompt), f"row {instance.row} of task {instance.task}")
    return prompts


def describe_settings(
    config: RunConfig,
    weighting: Weighting,
    folder: RunFolder,
    server_round: int,
    base: str,
    instances: Sequence[Instance],
) -> dict[str, Any]:
    """All that decides an answer: an evaluation continues only where every one of these is the same.

    Args:
        base: fingerprint of the model.
        instances: all of the split, so that more of them can be answered later.
    """
    return {
        "method": config.method.name,
        "seed": config.seed,
        "round": server_round,
        "adapters": folder.digest(server_round),
        "weighting": describe_weighting(weighting, config.weighting.num_references),
        "kind": weighting.kind,
        "lambda": weighting.scale,
        "beams": config.generation.num_beams,
        "max_new_tokens": config.generation.max_new_tokens,
        "split": config.evaluation.split,
        "precision": config.model.precision,
        "base": base,
        "data": digest_of([[i.task, i.row, i.instruction, i.reference] for i in instances], 16),
    }


def name_of(settings: Mapping[str, Any]) -> str:
    """Folder of an evaluation: readable, and another one for other settings."""
    return f"{settings['split']}-{settings['kind']}-{digest_of(dict(settings))}"


def name_of_part(clients: Sequence[int] | None, tasks: Sequence[str] | None, instances_per_task: int | None) -> str:
    """Folder of the report on a part of an evaluation, another one for another part: `all`, `clients_0+3-first_50`."""
    clients, tasks = clients and sorted(set(clients)), tasks and sorted(set(tasks))
    parts = [f"clients_{'+'.join(map(str, clients))}"] if clients else []
    parts += [f"tasks_{'+'.join(tasks)}"] if tasks else []
    parts += [f"first_{instances_per_task}"] if instances_per_task is not None else []
    name = "-".join(parts) or "all"
    if len(name) <= _LONGEST_NAME and all(re.fullmatch(r"[\w.]+", task) for task in tasks or ()):
        return name
    readable = re.sub(r"[^\w.+-]", "_", name)[:_LONGEST_NAME]
    return f"{readable}-{digest_of([clients, tasks, instances_per_task])}"


def digest_of(content: Any, num_digits: int = 8) -> str:
    """Hex digits that tell JSON contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:num_digits]
