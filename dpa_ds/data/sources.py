"""Where the clients' examples come from: the authors' JSON layout, or one table divided into clients.

Only the ranks that host a client read its training rows (with `format: feddpa`, and with a file for each client, they
open no other training file). The exception is an evaluation of what was held out, which reads all. No examples are
kept: each is made of its row when it is asked for. A faulty file raises DataError with file and row.
"""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from dpa_ds.config.paths import has_client_files
from dpa_ds.config.schema import DataConfig
from dpa_ds.data.arrow_files import is_saved_dataset
from dpa_ds.data.conversations import (
    ASSISTANT,
    Conversation,
    Question,
    has_conversation,
    read_answered,
    read_conversation,
)
from dpa_ds.data.layouts import Layout, find_client_names, path_of_client
from dpa_ds.data.lazy import Joined, Lazy, Selected
from dpa_ds.data.partition import Labels, RowNumbers, partition_by_column, partition_dirichlet, partition_iid
from dpa_ds.data.quality import DataQuality, Digests, assess
from dpa_ds.data.tables import Row, read_rows, read_table, reading
from dpa_ds.errors import ConfigError, DataError

# Second word of the seed, as in partition.py: the split of held-out examples has its own random stream.
_HELD_OUT_TAG = 103

# Control characters, half of a surrogate pair, separators of lines and of paragraphs, and what turns the direction of
# writing: as the name of a task they could write another line, or another message, into terminals and logs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\\\\]")

TEXT_COLUMN = "text"
"""Column of plain texts, of which every token is trained on, in data that has neither instructions nor turns."""

_ANSWER_COLUMNS = {"label", "labels", "answer", "answers", "response", "target", "targets", "summary", "completion"}
"""Beside a text they are what is to be learned: data sets for classification and the like."""

NO_TASK = "all"
"""Name of the one task where the data names none."""


@dataclass(frozen=True)
class Example:
    """One instruction and its answer, a conversation, or a plain text; `task` is "" where the data names none."""

    instruction: str
    """What is asked; of a conversation what the user said last before the answer; "" for a plain text."""
    output: str
    """The answer, the last one of a conversation; or the plain text. Not empty."""
    task: str
    place: str = field(default="", compare=False)
    """File and row, for messages: a row that stands in two places is the same example."""
    conversation: Conversation | None = None
    """All turns up to the answer; None: the instruction is all that is said before."""

    @property
    def is_plain_text(self) -> bool:
        """Nothing is asked: every token is trained on."""
        return self.instruction == "" and self.conversation is None

    @property
    def question(self) -> Question:
        """What the answer is to."""
        conversation = self.conversation
        if conversation is not None:
            conversation = conversation.until(len(conversation.messages) - 1)
        return Question(self.instruction, conversation, self.place)


class Examples(Lazy[Example]):
    """Examples of rows that were found to be good, each made when it is asked for; their tasks are known."""

    def __init__(
        self, rows: Sequence[Row], from_row: Callable[[Row], Example], tasks: Labels, digests: Digests
    ) -> None:
        self._rows = rows
        self._from_row = from_row
        self.tasks = tasks
        """Task of each example."""
        self.digests = digests
        """Of the texts of each example, to find equal ones."""

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, index: int) -> Example:
        """Example `index`."""
        return self._from_row(self._rows[index])

    def select(self, numbers: npt.NDArray[np.int64]) -> "Examples":
        """Some of them."""
        tasks = Labels(self.tasks.codes[numbers], self.tasks.names)
        return Examples(Selected(self._rows, numbers), self._from_row, tasks, self.digests[numbers])

    def release(self) -> None:
        """Close the rows' files."""
        if isinstance(self._rows, Lazy):
            self._rows.release()


@dataclass(frozen=True)
class ClientData:
    """The examples that one client trains on, and those that it is scored on, which may be none."""

    client_id: int
    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    has_unread_input: bool = False
    """Some row has an `input`, as instruction data often has, and the recipe names no column for it."""
    quality: DataQuality | None = field(default=None, compare=False)
    """What was noticed about the rows; None: nobody looked."""


@dataclass(frozen=True)
class ClientInfo:
    """A client as the report names it."""

    client: int
    label: str
    own_tasks: tuple[str, ...]
    """Tasks that the client trained on."""


def printable(name: str) -> str:
    """The name of a task or client as it is used from here on: one line, two different names stay different."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), name)


def list_clients(config: DataConfig, seed: int) -> list[str]:
    """Names of the clients; the position in the list is the client id.

    With `format: feddpa`, and with a file for each client, only file names are looked at; another `table` is read and
    partitioned. Raises DataError, or ConfigError where the partition is not fully specified.
    """
    if config.format == "feddpa":
        return [f"client_{k}" for k in range(len(_feddpa_files(config)))]
    if has_client_files(config.path):
        return [printable(name) for name in _file_names_of_clients(config)]
    return list(_partition(_read_table(config), config, seed))


def read_client(config: DataConfig, seed: int, client_id: int) -> ClientData:
    """Training and held-out examples of one client, as `read_clients` reads them."""
    return read_clients(config, seed, [client_id])[0]


def read_clients(config: DataConfig, seed: int, client_ids: Sequence[int]) -> list[ClientData]:
    """Examples of the given clients, in that order; shared files (table, test file) are read once.

    Held out are `held_out_fraction` of the client's own examples, which then are not trained on; where that is 0, the
    test rows of a task that the client trains on (all of them where tasks are not named). Raises DataError.
    """
    test = None
    # Beside held-out examples a test file that the recipe names is read to find its rows in the training data.
    is_wanted = config.held_out_fraction == 0 or config.test_path is not None
    if is_wanted and not has_client_files(config.test_path):
        test = _read_test(config)
    clients = []
    for source in _read_client_rows(config, seed, client_ids):
        examples, unread = _to_examples(source.rows, config, source.own_task)
        if not examples:
            raise DataError(
                f"{source.name} ({source.origin}) has no training examples: add some, or take the client out"
            )
        own_test = test
        if source.test_path is not None:
            own_test, _ = _to_examples(read_table(source.test_path, _test_layout(config)), config, source.own_task)
        if config.held_out_fraction > 0 or own_test is None:
            split_seed = [seed, _HELD_OUT_TAG, source.client_id]
            train, held_out = _split_held_out(examples, config.held_out_fraction, split_seed)
        elif source.test_path is not None:
            train, held_out = examples, own_test
        else:
            train, held_out = examples, _of_tasks(own_test, tasks_of(examples))
        scored = held_out.digests if own_test is None else np.concatenate([held_out.digests, own_test.digests])
        quality = assess(train.digests, np.unique(scored), partial(_place_of, train))
        clients.append(ClientData(source.client_id, source.name, train, held_out, unread, quality))
    return clients


def read_test_rows(config: DataConfig, seed: int, split: Literal["test", "held_out"]) -> Sequence[Example]:
    """Examples that all clients are scored on: the test file's, or those held out of the clients' training data.

    Raises DataError where there are none.
    """
    if split == "test":
        test = read_test_examples(config)
        if test is None:
            place = f" (*.jsonl) in {config.path}" if config.format == "feddpa" else ""
            raise DataError(f"there is no test file{place}: set data.test_path, or evaluation.split held_out")
        return test
    if config.held_out_fraction == 0:
        raise DataError("evaluation.split held_out needs a run that was trained with data.held_out_fraction above 0")
    all_clients = range(len(list_clients(config, seed)))
    return Joined([client.held_out for client in read_clients(config, seed, all_clients)])


def read_test_examples(config: DataConfig) -> Sequence[Example] | None:
    """Examples of the test data, of all clients; None where there are none."""
    if not has_client_files(config.test_path):
        return _read_test(config)
    assert config.test_path is not None
    parts = []
    for name in _file_names_of_clients(config):
        path = path_of_client(config.test_path, name)
        if config.clients is not None and not Path(path).exists():
            raise DataError(
                f"{path}: no such file or folder: data.clients says that the test rows of {name} are on its own host: "
                "score where all of them are, or give one data.test_path without {client}"
            )
        parts.append(_to_examples(read_table(path, _test_layout(config)), config, _own_task(config, name))[0])
    return Joined(parts)


def tasks_of(examples: Sequence[Example]) -> set[str]:
    """Their different tasks; "" is among them where an example has none."""
    if isinstance(examples, Examples):
        return {examples.tasks.names[code] for code in np.unique(examples.tasks.codes)}
    return {example.task for example in examples}


def read_instruction(row: Row, config: DataConfig) -> str:
    """What a row asks: its instruction, and after a line break its further input where it has some.

    Every program asks by this function, and puts `data.template` around what it returns.

    Raises:
        DataError: the row has no such column, or its instruction is empty.
    """
    instruction = _filled(row, config.instruction_column, "set data.instruction_column to one of them")
    if config.input_column is None:
        return instruction
    remedy = "set data.input_column to one of them, or to null where there is none"
    further = row.optional_text(config.input_column, remedy)
    return f"{instruction}\n{further}" if further else instruction


def read_question(row: Row, config: DataConfig) -> Question:
    """What a row asks, without its answer if it has one: an instruction, or a conversation up to the last question.

    Raises:
        DataError: it asks nothing.
    """
    is_asked = has_conversation(row) or row.values.get("prompt") is not None
    if row.values.get(config.instruction_column) is not None or not is_asked:
        return Question(read_instruction(row, config), None, row.place)
    conversation = read_conversation(row)
    if conversation.messages[-1].role == ASSISTANT:
        conversation = conversation.until(len(conversation.messages) - 1)
    if not conversation.messages:
        raise DataError(f"{row.place}: a conversation that asks nothing: add a turn of the user, or remove the row")
    return Question(conversation.last_question, conversation, row.place)


def pool_clients(clients: Sequence[ClientData]) -> ClientData:
    """All clients as one, for the centralized baseline: training examples joined, a shared test row counted once."""
    train = Joined([client.train for client in clients])
    held_out = Joined([client.held_out for client in clients])
    numbers = _union([client.held_out for client in clients])
    unread = any(client.has_unread_input for client in clients)
    scored = np.unique(digests_of(held_out))
    quality = assess(digests_of(train), scored, partial(_place_of, train))
    return ClientData(0, "centralized", train, Selected(held_out, numbers), unread, quality)


def _place_of(examples: Sequence[Example], number: int) -> str:
    return examples[number].place


def _union(parts: Sequence[Sequence[Example]]) -> npt.NDArray[np.int64]:
    """Numbers, in all parts together, of the union of multisets: what several parts have is there once, what one part
    has twice stays two. Equal examples follow one another."""
    counts: dict[bytes, int] = {}  # how often each is in the union
    order: dict[bytes, int] = {}  # which of the different examples it is, by first appearance
    chosen = array("q")
    positions = array("q")
    number = 0
    for part in parts:
        in_part: dict[bytes, int] = {}
        for example in part:
            key = _digest(replace(example, place=""), _ALL_FIELDS)
            in_part[key] = in_part.get(key, 0) + 1
            order.setdefault(key, len(order))
            if in_part[key] > counts.get(key, 0):
                counts[key] = in_part[key]
                chosen.append(number)
                positions.append(order[key])
            number += 1
    sorted_by_example = np.argsort(np.array(positions, dtype=np.int64), kind="stable")
    return np.array(chosen, dtype=np.int64)[sorted_by_example]


def _digest(example: Example, names: Sequence[str]) -> bytes:
    """Sixteen bytes that tell the contents of these fields apart."""
    content = repr([getattr(example, name) for name in names])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


_ALL_FIELDS = tuple(part.name for part in fields(Example))
_TEXT_FIELDS = tuple(name for name in _ALL_FIELDS if name not in ("task", "place"))


def digests_of(examples: Sequence[Example]) -> Digests:
    """A number for the texts of each example; of `Examples` they are known."""
    if isinstance(examples, Examples):
        return examples.digests
    found = array("Q")
    for example in examples:
        found.append(int.from_bytes(_digest(example, _TEXT_FIELDS)[:8], "little"))
    return np.array(found, dtype=np.uint64)


def _is_unread_input(row: Row, config: DataConfig) -> bool:
    if config.input_column is not None or "input" in (config.instruction_column, config.output_column):
        return False
    if config.instruction_column not in row.values:  # a conversation or a plain text
        return False
    return isinstance(row.values.get("input"), str) and bool(row.optional_text("input").strip())


def _to_examples(rows: Sequence[Row], config: DataConfig, own_task: str = "") -> tuple[Examples, bool]:
    """Examples of the rows, each of which is looked at once, and whether some row has an input that no prompt has.

    Args:
        own_task: task of rows that name none.
    """
    task_column = _find_task_column(rows, config)
    from_row = partial(_to_example, config=config, task_column=task_column)
    if task_column is None and own_task:
        from_row = partial(_to_example_of_task, config=config, task=own_task)
    digests = array("Q")
    has_unread_input = False

    def tasks() -> Iterator[str]:
        nonlocal has_unread_input
        for row in rows:
            example = from_row(row)
            digests.append(int.from_bytes(_digest(example, _TEXT_FIELDS)[:8], "little"))
            has_unread_input = has_unread_input or _is_unread_input(row, config)
            yield example.task

    labels = Labels.of(tasks())
    return Examples(rows, from_row, labels, np.array(digests, dtype=np.uint64)), has_unread_input


def _to_example_of_task(row: Row, config: DataConfig, task: str) -> Example:
    return replace(_to_example(row, config, None), task=task)


def _find_task_column(rows: Sequence[Row], config: DataConfig) -> str | None:
    """The column that names the task of these rows; None: they name none.

    Where rows are divided into clients by a column and name no task, a client's rows are its task.
    """
    column = config.task_column
    if column is not None and any(column in row.values for row in rows):
        return column
    # The default may be missing: data need not name tasks. Another one was written for a reason.
    if column not in (None, DataConfig.task_column):
        _require_column(rows, column, "data.task_column", ", or to null for data without tasks")
    if config.format == "table" and config.partition.kind == "column":
        return config.partition.column
    return None


def _require_column(rows: Sequence[Row], column: str, field: str, otherwise: str = "") -> None:
    """Raise DataError where there are rows, and none has the column that `field` of the recipe names."""
    if rows and all(column not in row.values for row in rows):
        raise DataError(
            f"{rows[0].place}: neither this row nor one after it has the column {column!r}; columns are "
            f"{rows[0].list_columns()}: set {field} to one of them{otherwise}"
        )


def _to_example(row: Row, config: DataConfig, task_column: str | None) -> Example:
    task = ""
    # A missing input column is an error, a missing task column is not: it has a default, and data may name no task.
    if task_column is not None and task_column in row.values:
        task = printable(row.optional_text(task_column))
    # In a table of several kinds of rows the columns of the other kinds are null.
    if row.values.get(config.instruction_column) is None:
        if has_conversation(row):
            conversation = read_answered(row)
            asked = conversation.until(len(conversation.messages) - 1).last_question
            return Example(asked, conversation.messages[-1].content, task, row.place, conversation)
        if config.instruction_column not in row.values and TEXT_COLUMN in row.values:
            return Example("", _read_plain_text(row, config), task, row.place)
    instruction = read_instruction(row, config)
    output = _filled(row, config.output_column, "set data.output_column to one of them")
    return Example(instruction, output, task, row.place)


def _read_plain_text(row: Row, config: DataConfig) -> str:
    """The text of a row that has neither an instruction nor turns.

    Raises:
        DataError: it is empty, or the row has an answer to it: then it is no plain text.
    """
    answers = sorted((_ANSWER_COLUMNS | {config.output_column}) & row.values.keys())
    if answers:
        raise DataError(
            f"{row.place}: has the column {TEXT_COLUMN!r}, and an answer to it in {answers[0]!r}: set "
            f"data.instruction_column {TEXT_COLUMN} and data.output_column {answers[0]}, or take {answers[0]!r} out to "
            "train on every token of the text"
        )
    return _filled(row, TEXT_COLUMN, "")


def _filled(row: Row, column: str, remedy: str) -> str:
    """The cell as text. Raises DataError where it is empty or null."""
    text = row.optional_text(column, remedy)
    if not text.strip():
        raise DataError(f"{row.place}: column {column!r} is empty: fill it in, or remove the row")
    return text


@dataclass(frozen=True)
class _ClientRows:
    """The rows of one client's training data, not yet looked at."""

    client_id: int
    name: str
    origin: str
    """Path that a message names."""
    rows: Sequence[Row]
    own_task: str = ""
    """Of rows that name none."""
    test_path: str | None = None
    """Of test rows that are this client's alone."""


def _read_client_rows(config: DataConfig, seed: int, client_ids: Sequence[int]) -> Iterator[_ClientRows]:
    if config.format == "feddpa":
        files = _feddpa_files(config)
        for client_id in client_ids:
            path = files[client_id]
            yield _ClientRows(client_id, f"client_{client_id}", str(path), read_rows(path, _train_layout(config)))
    elif has_client_files(config.path):
        names = _file_names_of_clients(config)
        for client_id in client_ids:
            name = names[client_id]
            origin = path_of_client(config.path, name)
            rows = read_rows(origin, _train_layout(config))
            test_path = None
            if config.test_path is not None and has_client_files(config.test_path):
                test_path = path_of_client(config.test_path, name)
            yield _ClientRows(client_id, printable(name), origin, rows, _own_task(config, name), test_path)
    else:
        table = _read_table(config)
        parts = list(_partition(table, config, seed).items())
        for client_id in client_ids:
            name, row_numbers = parts[client_id]
            yield _ClientRows(client_id, name, config.path, Selected(table, row_numbers))


def _file_names_of_clients(config: DataConfig) -> list[str]:
    """What stands for {client} in the path of each client."""
    return config.clients or find_client_names(config.path)


def _own_task(config: DataConfig, name: str) -> str:
    """Task of a client's rows that name none, where it has files of its own: the client, as with a column of clients.

    None where test rows are shared: they would name no client, and be of another task.
    """
    is_shared = config.test_path is not None and not has_client_files(config.test_path)
    return "" if is_shared else printable(name)


def _train_layout(config: DataConfig) -> Layout:
    return Layout(config.split, "data.split", config.field)


def _test_layout(config: DataConfig) -> Layout:
    return Layout(config.test_split, "data.test_split", config.field)


def _read_table(config: DataConfig) -> Lazy[Row]:
    root = Path(config.path)
    with reading(root):
        if root.is_dir() and not is_saved_dataset(root) and any(root.glob("*/local_training_*.json")):
            raise DataError(
                f"{root}: has the layout of data.format feddpa, not that of a table: set data.format feddpa"
            )
    return read_table(root, _train_layout(config))


def _partition(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, RowNumbers]:
    """Row numbers of each client, by the client's name."""
    partition = config.partition
    kind = partition.kind
    labels = Labels.of([])
    if kind != "iid":
        if partition.column is None:
            raise ConfigError(f"data.partition.kind {kind} needs data.partition.column: name a column of {config.path}")
        remedy = "set data.partition.column to one of them"
        labels = Labels.of(row.text(partition.column, remedy) for row in rows)
    elif partition.column is not None:  # of no use, but not there either: a slip
        _require_column(rows, partition.column, "data.partition.column", ", or to null: iid needs none")
    if kind == "column":
        return {printable(name): part for name, part in partition_by_column(labels).items()}
    if partition.num_clients is None:
        raise ConfigError(f"data.partition.kind {kind} needs data.partition.num_clients: give a number >= 1")
    if kind == "iid":
        parts = partition_iid(len(rows), partition.num_clients, seed)
    else:
        parts = partition_dirichlet(labels, partition.num_clients, partition.concentration, seed)
    return {f"client_{k}": part for k, part in enumerate(parts)}


def _feddpa_files(config: DataConfig) -> list[Path]:
    """<path>/<C>/local_training_<k>.json for k = 0..C-1, all of them there."""
    root = Path(config.path)
    with reading(root):
        if root.is_file() or is_saved_dataset(root):
            raise DataError(
                f"{root}: is a file or a data set, and data.format feddpa is a folder with "
                "<C>/local_training_<k>.json: give that folder, or set data.format table and data.partition for one "
                "table"
            )
        folder = _feddpa_folder(root, config.num_clients)
        # Not glob: it passes over a folder that may not be read.
        found = {path.name for path in folder.iterdir() if path.match("local_training_*.json")}
    num_clients = int(folder.name)
    expected = [f"local_training_{k}.json" for k in range(num_clients)]
    missing = sorted(set(expected) - found)
    surplus = sorted(found - set(expected))
    if missing or surplus or not expected:
        raise DataError(
            f"{folder}: must hold exactly local_training_0 to {num_clients - 1}.json; missing: {missing}, surplus: "
            f"{surplus}: name the folder after its number of clients and number the files without gaps"
        )
    return [folder / name for name in expected]


def _feddpa_folder(root: Path, num_clients: int | None) -> Path:
    """The folder in `root` that is named after its number of clients: `num_clients`, or the only such folder."""
    folders = {}
    for path in root.iterdir():
        # isdigit() alone also holds for superscripts, which int() refuses.
        if path.name.isascii() and path.name.isdigit() and path.is_dir():
            folders[int(path.name)] = path
    wanted = sorted(folders) if num_clients is None else [num_clients]
    if len(wanted) != 1 or wanted[0] not in folders:
        raise DataError(
            f"{root}: folders named after their number of clients: {sorted(folders) or 'none'}, wanted: "
            f"{num_clients or 'the only one'}: set data.num_clients to one of them, or correct data.path"
        )
    return folders[wanted[0]]


def _feddpa_test_file(root: str) -> str | None:
    with reading(Path(root)):
        candidates = sorted(path for path in Path(root).iterdir() if path.suffix == ".jsonl")
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise DataError(f"{root}: several test files ({names}): name one in data.test_path")
    return str(candidates[0]) if candidates else None


def _read_test(config: DataConfig) -> Examples | None:
    """Examples of the test data that all clients share; None where there is none."""
    path = config.test_path
    if path is None and config.format == "feddpa":
        path = _feddpa_test_file(config.path)
    if path is None:
        return None
    return _to_examples(read_table(path, _test_layout(config)), config)[0]


def _of_tasks(test: Examples, tasks: Set[str]) -> Examples:
    """Test rows of one of `tasks`. An example without a task, here or there, belongs to every task."""
    if "" in tasks:
        return test
    codes = [code for code, name in enumerate(test.tasks.names) if name in tasks or name == ""]
    return test.select(np.flatnonzero(np.isin(test.tasks.codes, codes)))


def _split_held_out(examples: Examples, fraction: float, seed: Sequence[int]) -> tuple[Examples, Examples]:
    """(train, held out), both in the order of the file; at least one example stays in train."""
    num_held_out = 0
    if fraction > 0:
        num_held_out = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    order = np.random.Generator(np.random.PCG64(list(seed))).permutation(len(examples))
    is_held_out = np.zeros(len(examples), dtype=bool)
    is_held_out[order[:num_held_out]] = True
    return examples.select(np.flatnonzero(~is_held_out)), examples.select(np.flatnonzero(is_held_out))
