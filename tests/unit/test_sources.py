"""Every layout gives the same clients, and every bad input one message with place and remedy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_ds.config.schema import DataConfig, PartitionConfig
from dpa_ds.data.sources import (
    ClientData,
    Example,
    list_clients,
    pool_clients,
    read_client,
    read_clients,
    read_test_rows,
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


def table(path: Path, **changes: Any) -> DataConfig:
    partition = PartitionConfig(kind="column", column="category")
    return replace(DataConfig(format="table", path=str(path), partition=partition), **changes)


def test_a_task_column_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    config = table(tmp_path / "rows.json", held_out_fraction=0.5)
    fault = "nor one after it has the column 'kind'; columns are 'instruction', .*: set data.task_column to one of them"
    with pytest.raises(DataError, match=fault):
        read_clients(replace(config, task_column="kind"), 0, [0])
    without = [{key: row[key] for key in ("instruction", "output")} for row in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(without))
    for column in ("category", None):  # the default, and no tasks
        iid = PartitionConfig(kind="iid", num_clients=1)
        (client,) = read_clients(replace(config, partition=iid, task_column=column), 0, [0])
        assert {example.task for example in client.train} == {""}


BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    (
        "missing column",
        {"prompt": "p", "output": "o"},
        r"row 2: no column 'instruction'; columns are 'prompt', 'output'",
    ),
    ("null", {"instruction": "i", "output": None}, r"row 2: column 'output' is empty: fill it in"),
    ("no question", {"instruction": float("nan"), "output": "o"}, r"row 2: column 'instruction' is empty: fill it in"),
    ("NaN", {"instruction": "i", "output": float("nan")}, r"row 2: column 'output' is empty: fill it in, or remove"),
    ("infinite", {"instruction": "i", "output": float("inf")}, r"row 2: column 'output' is an infinite number"),
    ("list", {"instruction": ["i"], "output": "o"}, r"row 2: column 'instruction' must be text, got list"),
    ("blank", {"instruction": " \n", "output": "o"}, r"row 2: column 'instruction' is empty"),
    ("no answer", {"instruction": "i", "output": ""}, r"row 2: column 'output' is empty"),
    ("surrogate", {"instruction": "\ud800", "output": "o"}, r"row 2: column 'instruction' has half a surrogate"),
    ("task", {"instruction": "i", "output": "o", "category": {}}, r"row 2: column 'category' must be text, got dict"),
]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x\nerror: not really", r"x\nerror: not really"),
        ("\x1b[31mred\x9b0m\x7f", r"\x1b[31mred\x9b0m\x7f"),
        ("a\u2028b\u202egnp", r"a\u2028b\u202egnp"),
        ("a\\nb", r"a\\nb"),  # else two tasks would become one
        ("Frage und Antwort: é 漢 \u3000 \u200d🦊", "Frage und Antwort: é 漢 \u3000 \u200d🦊"),
    ],
)
def test_names_of_tasks_and_clients_are_printable(name: str, shown: str, tmp_path: Path) -> None:
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{"instruction": "a", "output": "b", "category": name}]))
    partition = PartitionConfig(kind="column", column="category")
    config = DataConfig(format="table", path=str(table), test_path=str(table), partition=partition)
    assert list_clients(config, 0) == [shown]
    (client,) = read_clients(config, 0, [0])
    assert (client.name, client.train[0].task, client.held_out[0].task) == (shown, shown, shown)
    assert read_test_rows(config, 0, "test")[0].task == shown


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


def test_what_pandas_makes_of_a_gap_is_no_text(tmp_path: Path) -> None:
    """A missing cell becomes NaN, and the whole numbers above and below it become floats."""
    nan = float("nan")
    rows = [
        {"q": "say a", "in": nan, "a": 3.0, "kind": nan},
        {"q": "say b", "in": 7.0, "a": 0.5, "kind": 2.0},
        {"q": "say c", "in": 1e300, "a": -1.0, "kind": 2.5},
    ]
    write_feddpa(tmp_path, [rows], None)
    names = {"instruction_column": "q", "input_column": "in", "output_column": "a", "task_column": "kind"}
    client = read_client(DataConfig(path=str(tmp_path), **names), 0, 0)
    assert client.train == (
        Example("say a", "3", ""),
        Example("say b\n7", "0.5", "2"),
        Example("say c\n1e+300", "-1", "2.5"),
    )


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_columns_with_gaps_read_alike_from_every_format(tmp_path: Path, name: str) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    columns = {"instruction": ["a", "b"], "context": [float("nan"), 2.0], "output": [1.0, 4.0], "who": ["x", "x"]}
    if name == "saved":
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), tmp_path / name)
    partition = PartitionConfig(kind="column", column="who")
    config = DataConfig(format="table", path=str(tmp_path / name), input_column="context", partition=partition)
    assert read_client(config, 0, 0).train == (Example("a", "1", "x"), Example("b\n2", "4", "x"))


def test_a_client_needs_a_name_in_every_row(tmp_path: Path) -> None:
    """Rows without one would all be of a client called nan."""
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{**ROWS[0], "who": "x"}, {**ROWS[1], "who": float("nan")}]))
    config = DataConfig(format="table", path=str(table), partition=PartitionConfig(kind="column", column="who"))
    with pytest.raises(DataError, match=r"rows.json: row 2: column 'who' is empty: fill it in"):
        list_clients(config, 0)


def test_missing_input_column_is_an_error(tmp_path: Path) -> None:
    write_feddpa(tmp_path, [ROWS], None)
    with pytest.raises(DataError, match=r"no column 'context'; columns are .*: set data.input_column to"):
        read_client(DataConfig(path=str(tmp_path), input_column="context"), 0, 0)


def test_feddpa_client_is_scored_on_the_tasks_it_trains_on(tmp_path: Path) -> None:
    config = DataConfig(path=str(feddpa_of_two(tmp_path)))
    assert list_clients(config, 0) == ["client_0", "client_1"]
    client = read_client(config, 0, 1)
    assert (client.client_id, client.name) == (1, "client_1")
    assert client.train == tuple(Example(f"ask {n}", f"say {n}", "b") for n in (1, 3, 5))
    assert client.held_out == (Example("ask 1", "held", "b"),)


def test_without_tasks_every_test_row_is_held_out(tmp_path: Path) -> None:
    client = read_client(DataConfig(path=str(feddpa_of_two(tmp_path)), task_column=None), 0, 0)
    assert len(client.held_out) == 3
    assert {example.task for example in (*client.train, *client.held_out)} == {""}


def test_feddpa_opens_only_the_clients_own_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(feddpa_of_two(tmp_path)))
    opened: list[str] = []
    usual_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *how: opened.append(path.name) or usual_open(path, *how))
    list_clients(config, 0)
    assert opened == []
    read_client(config, 0, 1)
    assert set(opened) == {"local_training_1.json", "test.jsonl"}


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
    with pytest.raises(DataError, match="give that folder"):
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
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    config = table(tmp_path / "t.json")
    assert list_clients(config, 0) == ["a", "b"]
    clients = read_clients(config, 0, [1, 0])
    assert [client.name for client in clients] == ["b", "a"]
    assert [len(client.train) for client in clients] == [3, 3]
    assert clients[0] == read_client(config, 0, 1)
    assert clients[0].held_out == ()


@pytest.mark.parametrize("task_column", ["category", None])
def test_clients_of_a_column_are_tasks_where_no_column_names_tasks(task_column: str | None, tmp_path: Path) -> None:
    """Else all rows would be of one task, and P the same as TTP."""
    rows = [{"instruction": f"ask {n}", "output": "say", "site": "ab"[n % 2]} for n in range(6)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "held.json").write_text(json.dumps(rows[:3]))
    by_site = PartitionConfig("column", "site")
    config = table(tmp_path / "t.json", partition=by_site, task_column=task_column)
    (a,) = read_clients(replace(config, held_out_fraction=0.5), 0, [0])
    assert {example.task for example in (*a.train, *a.held_out)} == {"a"}
    config = replace(config, test_path=str(tmp_path / "held.json"))
    assert [len(client.held_out) for client in read_clients(config, 0, [0, 1])] == [2, 1]
    assert [example.task for example in read_test_rows(config, 0, "test")] == ["a", "b", "a"]
    by_chance = replace(config, partition=PartitionConfig("iid", None, 2))
    assert {example.task for example in read_test_rows(by_chance, 0, "test")} == {""}


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
    config = table(tmp_path / "t.json", test_path=str(tmp_path / "held.jsonl"))
    a, b = read_clients(config, 0, [0, 1])
    assert (len(a.train), len(b.train), len(a.held_out), len(b.held_out)) == (3, 3, 2, 1)
    assert [e.instruction for e in read_test_rows(config, 0, "test")] == [row["instruction"] for row in ROWS[:3]]


def test_what_is_kept_to_tune_on_is_neither_trained_on_nor_tested(tmp_path: Path) -> None:
    """`held_out_fraction` applies beside a test file too: learning rate and lambda are chosen without the test data."""
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    config = table(tmp_path / "t.json", test_path=str(tmp_path / "held.jsonl"), held_out_fraction=0.5)
    a, b = read_clients(config, 0, [0, 1])
    assert (len(a.train), len(b.train), len(a.held_out), len(b.held_out)) == (1, 1, 2, 2)
    held_out = read_test_rows(config, 0, "held_out")
    assert {*a.held_out, *b.held_out} == set(held_out)
    assert not {*a.train, *b.train} & set(held_out)


@pytest.mark.parametrize(
    ("split", "message"), [("test", "no test file"), ("held_out", "data.held_out_fraction above 0")]
)
def test_nothing_to_evaluate_on(tmp_path: Path, split: Any, message: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match=message):
        read_test_rows(table(tmp_path / "t.json"), 0, split)


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        (PartitionConfig("column"), ConfigError, "kind column needs data.partition.column"),
        (PartitionConfig("dirichlet", None, 2), ConfigError, "kind dirichlet needs data.partition.column"),
        (PartitionConfig("iid"), ConfigError, "kind iid needs data.partition.num_clients"),
        (PartitionConfig("iid", None, 7), DataError, "6 examples cannot be divided among 7 clients"),
        (PartitionConfig("column", "site"), DataError, "row 1: no column 'site'; .*: set data.partition.column to one"),
        (PartitionConfig("iid", "site", 2), DataError, "has the column 'site'; .*: set data.partition.column to one"),
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
    assert train
    assert sorted(train + held_out) == [row["instruction"] for row in rows]
    assert (train, held_out) == (sorted(train), sorted(held_out))
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


# ---- a layout that is not what data.format says ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "saved"])
def test_a_table_that_meets_feddpa(tmp_path: Path, name: str) -> None:
    if name == "saved":
        pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(ROWS))
    words = (
        rf"{name}: is a file or a data set, and data.format feddpa is a folder .* set data.format table and data.part"
    )
    with pytest.raises(DataError, match=words):
        list_clients(DataConfig(path=str(tmp_path / name)), 0)


def test_the_authors_layout_that_meets_table(tmp_path: Path) -> None:
    config = DataConfig(format="table", path=str(feddpa_of_two(tmp_path)), partition=PartitionConfig(column="category"))
    with pytest.raises(DataError, match=r"has the layout of data.format feddpa, .*: set data.format feddpa"):
        list_clients(config, 0)
    with pytest.raises(DataError, match=r"set data\.format feddpa"):
        read_client(config, 0, 0)


@pytest.mark.parametrize(
    ("cell", "names", "unread"),
    [
        ("the text to sum up", {}, True),
        ("", {}, False),
        (None, {}, False),
        ("the text to sum up", {"input_column": "input"}, False),
        ("the text to sum up", {"instruction_column": "input"}, False),
    ],
)
def test_an_input_that_no_prompt_has_is_noticed(tmp_path: Path, cell: str | None, names: Any, unread: bool) -> None:
    """Rows as Alpaca's have one; training on instructions without their context is a loss that nobody sees."""
    write_feddpa(tmp_path, [[{"instruction": "Sum up.", "input": cell, "output": "short"}]], None)
    client = read_client(DataConfig(path=str(tmp_path), **names), 0, 0)
    assert client.has_unread_input == unread
    assert pool_clients([client]).has_unread_input == unread
