"""What a group shares of its evaluation where clients keep their answers to themselves: numbers, and no text.

    evaluations/SETTINGS/scores/client_02.json        metrics.share per_client: scores and alphas of each answer
    evaluations/SETTINGS/sums/PART/clients_0+2.json   metrics.share sums: sums of P and of the scores of each task

They lie in the common folder, where the report of each group joins those of all groups that have evaluated.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, AnswerKey, Instance, ScoredAnswer
from dpa_ds.evaluation.metrics import METRICS
from dpa_ds.evaluation.statistics import ScoreTable, scores_of
from dpa_ds.runs.folder import client_name
from dpa_ds.runs.storage import well_formed, write_file

SCORES, SUMS = "scores", "sums"


@dataclass(frozen=True)
class SharedScores:
    """What is in the common folder of some clients."""

    clients: tuple[ClientInfo, ...]
    answers: tuple[ScoredAnswer, ...]
    """Of each client and task one to every instance, or none."""


def write_scores(
    evaluation_dir: Path, clients: Iterable[ClientInfo], answers: Iterable[Answer], instances: Sequence[Instance]
) -> None:
    """Share the scores of `clients`, a file for each.

    Args:
        answers: all that there are.
        instances: all of the split, with the right answers.

    Raises:
        CheckpointError: the file system refuses.
    """
    asked = {(instance.task, instance.row): instance for instance in instances}
    rows: dict[int, dict[AnswerKey, list[Any]]] = defaultdict(dict)
    for answer in answers:
        instance = asked.get((answer.task, answer.row))
        if instance is not None:
            scores = list(scores_of(answer, instance))
            rows[answer.client][answer.key] = [answer.task, answer.row, answer.alpha, scores]
    for info in clients:
        content = {
            "client": info.client,
            "label": info.label,
            "own_tasks": list(info.own_tasks),
            "metrics": list(METRICS),
            "answers": [rows[info.client][key] for key in sorted(rows[info.client])],
        }
        write_file(evaluation_dir / SCORES / f"{client_name(info.client)}.json", json.dumps(content))


def read_scores(evaluation_dir: Path, instances: Sequence[Instance]) -> SharedScores:
    """What all groups have shared so far of these instances.

    Raises:
        CheckpointError: a file holds what no evaluation writes.
    """
    num_rows: dict[str, int] = defaultdict(int)
    for instance in instances:
        num_rows[instance.task] += 1
    asked = {(instance.task, instance.row) for instance in instances}
    clients: list[ClientInfo] = []
    answers: list[ScoredAnswer] = []
    for path in sorted((evaluation_dir / SCORES).glob("client_*.json")):
        with well_formed(path, "delete it, and evaluate that client again"):
            content = json.loads(path.read_text())
            info = ClientInfo(int(content["client"]), str(content["label"]), tuple(content["own_tasks"]))
            by_task: dict[str, dict[int, ScoredAnswer]] = defaultdict(dict)
            for task, row, alpha, scores in content["answers"]:
                if (task, row) in asked:
                    by_task[task][row] = _checked(ScoredAnswer(info.client, task, row, alpha, "", tuple(scores)))
        clients.append(info)
        for task, of_task in by_task.items():
            # A part of a cell is what an evaluation of fewer instances left.
            if len(of_task) == num_rows[task]:
                answers += of_task.values()
    return SharedScores(tuple(clients), tuple(answers))


def _checked(answer: ScoredAnswer) -> ScoredAnswer:
    """The answer, if its numbers have their types and ranges. ValueError: they have not."""
    are_scores = all(isinstance(score, int | float) and 0 <= score <= 100 for score in answer.scores)
    if not answer.is_valid or not are_scores or len(answer.scores) != len(METRICS):
        raise ValueError(f"scores of row {answer.row}")
    return answer


@dataclass
class ScoreSums:
    """Sums over clients, by metric in the order of METRICS."""

    clients: list[int] = field(default_factory=list)
    """Ids of those that were evaluated."""
    trained_tasks: list[str] = field(default_factory=list)
    """Tasks that some client trains on, sorted."""
    own: list[float] = field(default_factory=lambda: [0.0] * len(METRICS))
    """Of P, over the clients that have it."""
    num_own: int = 0
    by_task: dict[str, list[float]] = field(default_factory=dict)
    """Of the mean score on each task."""
    num_by_task: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, table: ScoreTable) -> "ScoreSums":
        """The sums over all clients of a table."""
        sums = cls()
        sums.clients = sorted({client for client, _ in table.cells})
        trained: set[str] = set()
        for info in table.clients:
            trained.update(info.own_tasks)
            own = table.of_client("P", info.client)
            if own is not None:
                sums.num_own += 1
                sums.own = _added(sums.own, [own[metric] for metric in METRICS])
        for (_, task), means in table.means().items():
            sums._add_task(task, means.tolist(), 1)
        sums.trained_tasks = sorted(trained)
        return sums

    def _add_task(self, task: str, scores: Sequence[float], count: int) -> None:
        self.by_task[task] = _added(self.by_task.get(task, [0.0] * len(METRICS)), scores)
        self.num_by_task[task] = self.num_by_task.get(task, 0) + count

    def add(self, other: "ScoreSums") -> None:
        """Add the sums over other clients."""
        self.clients = sorted([*self.clients, *other.clients])
        self.trained_tasks = sorted({*self.trained_tasks, *other.trained_tasks})
        self.own = _added(self.own, other.own)
        self.num_own += other.num_own
        for task, scores in other.by_task.items():
            self._add_task(task, scores, other.num_by_task[task])

    def means(self) -> dict[str, Any]:
        """P, TTP and the score of each task, as means over clients; None where there are none.

        TTP is the mean over the tasks that some client trains on: where every client answered all of them, that of
        `ScoreTable`.
        """
        tasks = {}
        for task, scores in sorted(self.by_task.items()):
            tasks[task] = _divided(scores, self.num_by_task[task])
        total = [0.0] * len(METRICS)
        trained = [task for task in sorted(self.by_task) if task in self.trained_tasks]
        for task in trained:
            total = _added(total, [score / self.num_by_task[task] for score in self.by_task[task]])
        return {
            "clients": self.clients,
            "P": _divided(self.own, self.num_own),
            "TTP": _divided(total, len(trained)),
            "tasks": tasks,
        }


def write_sums(evaluation_dir: Path, part: str, sums: ScoreSums) -> None:
    """Share the sums over the clients of one group.

    Args:
        part: name of the tasks and instances that were scored.
    """
    name = "clients_" + "+".join(map(str, sums.clients))
    write_file(evaluation_dir / SUMS / part / f"{name}.json", json.dumps(vars(sums), indent=1))


def join_sums(evaluation_dir: Path, part: str) -> ScoreSums:
    """The sums over the clients of all groups that have shared theirs, each client once.

    Raises:
        CheckpointError: a file holds what no evaluation writes.
    """
    joined = ScoreSums()
    shared = []
    for path in (evaluation_dir / SUMS / part).glob("clients_*.json"):
        with well_formed(path, "delete it, and evaluate those clients again"):
            shared.append(ScoreSums(**json.loads(path.read_text())))
    # Of two that have a client in common the larger one counts.
    for sums in sorted(shared, key=lambda sums: (-len(sums.clients), sums.clients)):
        if not set(sums.clients) & set(joined.clients):
            joined.add(sums)
    return joined


def _added(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _divided(totals: Sequence[float], count: int) -> dict[str, float] | None:
    """By metric; None where there is nothing to divide by."""
    if count == 0:
        return None
    return {metric: total / count for metric, total in zip(METRICS, totals, strict=True)}
