"""Every format gives the same clients, and every bad input one message with place and remedy."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_ds.config import DataConfig, PartitionConfig
from dpa_ds.data.sources import (
    ClientData,
    Example,
    list_clients,
    pool_clients,
    read_client,
    read_clients,
    read_table,
)
from dpa_ds.errors import ConfigError, DataError

AUTHORS_DATA = Path(__file__).parents[2].parent / "shared" / "data" / "feddpa" / "dataset1"

ROWS = [{"instruction": f"ask {n}", "output": f"say {n}", "category": "ab"[n % 2]} for n in range(6)]


def write_feddpa(root: Path, rows_of_clients: list[list[dict[str, Any]]], test: list[dict[str, Any]] | None) -> Path:
    folder = root / str(len(rows_of_clients))
    folder.mkdir(parents=True)
    for k, rows in enumerate(rows_of_clients):
        (folder / f"local_training_{k}.json").write_text(json.dumps(rows))
    if test is not None:
        (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return root


def feddpa_of_two(root: Path) -> Path:
    return write_feddpa(root, [ROWS[0::2], ROWS[1::2]], [{**row, "output": "held"} for row in ROWS[:3]])


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)


def write_saved_splits(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "bom.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8-sig"),
    "rows.jsonl": lambda path, rows: path.write_text("\n\r\n".join(map(json.dumps, rows)) + "\n\n"),
    "lines.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_saved,
    "splits": write_saved_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [*ROWS, {"instruction": 'a,"b"\nc\u2028d', "output": "\u00e9 \u4e2d {x}", "category": "a"}]
    WRITERS[name](tmp_path / name, rows)
    read = read_table(tmp_path / name)
    assert [row.values for row in read] == rows
    assert all(row.place.startswith(str(tmp_path / name)) for row in read)


# Text as it may stand in a data file: no lone surrogates, no NUL.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(texts, texts, min_size=1, max_size=3), min_size=1, max_size=5), ascii=st.booleans()
)
def test_json_and_jsonl_return_what_was_written(tmp_path: Path, rows: list[dict[str, str]], ascii: bool) -> None:
    array, lines = tmp_path / "x.json", tmp_path / "x.jsonl"
    array.write_text(json.dumps(rows, ensure_ascii=ascii), encoding="utf-8", newline="")
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows), encoding="utf-8", newline="")
    assert [row.values for row in read_table(array)] == rows
    assert [row.values for row in read_table(lines)] == rows


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_damaged_files_end_in_a_data_error_or_in_rows(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    try:
        assert read_table(path)
    except DataError as error:
        assert str(error).startswith(str(path))


GOOD = b'{"instruction": "i", "output": "o"}\n'
BAD_TABLES = [
    ("empty.json", b"", r"is empty: no rows"),
    ("empty.jsonl", b"\n \n", r"is empty: no rows"),
    ("array.json", b"[]", r"is empty: no rows"),
    ("header.csv", b"instruction,output\n", r"is empty: no rows"),
    ("line3.jsonl", GOOD * 2 + b'{"instruction": \n', r"line3.jsonl:3: not JSON \(Expecting value, column"),
    ("line3.json", b'[\n{"instruction": "i",\n oops}]', r"line3.json:3: not JSON"),
    ("object.json", b'{\n"data": []\n}', r"object.json:1: not JSON.*one array of objects"),
    ("list.jsonl", GOOD + b"[1]\n", r"list.jsonl:2: expected an object with named columns, got list"),
    ("text.json", b'["a"]', r"text.json: row 1: expected an object with named columns, got str"),
    ("latin.jsonl", GOOD * 2 + b'{"instruction": "caf\xe9"}', r"latin.jsonl:3: byte 0xe9 is not UTF-8"),
    ("bom.jsonl", b"\xef\xbb\xbf" + GOOD + b"\xff", r"bom.jsonl:2: byte 0xff is not UTF-8"),
    ("utf16.json", "[]".encode("utf-16"), r"utf16.json:1: byte 0xff is not UTF-8"),
    ("nul.jsonl", GOOD + b"\0\0\0", r"nul.jsonl:2: contains a NUL byte"),
    ("nul.csv", b"a,b\n1,\0\n", r"nul.csv:2: contains a NUL byte"),
    ("deep.json", b"[" * 100_000, r"deep.json:1: JSON that cannot be read"),
    ("digits.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"digits.jsonl:1: JSON that cannot be read"),
    ("short.csv", b"a,b\n1,2\n3\n", r"short.csv:3: 1 fields, but the header has 2"),
    ("quote.csv", b'a,b\n1,2\n"3,4\n', r"quote.csv:3: not CSV"),
    ("twice.csv", b"a,a\n1,2\n", r"twice.csv:1: a column name occurs twice"),
    ("bad.parquet", b"PAR1 not really", r"bad.parquet: not a readable parquet file"),
    ("empty.parquet", b"", r"empty.parquet: not a readable parquet file"),
    ("rows.txt", b"hello", r"unknown kind of file '.txt': use .json, .jsonl, .csv, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES, ids=[name for name, _, _ in BAD_TABLES])
def test_bad_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_missing_file_folder_without_data_and_damaged_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.json: no such file or folder: check data.path"):
        read_table(tmp_path / "x.json")
    with pytest.raises(DataError, match="folder without data"):
        read_table(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=str(tmp_path)):
        read_table(tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand, because root may read everything.
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.json").write_text("[]")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"x.json: no permission to read it"):
        read_table(tmp_path / "x.json")


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"no split 'train' among \['dev'\]"):
        read_table(tmp_path / "d")


def table(path: Path, **changes: Any) -> DataConfig:
    partition = PartitionConfig(kind="column", column="category")
    return replace(DataConfig(format="table", path=str(path), partition=partition), **changes)


BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    (
        "missing column",
        {"prompt": "p", "output": "o"},
        r"row 2: no column 'instruction'; columns are 'prompt', 'output'",
    ),
    ("null", {"instruction": "i", "output": None}, r"row 2: column 'output' must be text, got NoneType"),
    ("list", {"instruction": ["i"], "output": "o"}, r"row 2: column 'instruction' must be text, got list"),
    ("blank", {"instruction": " \n", "output": "o"}, r"row 2: column 'instruction' is empty"),
    ("no answer", {"instruction": "i", "output": ""}, r"row 2: column 'output' is empty"),
    ("surrogate", {"instruction": "\ud800", "output": "o"}, r"row 2: column 'instruction' has half a surrogate"),
    ("task", {"instruction": "i", "output": "o", "category": {}}, r"row 2: column 'category' must be text, got dict"),
]


@pytest.mark.parametrize(("row", "message"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_feddpa(tmp_path, [[ROWS[0], row]], None)
    with pytest.raises(DataError, match=message):
        read_client(DataConfig(path=str(tmp_path)), 0, 0)


def test_numbers_become_text_and_input_is_appended(tmp_path: Path) -> None:
    rows = [
        {"q": "add", "in": "1 2", "a": 3, "kind": 7},
        {"q": "negate", "in": "", "a": False, "kind": None},
        {"q": "half", "in": None, "a": 0.5},
    ]
    write_feddpa(tmp_path, [rows], None)
    names = {"instruction_column": "q", "input_column": "in", "output_column": "a", "task_column": "kind"}
    client = read_client(DataConfig(path=str(tmp_path), **names), 0, 0)
    assert client.train == (Example("add\n1 2", "3", "7"), Example("negate", "False", ""), Example("half", "0.5", ""))


def test_missing_input_column_is_an_error(tmp_path: Path) -> None:
    write_feddpa(tmp_path, [ROWS], None)
    with pytest.raises(DataError, match="no column 'context'"):
        read_client(DataConfig(path=str(tmp_path), input_column="context"), 0, 0)


def test_feddpa_client_is_scored_on_the_tasks_it_trains_on(tmp_path: Path) -> None:
    config = DataConfig(path=str(feddpa_of_two(tmp_path)))
    assert list_clients(config, 0) == ["client_0", "client_1"]
    client = read_client(config, 0, 1)
    assert (client.client_id, client.name) == (1, "client_1")
    assert client.train == tuple(Example(f"ask {n}", f"say {n}", "b") for n in (1, 3, 5))
    assert client.held_out == (Example("ask 1", "held", "b"),)


@pytest.mark.parametrize("task_column", [None, "absent"])
def test_without_tasks_every_test_row_is_held_out(tmp_path: Path, task_column: str | None) -> None:
    client = read_client(DataConfig(path=str(feddpa_of_two(tmp_path)), task_column=task_column), 0, 0)
    assert len(client.held_out) == 3
    assert {example.task for example in (*client.train, *client.held_out)} == {""}


def test_feddpa_opens_only_the_clients_own_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(feddpa_of_two(tmp_path)))
    opened: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    list_clients(config, 0)
    assert opened == []
    read_client(config, 0, 1)
    assert sorted(opened) == ["local_training_1.json", "test.jsonl"]


def test_feddpa_folder_and_test_file_are_chosen_or_asked_for(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path))
    with pytest.raises(DataError, match=r"number of clients: none, wanted: the only one"):
        list_clients(config, 0)
    feddpa_of_two(tmp_path)
    write_feddpa(tmp_path, [ROWS], None)
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match=r"\[1, 2\], wanted: the only one: set data.num_clients"):
        list_clients(config, 0)
    with pytest.raises(DataError, match=r"\[1, 2\], wanted: 3"):
        list_clients(replace(config, num_clients=3), 0)
    assert len(list_clients(replace(config, num_clients=2), 0)) == 2
    (tmp_path / "other.jsonl").write_text(json.dumps(ROWS[0]))
    one = replace(config, num_clients=1)
    with pytest.raises(DataError, match=r"several test files \(other.jsonl, test.jsonl\): name one in data.test_path"):
        read_client(one, 0, 0)
    assert len(read_client(replace(one, test_path=str(tmp_path / "other.jsonl")), 0, 0).held_out) == 1


def test_feddpa_training_files_must_be_complete(tmp_path: Path) -> None:
    folder = write_feddpa(tmp_path, [ROWS] * 3, None) / "3"
    (folder / "local_training_1.json").rename(folder / "local_training_3.json")
    with pytest.raises(DataError, match=r"missing: \['local_training_1.json'\], surplus: \['local_training_3.json'\]"):
        list_clients(DataConfig(path=str(tmp_path)), 0)
    with pytest.raises(DataError, match="no such file or folder"):
        list_clients(DataConfig(path=str(tmp_path / "absent")), 0)
    with pytest.raises(DataError, match="cannot be read"):
        list_clients(DataConfig(path=str(folder / "local_training_0.json")), 0)


@pytest.mark.parametrize("content", ["[]", ""])
def test_client_without_examples_is_named(tmp_path: Path, content: str) -> None:
    folder = feddpa_of_two(tmp_path) / "2"
    (folder / "local_training_1.json").write_text(content)
    config = DataConfig(path=str(tmp_path))
    assert read_client(config, 0, 0).train
    with pytest.raises(DataError, match=r"client_1 \(.*local_training_1.json\) has no training examples: add some"):
        read_client(config, 0, 1)


def test_table_by_column_uses_the_values_as_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ROWS)
    config = table(tmp_path / "t.csv")
    assert list_clients(config, 0) == ["a", "b"]
    clients = read_clients(config, 0, [1, 0])
    assert [client.name for client in clients] == ["b", "a"]
    assert [len(client.train) for client in clients] == [3, 3]
    assert clients[0] == read_client(config, 0, 1)
    assert clients[0].held_out == ()


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_table_by_chance_gives_every_row_to_one_client(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS * 5))
    config = table(tmp_path / "t.json", partition=PartitionConfig(kind, "category", 3))
    assert list_clients(config, 4) == ["client_0", "client_1", "client_2"]
    train = [e for client in read_clients(config, 4, range(3)) for e in client.train]
    assert sorted(e.instruction for e in train) == sorted(row["instruction"] for row in ROWS * 5)
    assert read_client(config, 4, 0) != read_client(config, 5, 0)


def test_table_test_file_is_divided_by_task(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    config = table(tmp_path / "t.json", test_path=str(tmp_path / "held.jsonl"), held_out_fraction=0.5)
    a, b = read_clients(config, 0, [0, 1])
    # With a test file no training example is given up.
    assert (len(a.train), len(b.train), len(a.held_out), len(b.held_out)) == (3, 3, 2, 1)


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        (PartitionConfig("column"), ConfigError, "kind column needs data.partition.column"),
        (PartitionConfig("dirichlet", None, 2), ConfigError, "kind dirichlet needs data.partition.column"),
        (PartitionConfig("iid"), ConfigError, "kind iid needs data.partition.num_clients"),
        (PartitionConfig("iid", None, 7), DataError, "6 examples cannot be divided among 7 clients"),
        (PartitionConfig("column", "site"), DataError, "row 1: no column 'site'; columns are 'instruction'"),
    ],
)
def test_partitions_that_cannot_be(
    tmp_path: Path, partition: PartitionConfig, error: type[Exception], message: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    with pytest.raises(error, match=message):
        list_clients(table(tmp_path / "t.json", partition=partition), 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 30), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_held_out_examples_are_never_trained_on(tmp_path: Path, size: int, fraction: float, seed: int) -> None:
    rows = [{"instruction": f"{n:02}", "output": "o"} for n in range(size)]
    (tmp_path / "1").mkdir(exist_ok=True)
    (tmp_path / "1" / "local_training_0.json").write_text(json.dumps(rows))
    config = DataConfig(path=str(tmp_path), held_out_fraction=fraction)
    client = read_client(config, seed, 0)
    train, held_out = [e.instruction for e in client.train], [e.instruction for e in client.held_out]
    assert train and sorted(train + held_out) == [row["instruction"] for row in rows]
    assert train == sorted(train) and held_out == sorted(held_out)
    assert bool(held_out) == (fraction > 0 and size > 1)
    assert abs(len(held_out) - fraction * size) <= 1
    assert client == read_client(config, seed, 0)


def test_pooled_clients_keep_repeats_but_count_a_shared_test_row_once() -> None:
    one, two, three = (Example(f"i{n}", "o", "") for n in range(3))
    pooled = pool_clients([ClientData(3, "x", (one, one), (two, two)), ClientData(5, "y", (two,), (two, three))])
    assert pooled == ClientData(0, "centralized", (one, one, two), (two, two, three))


@pytest.mark.skipif(not AUTHORS_DATA.is_dir(), reason=f"the authors' data is not at {AUTHORS_DATA}")
def test_the_authors_data() -> None:
    config = DataConfig(path=str(AUTHORS_DATA))
    names = list_clients(config, 0)
    assert names == [f"client_{k}" for k in range(8)]
    clients = read_clients(config, 0, range(8))
    assert [(len(client.train), len(client.held_out)) for client in clients] == [(300, 200)] * 8
    tasks = [{example.task for example in (*client.train, *client.held_out)} for client in clients]
    assert tasks == [
        {"coreference"},
        {"entailment"},
        {"linguistic_acceptability"},
        {"paraphrase"},
        {"question_classification"},
        {"structure_to_text"},
        {"text_formatting"},
        {"word_disambiguation"},
    ]
    pooled = pool_clients(clients)
    assert (len(pooled.train), len(pooled.held_out)) == (2400, 1600)
