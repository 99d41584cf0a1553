"""What an evaluation is made of: test instances, the clients' answers to them, and the file that keeps the answers."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dpa_ds.errors import storage_errors

_KEPT = "those written so far are kept: make room, then run the same command again"


@dataclass(frozen=True)
class Instance:
    """One test instance."""

    task: str
    row: int
    """Position among the rows of the task in the test file, from 0."""
    instruction: str
    reference: str
    """The right answer."""


@dataclass(frozen=True)
class Answer:
    """What one client's model said to one instance."""

    client: int
    task: str
    row: int
    alpha: float
    """Weight of the local adapter, in [0, 1]."""
    text: str

    @property
    def key(self) -> tuple[int, str, int]:
        """Which question this answers."""
        return self.client, self.task, self.row

    @property
    def is_valid(self) -> bool:
        """False for what a damaged file gives."""
        has_numbers = isinstance(self.client, int) and isinstance(self.row, int) and isinstance(self.alpha, int | float)
        return has_numbers and 0 <= self.alpha <= 1 and isinstance(self.task, str) and isinstance(self.text, str)


def append_answers(path: Path, answers: list[Answer]) -> None:
    """Add `answers` to a JSONL file in one write.

    Raises:
        CheckpointError: the file system refuses, for example because it is full.
    """
    with storage_errors(f"answers to {path}", _KEPT), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))


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
    """Those of `clients` to `instances`, each once."""
    wanted = {(client, instance.task, instance.row) for client in clients for instance in instances}
    return list({answer.key: answer for answer in answers if answer.key in wanted}.values())


def prepare_answers(folder: Path) -> None:
    """Make the folder; end a line that a crash or a full disk cut off, so that the next answer does not continue it.

    Raises:
        CheckpointError: as `append_answers`.
    """
    with storage_errors(f"answers to {folder}", _KEPT):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.jsonl"):
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                with path.open("a") as file:
                    file.write("\n")
