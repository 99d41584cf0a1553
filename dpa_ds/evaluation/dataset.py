"""What an evaluation covers: which clients and instances, as which tokens, under which settings."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from dpa_ds.config.schema import DataConfig, EvaluationConfig, RunConfig
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.limits import ModelLimits, check_prompts
from dpa_ds.data.sources import NO_TASK, list_clients, read_clients, read_test_examples, read_test_rows
from dpa_ds.errors import ConfigError, DataError
from dpa_ds.evaluation.answers import Instance
from dpa_ds.inference.generation import describe_decoding
from dpa_ds.inference.weighting import Weighting, describe_weighting
from dpa_ds.runs.folder import RunFolder

_LONGEST_NAME = 60


def choose_clients(wanted: Sequence[int | str] | None, folder: RunFolder, server_round: int) -> list[int]:
    """The clients `wanted`, ascending and each once; None: all whose files can be seen here.

    Raises:
        ConfigError: the run has no such client, or none can be seen.
    """
    if wanted is None:
        here = folder.clients_here(server_round)
        if not here:
            raise ConfigError(
                f"what the clients of {folder.run_dir} keep to themselves cannot be seen here: "
                f"{folder.describe_parts()}; say where it is with --private_dir"
            )
        return here
    return folder.find_clients(wanted, server_round)


def read_instances(data: DataConfig, seed: int, split: Literal["test", "held_out"]) -> list[Instance]:
    """All instances of `split`, by task; rows without a task are of NO_TASK.

    Raises:
        DataError: there are none.
    """
    num_rows: Counter[str] = Counter()
    instances = []
    for example in read_test_rows(data, seed, split):
        task = example.task or NO_TASK
        if example.is_plain_text:
            raise DataError(
                f"{example.place}: a plain text asks nothing, so that there is no answer to score: give test data with "
                "instructions or conversations; held-out losses of texts are reported while training"
            )
        if not example.output.strip():
            raise DataError(
                f"{example.place}: the last answer calls a tool and says nothing, so that there is no text to compare "
                "with: end test conversations with a text, or remove the row"
            )
        question = example.question
        instances.append(Instance(task, num_rows[task], question.instruction, example.output, question.conversation))
        num_rows[task] += 1
    if not instances:
        raise DataError("there is nothing to evaluate: the test data has no rows")
    # By task: what a digest of them is, and in which order they are answered, does not depend on how a file
    # mixes tasks.
    return sorted(instances, key=_task_and_row)


def choose_instances(instances: Sequence[Instance], evaluation: EvaluationConfig) -> list[Instance]:
    """Of all `instances` those of `evaluation.tasks`, and the first `evaluation.instances_per_task` of each.

    Raises:
        ConfigError: the test data has no such task.
    """
    existing = {instance.task for instance in instances}
    tasks = existing
    if evaluation.tasks is not None:
        tasks = set(evaluation.tasks)
        unknown = sorted(tasks - existing)
        if unknown:
            raise ConfigError(f"the test data has no task {unknown}: its tasks are {sorted(existing)}")
    limit = evaluation.instances_per_task
    chosen = []
    for instance in instances:
        if instance.task in tasks and (limit is None or instance.row < limit):
            chosen.append(instance)
    return chosen


def check_some_task_is_trained(data: DataConfig, seed: int, evaluation: EvaluationConfig) -> None:
    """Refuse a choice of tasks of which no client trains on any: P and TTP would have no value. Reads all data.

    Raises:
        ConfigError: no client trains on a chosen task, or the test data has no such task.
        DataError: a file of the data is not usable.
    """
    instances = choose_instances(read_instances(data, seed, evaluation.split), evaluation)
    scored = {instance.task for instance in instances}
    num_clients = len(list_clients(data, seed))
    trained: set[str] = set()
    for client in read_clients(data, seed, range(num_clients)):
        # A client whose data names no task trains on NO_TASK, as the instances without one are of it.
        tasks = {example.task for example in client.train} - {""}
        trained |= tasks or {NO_TASK}
    if not scored & trained:
        raise ConfigError(
            f"no client trains on any of the tasks to be scored, {sorted(scored)}, so P and TTP have no value: choose "
            f"among {sorted(trained)} with evaluation.tasks, or give other test data"
        )


def tokenize_instances(
    instances: Sequence[Instance], example_format: ExampleFormat, limits: ModelLimits, max_new_tokens: int
) -> list[list[int]]:
    """Prompt tokens of each instance.

    Raises:
        DataError: the model cannot read one, or has no room for an answer of `max_new_tokens`.
    """
    return check_prompts([instance.question for instance in instances], example_format, limits, max_new_tokens)


def check_test_prompts(
    data: DataConfig,
    seed: int,
    evaluation: EvaluationConfig,
    example_format: ExampleFormat,
    limits: ModelLimits,
    max_new_tokens: int,
) -> None:
    """Refuse test data that the model cannot answer, before anything is trained. Reads the test file, if there is one.

    Raises:
        DataError: as `tokenize_instances`, or the test file is not usable.
        ConfigError: the test data has no task that `evaluation.tasks` names.
    """
    if evaluation.split != "test":
        return
    test = read_test_examples(data)
    if test is None or all(example.is_plain_text for example in test):  # whose loss alone is measured
        return
    instances = choose_instances(read_instances(data, seed, "test"), evaluation)
    tokenize_instances(instances, example_format, limits, max_new_tokens)


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
    texts = []
    for instance in instances:
        text: list[Any] = [instance.task, instance.row, instance.instruction, instance.reference]
        if instance.conversation is not None:
            text.append(asdict(instance.conversation))
        texts.append(text)
    return {
        "method": config.method.name,
        "seed": config.seed,
        "round": server_round,
        "adapters": folder.digest(server_round),
        "weighting": describe_weighting(weighting, config.weighting.num_references),
        "kind": weighting.kind,
        "lambda": weighting.scale,
        **describe_decoding(config.generation),
        "split": config.evaluation.split,
        "precision": config.model.numbers,
        "base": base,
        "data": digest_of(texts, 16),
    }


def name_of(settings: Mapping[str, Any]) -> str:
    """Folder of an evaluation: readable, and another one for other settings."""
    return f"{settings['split']}-{settings['kind']}-{digest_of(dict(settings))}"


def name_of_part(clients: Sequence[int] | None, tasks: Sequence[str] | None, instances_per_task: int | None) -> str:
    """Folder of the report on a part of an evaluation, another one for another part: `all`, `clients_0+3-first_50`."""
    clients = clients and sorted(set(clients))
    tasks = tasks and sorted(set(tasks))
    parts = []
    if clients:
        parts.append("clients_" + "+".join(map(str, clients)))
    if tasks:
        parts.append("tasks_" + "+".join(tasks))
    if instances_per_task is not None:
        parts.append(f"first_{instances_per_task}")
    name = "-".join(parts) or "all"
    is_plain = all(re.fullmatch(r"[\w.]+", task) for task in tasks or ())
    if is_plain and len(name) <= _LONGEST_NAME:
        return name
    # Cut or with characters replaced, two names may become one: the digest tells them apart.
    readable = re.sub(r"[^\w.+-]", "_", name)[:_LONGEST_NAME]
    return f"{readable}-{digest_of([clients, tasks, instances_per_task])}"


def digest_of(content: Any, num_digits: int = 8) -> str:
    """Hex digits that tell JSON contents apart."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:num_digits]


def _task_and_row(instance: Instance) -> tuple[str, int]:
    return instance.task, instance.row
