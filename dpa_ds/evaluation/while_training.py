"""Scores of a few answers while training: enough to see in TensorBoard whether the adapters learn their tasks."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from dpa_ds.adapters.methods import Schedule
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.world import World
from dpa_ds.engine.engine import AdapterEngine
from dpa_ds.evaluation.dataset import choose_instances, read_instances, tokenize_instances
from dpa_ds.evaluation.metrics import score_answer
from dpa_ds.evaluation.runner import EvaluationSet, answer_work_item
from dpa_ds.inference.client_model import ClientModel, Predictor
from dpa_ds.inference.weighting import resolve_weighting

DEFAULT_INSTANCES = 4


class Scorer:
    """Scores clients on the first instances of every task that some client trains on, with the engine that trains them.

    Args:
        trained: those tasks, of all clients of the federation.
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        engine: AdapterEngine,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        trained: frozenset[str],
    ) -> None:
        self._config, self._engine, self._world, self._tokenizer = config, engine, world, tokenizer
        self._weighting = resolve_weighting(config, schedule, world.topology.num_clients)
        limit = config.evaluation.instances_per_task or DEFAULT_INSTANCES
        chosen = choose_instances(config, read_instances(config))
        self._instances = [i for i in chosen if i.task in trained and i.row < limit]

    def score(self, client: ClientModel, reference_mean: torch.Tensor) -> dict[str, float]:
        """Mean ROUGE-1 by task, 0 to 100. The global adapter must be installed. Collective: all ranks of the group."""
        if not self._instances:
            return {}
        world = self._world
        predictor = Predictor(
            self._engine.adapters,
            self._tokenizer,
            self._weighting,
            self._config.generation,
            reference_mean,
            self._engine.write_state,
            partitioned=world.world_size > 1,
        )
        me = client.info.client
        prompts = tokenize_instances(self._config, self._instances, predictor)
        evaluation_set = EvaluationSet(self._instances, prompts, {me: client})
        references = {(i.task, i.row): i.reference for i in self._instances}
        tasks = sorted({instance.task for instance in self._instances})
        total = torch.zeros(len(tasks), 2, dtype=torch.float64)  # sum of scores, number of answers
        for item in evaluation_set.plan(self._config.generation, num_groups=1):
            for batch in answer_work_item(item, evaluation_set, predictor, world, frozenset()):
                for answer in batch:
                    score = score_answer(answer.text, references[answer.task, answer.row])["rouge1"]
                    total[tasks.index(answer.task)] += torch.tensor([score, 1.0])
        world.all_reduce_(total)
        return {task: float(row[0] / row[1]) for task, row in zip(tasks, total, strict=True)}


def own_and_all(scores: dict[str, float], own_tasks: Sequence[str]) -> tuple[float, float]:
    """P and TTP of one client: the mean over its own tasks, and over all that were scored; NaN where there are none."""
    own = [score for task, score in scores.items() if task in own_tasks]
    return _mean(own), _mean(list(scores.values()))


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else float("nan")
