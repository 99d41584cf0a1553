"""Where the files of an evaluation lie, and its reports: of one operator, or joined from what each group shares."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpa_ds.config.schema import EvaluationConfig
from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance, read_answers, select_answers
from dpa_ds.evaluation.dataset import name_of_part
from dpa_ds.evaluation.report import write_evaluation
from dpa_ds.evaluation.shared import ScoreSums, join_sums, read_scores, write_scores, write_sums
from dpa_ds.evaluation.statistics import ScoreTable
from dpa_ds.inference.client_model import describe_client
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import write_file

NUM_EXAMPLES = 5
"""Answers that a report shows of the best and of the worst, where `evaluation.examples` asks for them."""


@dataclass(frozen=True)
class EvaluationFolders:
    """The folders of one evaluation: a common one, and one with the answers in each private part."""

    run: RunFolder
    server_round: int
    name: str
    """`name_of` its settings."""

    @property
    def common(self) -> Path:
        """Settings, what is shared, and reports."""
        return self.run.run_dir / "evaluations" / self.name

    def private(self, client: int) -> Path:
        """Of the private part that has this client: answers lie with the adapter that gave them."""
        return self.run.place_of(self.server_round, client) / "evaluations" / self.name

    def answers_dir(self, client: int) -> Path:
        """Where a client's answers are kept."""
        return self.private(client) / "answers"

    def read_answers(self) -> Iterator[Answer]:
        """All answers that can be seen here."""
        for place in self.run.private_places:
            yield from read_answers(place / "evaluations" / self.name / "answers")


@dataclass(frozen=True)
class Evaluation:
    """What was asked of whom, and where the answers are."""

    folders: EvaluationFolders
    config: EvaluationConfig
    clients: Sequence[int]
    wanted: Sequence[int] | None
    """Those that the user asked for; None: all."""
    instances: Sequence[Instance]
    everything: Sequence[Instance]
    """All instances of the split: a group shares the scores of all that its clients answered."""
    settings: Mapping[str, Any]

    @property
    def infos(self) -> list[ClientInfo]:
        """The clients of the run that can be seen here."""
        folders = self.folders
        here = folders.run.clients_here(folders.server_round)
        return [describe_client(folders.run, folders.server_round, client) for client in here]

    def part(self, clients: Sequence[int] | None) -> str:
        """Name of the report on these clients, and of what they were asked."""
        return name_of_part(clients, self.config.tasks, self.config.instances_per_task)

    def write(
        self,
        folder: Path,
        answers: Sequence[Answer],
        infos: Sequence[ClientInfo],
        clients: Sequence[int] | None,
    ) -> str:
        """Write a report into `folder`; returns its text."""
        covered = {
            "clients": clients,
            "tasks": self.config.tasks,
            "instances_per_task": self.config.instances_per_task,
        }
        num_examples = NUM_EXAMPLES if self.config.examples else 0
        return write_evaluation(folder, self.instances, answers, infos, {**self.settings, **covered}, num_examples)


def write_reports(evaluation: Evaluation, share: Literal["per_client", "sums"]) -> tuple[Path, str]:
    """Write what belongs into the common folder, and into the private ones. Coordinator only.

    Returns:
        the folder of the report that all may see, and its text.
    """
    folders = evaluation.folders
    if folders.run.private_places == [folders.run.run_dir]:
        report_dir = folders.common / evaluation.part(evaluation.wanted)
        answers = select_answers(folders.read_answers(), evaluation.clients, evaluation.instances)
        return report_dir, evaluation.write(report_dir, answers, evaluation.infos, evaluation.wanted)
    if share == "sums":
        return _write_sums(evaluation)
    return _write_joined(evaluation)


def _write_joined(evaluation: Evaluation) -> tuple[Path, str]:
    """Share the scores of the clients that were evaluated here, and report on all that are shared."""
    folders = evaluation.folders
    own_answers = list(folders.read_answers())
    own_infos = [info for info in evaluation.infos if info.client in evaluation.clients]
    write_scores(folders.common, own_infos, own_answers, evaluation.everything)
    shared = read_scores(folders.common, evaluation.instances)
    wanted = evaluation.wanted
    if wanted is None:
        counted = sorted({answer.client for answer in shared.answers})
        if counted != folders.run.clients(folders.server_round):
            wanted = counted
    else:
        counted = list(evaluation.clients)
    # With their texts, for examples; of other groups there are none.
    answers = select_answers(own_answers, evaluation.clients, evaluation.instances)
    for answer in shared.answers:
        if answer.client in counted and answer.client not in evaluation.clients:
            answers.append(answer)
    report_dir = folders.common / evaluation.part(wanted)
    return report_dir, evaluation.write(report_dir, answers, shared.clients, wanted)


def _write_sums(evaluation: Evaluation) -> tuple[Path, str]:
    """A report for each private part, into that part; the sums over its clients, and their means, for all."""
    folders = evaluation.folders
    all_answers = list(folders.read_answers())
    what = evaluation.part(None)
    texts = []
    by_place: dict[Path, list[ClientInfo]] = {}
    for info in evaluation.infos:
        if info.client in evaluation.clients:
            by_place.setdefault(folders.private(info.client), []).append(info)
    for place, infos in by_place.items():
        clients = [info.client for info in infos]
        answers = select_answers(all_answers, clients, evaluation.instances)
        texts.append(evaluation.write(place / evaluation.part(clients), answers, infos, clients))
        write_sums(folders.common, what, ScoreSums.of(ScoreTable.build(evaluation.instances, answers, infos)))
    joined = join_sums(folders.common, what).means()
    report_dir = folders.common / what
    write_file(report_dir / "summary.json", json.dumps({"settings": dict(evaluation.settings), **joined}, indent=1))
    texts.append(f"means over the {len(joined['clients'])} clients that were shared: {report_dir / 'summary.json'}")
    return report_dir, "\n".join(texts)
