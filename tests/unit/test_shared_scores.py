"""What groups share of an evaluation joins to the numbers of one that sees all answers; what is partial does not count."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.data.sources import ClientInfo
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.shared import ScoreSums, join_sums, read_scores, write_scores, write_sums
from dpa_ds.evaluation.statistics import ScoreTable, summarize

CLIENTS = (ClientInfo(0, "north", ("a",)), ClientInfo(1, "south", ("b",)), ClientInfo(2, "west", ("a", "b")))
INSTANCES = [Instance(task, row, f"ask {row}", f"secret {row}") for task in "ab" for row in range(3)]
TEXTS = ("secret 1", "secret 2 times", "no")


def answers_of(client: int) -> list[Answer]:
    return [Answer(client, one.task, one.row, 0.25, TEXTS[(client + one.row) % 3]) for one in INSTANCES]


ANSWERS = [answer for client in range(3) for answer in answers_of(client)]


def test_joined_scores_are_those_of_all_answers(tmp_path: Path) -> None:
    write_scores(tmp_path, CLIENTS[:1], ANSWERS, INSTANCES)
    write_scores(tmp_path, CLIENTS[1:], ANSWERS, INSTANCES)
    shared = read_scores(tmp_path, INSTANCES)
    assert shared.clients == CLIENTS
    joined, whole = (summarize(INSTANCES, found, CLIENTS, 0) for found in (shared.answers, ANSWERS))
    assert joined == whole
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_part_of_a_task_does_not_count(tmp_path: Path) -> None:
    write_scores(tmp_path, CLIENTS[:1], ANSWERS[:4], INSTANCES)
    shared = read_scores(tmp_path, INSTANCES)
    assert {answer.task for answer in shared.answers} == {"a"}
    assert len(read_scores(tmp_path, INSTANCES[:2] + INSTANCES[3:4]).answers) == 3, "of what is asked now all is there"


@pytest.mark.parametrize("row", [["a", 0, 2.0, [0.0] * 4], ["a", 0, 0.5, [0.0]], ["a", 0, 0.5, ["x"] * 4], ["a", 0]])
def test_what_no_evaluation_writes_is_named(tmp_path: Path, row: list[Any]) -> None:
    write_scores(tmp_path, CLIENTS[:1], ANSWERS, INSTANCES)
    path = tmp_path / "scores" / "client_00.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "answers": [row]}))
    with pytest.raises(CheckpointError, match=r"client_00.json holds what no run writes .* delete it"):
        read_scores(tmp_path, INSTANCES)


def sums_of(*clients: int) -> ScoreSums:
    infos = [CLIENTS[client] for client in clients]
    answers = [answer for client in clients for answer in answers_of(client)]
    return ScoreSums.of(ScoreTable.build(INSTANCES, answers, infos))


def test_joined_sums_are_the_means_over_all_clients(tmp_path: Path) -> None:
    write_sums(tmp_path, "all", sums_of(0))
    write_sums(tmp_path, "all", sums_of(1, 2))
    write_sums(tmp_path, "all", sums_of(1))  # an earlier evaluation: client 1 counts once
    means = join_sums(tmp_path, "all").means()
    table = ScoreTable.build(INSTANCES, ANSWERS, CLIENTS)
    assert means["clients"] == [0, 1, 2]
    for quantity in ("P", "TTP"):
        assert means[quantity] == pytest.approx(table.overall(quantity))
    assert list(means["tasks"]) == ["a", "b"]


def test_without_anything_shared_there_is_no_mean(tmp_path: Path) -> None:
    assert join_sums(tmp_path, "all").means() == {"clients": [], "P": None, "TTP": None, "tasks": {}}
