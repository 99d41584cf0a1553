"""Every layout with a right and a wrong input: which files a path means, and what is refused in one line."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dpa_ds.config.schema import DataConfig, PartitionConfig
from dpa_ds.data.layouts import Layout, find_client_names
from dpa_ds.data.sources import list_clients, read_clients, read_test_rows
from dpa_ds.data.tables import read_rows, read_table
from dpa_ds.errors import DataError
from tests.unit.test_tables import write_parquet

TEST = Layout("test", "data.test_split")


def rows(word: str, number: int = 2) -> list[dict[str, Any]]:
    return [{"instruction": f"{word} {n}", "output": "say", "category": word} for n in range(number)]


def lines(word: str, number: int = 2) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows(word, number))


def words(table: Any) -> list[str]:
    return [row.values["instruction"] for row in table]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def compress_zst(text: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode())
    return sink.getvalue().to_pybytes()


# ---- shards --------------------------------------------------------------------------------------------------------


def test_shards_of_a_pattern_are_read_by_name_and_numbered_within_their_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001-of-00002.parquet", rows("b"))
    write_parquet(tmp_path / "train-00000-of-00002.parquet", rows("a"))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows("c"))
    table = read_table(tmp_path / "train-*.parquet")
    assert words(table) == ["a 0", "a 1", "b 0", "b 1"]
    assert table[2].place == f"{tmp_path}/train-00001-of-00002.parquet: row 1"
    assert table[-1].values == table[3].values
    assert [row.values for row in table[1:3]] == [table[1].values, table[2].values]
    with pytest.raises(IndexError):
        table[4]
    with pytest.raises(DataError, match=r"valid-\*.parquet: no such file or folder: no file matches: check data.path"):
        read_table(tmp_path / "valid-*.parquet")


def test_of_many_shards_one_file_is_open(tmp_path: Path) -> None:
    """A process may have 1024."""
    for number in range(30):
        write(tmp_path / f"{number:02}.jsonl", lines("a"))
        write(tmp_path / "compressed" / f"{number:02}.jsonl.gz", gzip.compress(lines("a").encode()))
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    before = count()
    config = DataConfig(format="table", path=f"{tmp_path}/*.jsonl", partition=PartitionConfig("iid", None, 2))
    most = 0
    for client in read_clients(replace(config, task_column=None), 0, [0, 1]):
        for _ in client.train:
            most = max(most, count() - before)
    assert most <= 1
    assert len(read_table(tmp_path / "compressed")) == 60
    assert count() == before


def test_a_fault_of_a_shard_names_the_shard(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", lines("a"))
    write(tmp_path / "1.jsonl", lines("b") + "{\n")
    with pytest.raises(DataError, match=r"1.jsonl:3: not JSON"):
        read_table(tmp_path)


def test_a_folder_of_shards_is_a_table(tmp_path: Path) -> None:
    write(tmp_path / "part-1.jsonl", lines("b"))
    write(tmp_path / "part-0.jsonl.gz", gzip.compress(lines("a").encode()))
    write(tmp_path / "README.md", "text")
    write(tmp_path / ".hidden.jsonl", "no")
    assert words(read_table(tmp_path)) == words(read_table(tmp_path, TEST)) == ["a 0", "a 1", "b 0", "b 1"]
    write(tmp_path / "more.csv", "instruction,output\na,b\n")
    with pytest.raises(
        DataError, match=r"files of several kinds \(more.csv, part-0.jsonl.gz\): name those of one kind"
    ):
        read_table(tmp_path)
    with pytest.raises(DataError, match=r"files of several kinds"):
        read_table(tmp_path / "*.*s*")


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("training/a.jsonl", "evaluation/a.jsonl"),
        ("my_Train.jsonl", "my_eval.jsonl"),
    ],
)
def test_splits_of_a_folder_are_found_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, word in zip(names, "ab", strict=True):
        write(tmp_path / name, lines(word))
    assert words(read_table(tmp_path)) == ["a 0", "a 1"]
    assert words(read_table(tmp_path, TEST)) == ["b 0", "b 1"]
    missing = r"no split 'validation' among \['test', 'train'\]: set data.split to one of them, or give a pattern"
    with pytest.raises(DataError, match=missing):
        read_table(tmp_path, Layout("validation"))


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(rows("a")), "dev": datasets.Dataset.from_list(rows("b"))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    path = str(tmp_path / "d")
    data = DataConfig(
        format="table", path=path, test_path=path, test_split="dev", partition=PartitionConfig("iid", None, 1)
    )
    (client,) = read_clients(replace(data, task_column=None), 0, [0])
    assert [example.instruction for example in client.train] == ["a 0", "a 1"]
    assert [example.instruction for example in client.held_out] == ["b 0", "b 1"]
    with pytest.raises(
        DataError, match=r"no split 'test' among \['dev', 'train'\]: set data.test_split to one of them"
    ):
        read_test_rows(replace(data, test_split="test"), 0, "test")
    with pytest.raises(DataError, match=r"no split 'all' among .*: set data.split to one of them"):
        list_clients(replace(data, split="all"), 0)


# ---- compressed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files(tmp_path: Path, kind: str, suffix: str) -> None:
    content = {
        "jsonl": lines("a"),
        "json": json.dumps(rows("a")),
        "csv": "instruction,output\na 0,say\na 1,say\n",
    }[kind]
    compressed = gzip.compress(content.encode()) if suffix == "gz" else compress_zst(content)
    path = write(tmp_path / f"x.{kind}.{suffix}", compressed)
    assert words(read_table(path)) == ["a 0", "a 1"]
    assert read_table(path)[0].place.startswith(str(path))
    for damaged in (compressed[:-4], b"hello", b""):
        write(path, damaged)
        with pytest.raises(DataError, match=rf"x.{kind}.{suffix}: (not a readable .{suffix} file .*|is empty)"):
            read_table(path)


def test_a_long_compressed_file_goes_to_the_disk(tmp_path: Path) -> None:
    text = lines("a" * 1000, 20_000)
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(text.encode(), 1))
    table = read_table(path)
    assert (len(table), table[19_999].values["instruction"][-5:], table[7].place) == (20_000, "19999", f"{path}:8")


def test_a_disk_without_room_for_decompressed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda max_size: full)
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(lines("a").encode()))
    with pytest.raises(DataError, match=r"has no room for decompressed data \(.*No space left.*\): set TMPDIR to one"):
        read_table(path)
    full.close()


def test_a_file_that_is_made_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/proc/self/status")
    with pytest.raises(DataError, match=r"x.jsonl: is a file of which the system knows no length: copy it"):
        read_table(tmp_path / "x.jsonl")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", lines("a"))
    table = read_table(path)
    assert words(table) == ["a 0", "a 1"]
    write(path, lines("abc"))
    with pytest.raises(DataError, match=r"x.jsonl: changed while it was read: start again once it is complete"):
        words(table)
    path.unlink()
    with pytest.raises(DataError, match=r"x.jsonl: cannot be read"):
        words(table)


# ---- JSON in which the rows are in a field -------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_a_field(tmp_path: Path, indent: int | None) -> None:
    whole = {"version": "1.0 é", "data": [*rows("a"), {"instruction": "é\u2028]", "output": "}"}], "test": rows("b")}
    path = write(tmp_path / "x.json", json.dumps(whole, indent=indent, ensure_ascii=False))
    assert words(read_table(path, Layout(field="data"))) == ["a 0", "a 1", "é\u2028]"]
    assert words(read_table(path, Layout(field="test"))) == ["b 0", "b 1"]
    assert read_table(path, Layout(field="data"))[1].place == f"{path}: row 2"
    with pytest.raises(DataError, match=r"fields \['data', 'test'\] have rows: set data.field to one of them"):
        read_table(path)
    fault = r"no field 'rows'; fields are \['data', 'test', 'version'\]: set data.field to one of \['data', 'test'\]"
    with pytest.raises(DataError, match=fault):
        read_table(path, Layout(field="rows"))
    with pytest.raises(DataError, match=r"field 'version' is str, not a list"):
        read_table(path, Layout(field="version"))
    write(path, json.dumps({"data": rows("a")}, indent=indent))
    with pytest.raises(
        DataError, match=r"x.json: is one object, whose field 'data' has rows: set data.field to 'data'"
    ):
        read_table(path)
    write(path, '{"data": [{"instruction": 1}, 3]}')
    with pytest.raises(DataError, match=r"field 'data': row 2: expected an object with named columns, got int"):
        read_table(path, Layout(field="data"))
    write(path, '{"data": [{"instruction": 1},\n}')
    with pytest.raises(DataError, match=r"x.json:2: not JSON"):
        read_table(path, Layout(field="data"))


def test_one_object_that_is_a_row(tmp_path: Path) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "x.json", json.dumps(messages))
    assert [row.values for row in read_table(path)] == [messages]
    write(path, json.dumps(rows("a")[0]))
    assert words(read_table(path)) == ["a 0"]
    # A field that a file of lines has no use for.
    assert words(read_table(write(tmp_path / "y.json", lines("a")), Layout(field="data"))) == ["a 0", "a 1"]


def test_values_longer_than_what_is_looked_at_together(tmp_path: Path) -> None:
    long = [{"instruction": "é" * 900_000, "output": n} for n in range(3)]
    path = write(tmp_path / "x.json", " \n" * 600_000 + json.dumps(long, ensure_ascii=False))
    assert [row.values for row in read_rows(path)] == long


# ---- data sets of the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "datasets--org--name"
    write(folder / "refs" / "main", "abc123")
    (folder / "snapshots" / "old").mkdir(parents=True)
    (folder / "snapshots" / "abc123").mkdir()
    return folder / "snapshots" / "abc123"


def test_a_data_set_of_the_hub_is_read_from_its_cache(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    (snapshot / "data").mkdir()
    for split, word in (("train", "a"), ("test", "b")):
        write_parquet(blobs / split, rows(word))
        (snapshot / "data" / f"{split}-00000-of-00001.parquet").symlink_to(blobs / split)
    write(snapshot / "dataset_infos.json", "{}")
    assert words(read_table("org/name")) == ["a 0", "a 1"]
    assert words(read_table("org/name", TEST)) == ["b 0", "b 1"]


def test_a_data_set_that_is_not_in_the_cache_names_the_command(snapshot: Path) -> None:
    fault = "org/other: no such file or folder, and no data set of that name in the hub's cache .*/hub: "
    with pytest.raises(DataError, match=fault + ".*hf download --repo-type dataset org/other"):
        read_table("org/other")
    with pytest.raises(DataError, match=r"^nowhere: no such file or folder: check data.path and data.test_path$"):
        read_table("nowhere")
    with pytest.raises(
        DataError, match=r"^data/rows.jsonl: no such file or folder: check data.path and data.test_path$"
    ):
        read_table("data/rows.jsonl")


CARD = """\
---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: first/*.jsonl
  - split: test
    path: [second/b.jsonl]
---
# Name
"""


def test_the_card_of_a_data_set_names_its_files(snapshot: Path) -> None:
    write(snapshot / "first" / "x.jsonl", lines("a"))
    write(snapshot / "second" / "b.jsonl", lines("b"))
    write(snapshot / "second" / "train.jsonl", lines("c"))
    write(snapshot / "README.md", CARD)
    assert words(read_table("org/name")) == ["a 0", "a 1"]
    assert words(read_table("org/name", TEST)) == ["b 0", "b 1"]
    with pytest.raises(DataError, match=r"no split 'dev' among \['test', 'train'\]: set data.split to one of them"):
        read_table("org/name", Layout("dev"))
    write(snapshot / "README.md", CARD.replace("first/", "nowhere/"))
    with pytest.raises(DataError, match=r"names \['nowhere/\*.jsonl'\], and no such file is there: run hf download"):
        read_table("org/name")
    write(
        snapshot / "README.md",
        CARD.replace("- config_name: default", "- config_name: x\n  data_files: a\n- config_name: y"),
    )
    with pytest.raises(DataError, match=r"has the configurations x, y: name the files of one by a pattern"):
        read_table("org/name")
    write(snapshot / "README.md", CARD.replace("first/*.jsonl", "../../../*.jsonl"))
    with pytest.raises(DataError, match=r"no split 'train'"):
        read_table("org/name")


# ---- a file or folder for each client ------------------------------------------------------------------------------


def own_files(path: Path, test_path: Path | None = None, **changes: Any) -> DataConfig:
    test = None if test_path is None else str(test_path)
    return DataConfig(format="table", path=str(path), test_path=test, **changes)


@pytest.mark.parametrize(
    "form", ["{client}.jsonl", "site_{client}.jsonl", "{client}/train.jsonl", "{client}", "{client}/*.jsonl"]
)
def test_a_file_or_folder_for_each_client(tmp_path: Path, form: str) -> None:
    for name in ("south", "north"):
        path = tmp_path / form.replace("{client}", name).replace("*", "train")
        write(path / "train.jsonl" if form == "{client}" else path, lines(name, 3))
    write(tmp_path / "notes.txt", "x")
    config = own_files(tmp_path / form, held_out_fraction=0.3, task_column=None)
    assert list_clients(config, 0) == ["north", "south"]
    (south,) = read_clients(config, 0, [1])
    assert (south.name, len(south.train), len(south.held_out)) == ("south", 2, 1)
    assert {example.task for example in (*south.train, *south.held_out)} == {"south"}


def test_names_of_clients_are_no_patterns(tmp_path: Path) -> None:
    for name in ("a[1]", "a1", "*"):
        write(tmp_path / name / "x.jsonl", lines(name))
    config = own_files(tmp_path / "{client}" / "*.jsonl", held_out_fraction=0.1)
    assert list_clients(config, 0) == ["*", "a1", "a[1]"]
    for client in read_clients(config, 0, [0, 1, 2]):
        assert {example.instruction[:-2] for example in (*client.train, *client.held_out)} == {client.name}


def test_a_form_that_no_file_has(tmp_path: Path) -> None:
    write(tmp_path / "north.jsonl", lines("a"))
    for form in ("{client}.csv", "{client}", "{client}/train.jsonl"):
        with pytest.raises(DataError, match=r"no such file or folder for any client: name files as in data/\{client\}"):
            find_client_names(str(tmp_path / form))
    with pytest.raises(DataError, match=r"no such file or folder: .*none: check data.path"):
        find_client_names(str(tmp_path / "none" / "{client}.jsonl"))


def test_only_the_own_clients_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and test files of the other client are on another host: they do not exist here."""
    write(tmp_path / "train" / "south.jsonl", lines("a", 3))
    write(tmp_path / "test" / "south.jsonl", lines("b", 2))
    config = own_files(tmp_path / "train/{client}.jsonl", tmp_path / "test/{client}.jsonl", clients=["south", "north"])
    opened: list[str] = []
    usual_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *how: opened.append(path.name) or usual_open(path, *how))
    assert list_clients(config, 0) == ["south", "north"]  # as the recipe has them
    assert opened == []
    (south,) = read_clients(config, 0, [0])
    assert (len(south.train), len(south.held_out), set(opened)) == (3, 2, {"south.jsonl"})
    with pytest.raises(DataError, match=r"north.jsonl: no such file or folder: check data.path"):
        read_clients(config, 0, [1])
    fault = (
        "data.clients says that the test rows of north are on its own host: score where all of them are, or give one"
    )
    with pytest.raises(DataError, match=fault):
        read_test_rows(config, 0, "test")


def test_tasks_of_clients_with_a_shared_test_file(tmp_path: Path) -> None:
    """Their rows name no task: neither do the test rows, and each is everybody's."""
    for name in ("a", "b"):
        write(tmp_path / "train" / f"{name}.jsonl", lines(name))
    write(tmp_path / "test.jsonl", lines("c"))
    config = own_files(tmp_path / "train/{client}.jsonl", tmp_path / "test.jsonl", task_column=None)
    for client in read_clients(config, 0, [0, 1]):
        assert ({example.task for example in client.train}, len(client.held_out)) == ({""}, 2)


# ---- what is noticed about rows ------------------------------------------------------------------------------------


def test_rows_given_twice_and_test_rows_among_them(tmp_path: Path) -> None:
    train = [*rows("a", 3), *rows("a", 2), *rows("b", 1)]
    write(tmp_path / "t.json", json.dumps(train))
    write(tmp_path / "held.json", json.dumps([*rows("b", 4), *rows("c", 1)]))
    iid = PartitionConfig("iid", None, 1)
    config = DataConfig(
        format="table", path=str(tmp_path / "t.json"), test_path=str(tmp_path / "held.json"), partition=iid
    )
    (client,) = read_clients(config, 0, [0])
    assert client.quality is not None
    assert (client.quality.num_duplicates, client.quality.num_leaked) == (2, 1)
    assert client.quality.leaked_place == f"{tmp_path}/t.json: row 6"
    (client,) = read_clients(replace(config, test_path=None), 0, [0])
    assert client.quality is not None
    assert (client.quality.num_leaked, client.quality.leaked_place) == (0, None)
