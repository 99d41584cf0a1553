"""Scores of a few answers while training: enough to see in TensorBoard whether the adapters learn their tasks."""

from collections.abc import Mapping, Sequence, Set

import torch

from dpa_ds.config.schema import DataConfig, EvaluationConfig, GenerationConfig
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.distributed.world import World
from dpa_ds.engine.engine import AdapterEngine
from dpa_ds.errors import ConfigError
from dpa_ds.evaluation.answers import Instance
from dpa_ds.evaluation.dataset import choose_instances, read_instances
from dpa_ds.evaluation.metrics import score_answer
from dpa_ds.evaluation.work_items import EvaluationSet, answer_work_item
from dpa_ds.inference.client_model import ClientModel, Predictor
from dpa_ds.inference.weighting import BASE_ALONE, Weighting

DEFAULT_INSTANCES = 4
"""Instances of each task where `evaluation.instances_per_task` says nothing: every scored round pays for them."""


def instances_to_score(
    data: DataConfig, seed: int, evaluation: EvaluationConfig, trained_tasks: Set[str]
) -> list[Instance]:
    """The first instances of every task that some client trains on.

    Raises:
        ConfigError, DataError: as `choose_instances` and `read_instances`.
    """
    limit = evaluation.instances_per_task or DEFAULT_INSTANCES
    chosen = choose_instances(read_instances(data, seed, evaluation.split), evaluation)
    return [instance for instance in chosen if instance.task in trained_tasks and instance.row < limit]


class Scorer:
    """Scores clients on a few `instances`, with the engine that trains them.

    Raises:
        ConfigError: the base alone is to be scored.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        world: World,
        example_format: ExampleFormat,
        weighting: Weighting,
        generation: GenerationConfig,
        instances: Sequence[Instance],
    ) -> None:
        if weighting.kind == BASE_ALONE:
            raise ConfigError(
                "weighting.kind none scores the base alone, which no round changes: score it by launch/evaluate.py "
                "--weighting none, and leave weighting.kind auto for evaluation.scores_every_rounds"
            )
        self._world = world
        self._format = example_format
        self._generation = generation
        self._instances = instances
        # One for all rounds: how the model is to answer is tried once.
        self._predictor = Predictor(
            engine.adapters, example_format, weighting, generation, torch.zeros(0, 0), engine.write_state, world
        )

    def score(self, client_model: ClientModel, reference_mean: torch.Tensor) -> dict[str, float]:
        """Mean ROUGE-1 by task, 0 to 100. The global adapter must be installed. Collective: all ranks of the group."""
        if not self._instances:
            return {}
        self._predictor.forget_adapters(reference_mean)
        # The start of the run has checked that the model can read them, and has room for the answers.
        prompts = self._format.prompts([instance.question for instance in self._instances])
        evaluation_set = EvaluationSet(self._instances, prompts, {client_model.info.client: client_model})
        references = {(instance.task, instance.row): instance.reference for instance in self._instances}
        tasks = sorted({instance.task for instance in self._instances})
        totals = torch.zeros(len(tasks), 2, dtype=torch.float64)  # of each task: sum of scores, number of answers
        for item in evaluation_set.plan(self._generation, num_groups=1):
            for batch in answer_work_item(item, evaluation_set, self._predictor, self._world, done=frozenset()):
                for answer in batch:
                    score = score_answer(answer.text, references[answer.task, answer.row])["rouge1"]
                    totals[tasks.index(answer.task)] += torch.tensor([score, 1.0])
        # Each rank answered its share of every batch.
        self._world.all_reduce_(totals)
        means = totals[:, 0] / totals[:, 1]
        return dict(zip(tasks, means.tolist(), strict=True))


def own_and_all(scores: Mapping[str, float], own_tasks: Sequence[str]) -> tuple[float, float]:
    """P and TTP of one client: the mean over its own tasks, and over all that were scored; NaN where there are none."""
    own = [score for task, score in scores.items() if task in own_tasks]
    return _mean(own), _mean(list(scores.values()))


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        return float("nan")
    return sum(scores) / len(scores)
