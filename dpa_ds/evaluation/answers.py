"""What an evaluation is made of: test instances, the clients' answers to them, and the files that keep the answers."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from dpa_ds.data.conversations import Conversation, Question
from dpa_ds.errors import storage_errors

_KEPT = "those written so far are kept: make room, then run the same command again"


class AnswerKey(NamedTuple):
    """Which client answers which instance."""

    client: int
    task: str
    row: int


@dataclass(frozen=True)
class Instance:
    """One test instance."""

    task: str
    row: int
    """Position among the rows of the task in the test file, from 0."""
    instruction: str
    reference: str
    """The right answer."""
    conversation: Conversation | None = None
    """What was said before the answer; None: the instruction alone."""

    @property
    def question(self) -> Question:
        """What the answer is to."""
        return Question(self.instruction, self.conversation, f"row {self.row} of task {self.task}")

    def key_for(self, client: int) -> AnswerKey:
        """Key of the answer that `client` gives to this instance."""
        return AnswerKey(client, self.task, self.row)


@dataclass(frozen=True)
class Answer:
    """One client's answer to one instance."""

    client: int
    task: str
    row: int
    alpha: float
    """Weight of the local adapter, in [0, 1]."""
    text: str

    @property
    def key(self) -> AnswerKey:
        """The client and the instance that this answer belongs to."""
        return AnswerKey(self.client, self.task, self.row)

    @property
    def is_valid(self) -> bool:
        """Whether every field has its type and range: a damaged file may give any JSON value."""
        return (
            isinstance(self.client, int)
            and isinstance(self.task, str)
            and isinstance(self.row, int)
            and isinstance(self.alpha, int | float)
            and 0 <= self.alpha <= 1
            and isinstance(self.text, str)
        )


@dataclass(frozen=True)
class ScoredAnswer(Answer):
    """An answer without its text, as one group shares it with the others."""

    scores: tuple[float, ...]
    """By metric, in the order of METRICS."""


def prepare_answers(folder: Path) -> None:
    """Make the folder, which only its owner may read.

    A line that a crash or a full disk cut off is ended, so that the next answer does not continue it.

    Raises:
        CheckpointError: as `append_answers`.
    """
    with storage_errors(f"answers to {folder}", _KEPT):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for path in folder.glob("*.jsonl"):
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:
                    file.write("\n")


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Add `answers` to a JSONL file in one write.

    Raises:
        CheckpointError: the file system refuses, for example because it is full.
    """
    lines = [json.dumps(asdict(answer)) + "\n" for answer in answers]
    with storage_errors(f"answers to {path}", _KEPT):
        path.touch(0o600)
    with storage_errors(f"answers to {path}", _KEPT), path.open("a", encoding="utf-8") as file:
        # One write: a crash cuts off the last line at most, never one in the middle.
        file.write("".join(lines))


def read_answers(folder: Path) -> Iterator[Answer]:
    """All answers in the *.jsonl of `folder`; a line that a crash cut off is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue
            if answer.is_valid:
                yield answer


def select_answers(answers: Iterable[Answer], clients: Sequence[int], instances: Sequence[Instance]) -> list[Answer]:
    """The answers of `clients` to `instances`, each once."""
    wanted = keys_of(clients, instances)
    selected: dict[AnswerKey, Answer] = {}
    for answer in answers:
        if answer.key in wanted:
            selected[answer.key] = answer
    return list(selected.values())


def keys_of(clients: Iterable[int], instances: Sequence[Instance]) -> set[AnswerKey]:
    """Keys of one answer by each of `clients` to each of `instances`."""
    keys = set()
    for client in clients:
        for instance in instances:
            keys.add(instance.key_for(client))
    return keys
