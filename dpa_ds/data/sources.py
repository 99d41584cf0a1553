"""Where the clients' examples come from: the authors' JSON layout, or one table divided into clients.

A client's training rows are read by the ranks that host it only (with `format: feddpa` no other training file is opened),
but for an evaluation of what was held out, which reads all. Every fault of a file is a DataError that names file and row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.partition import partition_by_column, partition_dirichlet, partition_iid
from dpa_ds.data.tables import Row, read_rows, read_table, reading
from dpa_ds.errors import ConfigError, DataError

# Second word of the seed, as in partition.py: the split of held-out examples has its own random stream.
_HELD_OUT_TAG = 103

NO_TASK = "all"
"""The one task of data that names none."""


@dataclass(frozen=True)
class Example:
    """One instruction and its answer, both not empty; `task` is "" where the data names none."""

    instruction: str
    output: str
    task: str


@dataclass(frozen=True)
class ClientData:
    """What one client trains on, and what it is scored on (may be empty)."""

    client_id: int
    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(frozen=True)
class ClientInfo:
    """A client as the report names it."""

    client: int
    label: str
    own_tasks: tuple[str, ...]
    """Tasks that it trained on."""


def list_clients(config: DataConfig, seed: int) -> list[str]:
    """Names of the clients; the position in the list is the client id.

    `feddpa` looks at file names only; `table` reads the data and partitions it. Raises DataError, or ConfigError
    where the partition is not fully specified.
    """
    if config.format == "feddpa":
        return [f"client_{k}" for k in range(len(_feddpa_files(config)))]
    return list(_partition(read_table(config.path), config, seed))


def read_client(config: DataConfig, seed: int, client_id: int) -> ClientData:
    """Training and held-out examples of one client; see `read_clients`."""
    return read_clients(config, seed, [client_id])[0]


def read_clients(config: DataConfig, seed: int, client_ids: Sequence[int]) -> list[ClientData]:
    """Examples of the given clients, in that order; shared files (table, test file) are read once.

    Held out are `held_out_fraction` of the client's own examples, which then are not trained on; where that is 0, the
    test rows of a task that the client trains on (all of them where tasks are not named). Raises DataError.
    """
    test = _read_test_examples(config) if config.held_out_fraction == 0 else None
    clients = []
    for client_id, (name, origin, rows) in zip(client_ids, _rows_of_clients(config, seed, client_ids), strict=True):
        examples = tuple(_to_example(row, config) for row in rows)
        if not examples:
            raise DataError(f"{name} ({origin}) has no training examples: add some, or take the client out")
        if test is None:
            train, held_out = _split_held_out(examples, config.held_out_fraction, [seed, _HELD_OUT_TAG, client_id])
        else:
            train, held_out = examples, _of_tasks(test, {example.task for example in examples})
        clients.append(ClientData(client_id, name, train, held_out))
    return clients


def read_test_rows(config: DataConfig, seed: int, split: Literal["test", "held_out"]) -> list[Example]:
    """What all clients are scored on: the test file, or the examples that they hold out of their training data.

    Raises DataError where there are none.
    """
    if split == "test":
        test = _read_test_examples(config)
        if test is None:
            place = f" (*.jsonl) in {config.path}" if config.format == "feddpa" else ""
            raise DataError(f"there is no test file{place}: set data.test_path, or evaluation.split held_out")
        return list(test)
    if config.held_out_fraction == 0:
        raise DataError("evaluation.split held_out needs a run that was trained with data.held_out_fraction above 0")
    everyone = range(len(list_clients(config, seed)))
    return [example for client in read_clients(config, seed, everyone) for example in client.held_out]


def pool_clients(clients: Sequence[ClientData]) -> ClientData:
    """All clients as one, for the centralized baseline: training examples joined, a shared test row counted once."""
    train = tuple(example for client in clients for example in client.train)
    # The union of multisets: a test row that several clients hold out is one row, a row given twice stays two.
    held_out: Counter[Example] = Counter()
    for client in clients:
        held_out |= Counter(client.held_out)
    return ClientData(0, "centralized", train, tuple(held_out.elements()))


def _to_example(row: Row, config: DataConfig) -> Example:
    instruction = row.text(config.instruction_column)
    output = row.text(config.output_column)
    for column, value in ((config.instruction_column, instruction), (config.output_column, output)):
        if not value.strip():
            raise DataError(f"{row.place}: column {column!r} is empty: fill it in, or remove the row")
    further = row.optional_text(config.input_column) if config.input_column else ""
    named = config.task_column is not None and config.task_column in row.values
    task = row.optional_text(config.task_column) if named and config.task_column else ""
    return Example(f"{instruction}\n{further}" if further else instruction, output, task)


def _rows_of_clients(config: DataConfig, seed: int, client_ids: Sequence[int]) -> Iterator[tuple[str, str, list[Row]]]:
    """Name, origin (for messages) and rows of each client."""
    if config.format == "feddpa":
        files = _feddpa_files(config)
        for client_id in client_ids:
            yield f"client_{client_id}", str(files[client_id]), read_rows(files[client_id])
    else:
        rows = read_table(config.path)
        parts = list(_partition(rows, config, seed).items())
        for client_id in client_ids:
            name, chosen = parts[client_id]
            yield name, config.path, [rows[number] for number in chosen]


def _partition(rows: Sequence[Row], config: DataConfig, seed: int) -> dict[str, list[int]]:
    """Client name -> its row numbers."""
    kind, column, num_clients = config.partition.kind, config.partition.column, config.partition.num_clients
    if column is None and kind != "iid":
        raise ConfigError(f"data.partition.kind {kind} needs data.partition.column: name a column of {config.path}")
    values = [row.text(column) for row in rows] if column is not None and kind != "iid" else []
    if kind == "column":
        return partition_by_column(values)
    if num_clients is None:
        raise ConfigError(f"data.partition.kind {kind} needs data.partition.num_clients: give a number >= 1")
    if kind == "iid":
        parts = partition_iid(len(rows), num_clients, seed)
    else:
        parts = partition_dirichlet(values, num_clients, config.partition.concentration, seed)
    return {f"client_{k}": part for k, part in enumerate(parts)}


def _feddpa_files(config: DataConfig) -> list[Path]:
    """<path>/<C>/local_training_<k>.json for k = 0..C-1, all of them there."""
    root = Path(config.path)
    with reading(root):
        folders = {int(p.name): p for p in root.iterdir() if p.name.isascii() and p.name.isdigit() and p.is_dir()}
        wanted = [config.num_clients] if config.num_clients is not None else sorted(folders)
        if len(wanted) != 1 or wanted[0] not in folders:
            raise DataError(
                f"{root}: folders named after their number of clients: {sorted(folders) or 'none'}, wanted: "
                f"{config.num_clients or 'the only one'}: set data.num_clients to one of them, or correct data.path"
            )
        folder = folders[wanted[0]]
        found = {p.name for p in folder.iterdir() if p.match("local_training_*.json")}
    expected = [f"local_training_{k}.json" for k in range(wanted[0])]
    missing, surplus = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or surplus or not expected:
        raise DataError(
            f"{folder}: must hold exactly local_training_0 to {wanted[0] - 1}.json; missing: {missing}, surplus: "
            f"{surplus}: name the folder after its number of clients and number the files without gaps"
        )
    return [folder / name for name in expected]


def _read_test_examples(config: DataConfig) -> tuple[Example, ...] | None:
    """Examples of the test file; None where there is none."""
    path = config.test_path
    if path is None and config.format == "feddpa":
        with reading(Path(config.path)):
            candidates = sorted(p for p in Path(config.path).iterdir() if p.suffix == ".jsonl")
        if len(candidates) > 1:
            names = ", ".join(p.name for p in candidates)
            raise DataError(f"{config.path}: several test files ({names}): name one in data.test_path")
        path = str(candidates[0]) if candidates else None
    return None if path is None else tuple(_to_example(row, config) for row in read_table(path))


def _of_tasks(test: Sequence[Example], tasks: set[str]) -> tuple[Example, ...]:
    return tuple(e for e in test if e.task in tasks or e.task == "" or "" in tasks)


def _split_held_out(
    examples: tuple[Example, ...], fraction: float, seed: Sequence[int]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, held out), both in the order of the file; at least one example stays in train."""
    wanted = max(1, round(fraction * len(examples))) if fraction > 0 else 0
    order = np.random.Generator(np.random.PCG64(list(seed))).permutation(len(examples))
    chosen = set(order[: min(wanted, len(examples) - 1)].tolist())
    train = tuple(e for row, e in enumerate(examples) if row not in chosen)
    return train, tuple(e for row, e in enumerate(examples) if row in chosen)
