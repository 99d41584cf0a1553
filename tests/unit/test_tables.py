"""Every format gives the same rows, and every damaged file one message with place and remedy."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_ds.data.layouts import Layout
from dpa_ds.data.tables import read_rows, read_table
from dpa_ds.errors import DataError

ROWS = [{"instruction": f"ask {n}", "output": f"say {n}", "category": "ab"[n % 2]} for n in range(6)]


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
@given(
    content=st.binary(max_size=60),
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".csv.zst"]),
)
def test_damaged_files_end_in_a_data_error_or_in_rows(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    try:
        rows = read_table(path)
    except DataError as error:
        place, num_rows = str(error), 1
    else:
        place, num_rows = rows[0].place, len(rows)
    assert place.startswith(str(path))
    assert num_rows >= 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
ROWS_OF_VALUES = st.lists(st.dictionaries(texts, VALUES, max_size=3), max_size=5)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS_OF_VALUES, others=st.dictionaries(texts, VALUES, max_size=2), window=st.integers(1, 40), layout=st.data()
)
def test_windows_of_any_length_find_the_same_rows(
    tmp_path: Path, rows: list[Any], others: dict[str, Any], window: int, layout: st.DataObject
) -> None:
    style = {"ensure_ascii": layout.draw(st.booleans()), "indent": layout.draw(st.sampled_from([None, 0, 3]))}
    path = tmp_path / "x.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpa_ds.data.text_files._WINDOW", window)
        path.write_text(json.dumps(rows, **style), encoding="utf-8", newline="")
        assert [row.values for row in read_rows(path)] == rows
        path.write_text(json.dumps({**others, "rows": rows}, **style), encoding="utf-8", newline="")
        assert [row.values for row in read_rows(path, Layout(field="rows"))] == rows


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.sampled_from('[]{}",:1e-. \nantrue'), max_size=25), window=st.integers(1, 8))
def test_an_array_is_read_where_the_library_reads_it(tmp_path: Path, content: str, window: int) -> None:
    """And refused where the library refuses it: whatever the window."""
    path = tmp_path / "x.json"
    text = f"[{content}"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpa_ds.data.text_files._WINDOW", window)
        try:
            expected = json.loads(text)
        except ValueError:
            with pytest.raises(DataError, match=r"x.json:"):
                read_rows(path)
            return
        if all(isinstance(item, dict) for item in expected):
            assert repr([row.values for row in read_rows(path)]) == repr(expected)
        else:
            with pytest.raises(DataError, match="expected an object"):
                read_rows(path)


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


def test_a_cell_of_any_length_is_read(tmp_path: Path) -> None:
    """The library's limit is 131,072 characters; it is one for the whole process, and is there again afterwards."""
    usual_limit = csv.field_size_limit()
    rows = [{"instruction": "a", "output": "b" * 300_000}, {"instruction": "c" * 200_000, "output": "d"}]
    write_csv(tmp_path / "long.csv", rows)
    assert [row.values for row in read_table(tmp_path / "long.csv")] == rows
    (tmp_path / "bad.csv").write_text('a,b\n1,2\n"3,4\n')
    with pytest.raises(DataError, match="not CSV"):
        read_table(tmp_path / "bad.csv")
    assert csv.field_size_limit() == usual_limit


def test_missing_file_folder_without_data_and_damaged_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.json: no such file or folder: check data.path"):
        read_table(tmp_path / "x.json")
    with pytest.raises(DataError, match="folder without data"):
        read_table(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=str(tmp_path)):
        read_table(tmp_path)


def test_a_device_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"rows.json: is a device, not a file: write the rows to a file"):
        read_table(tmp_path / "rows.json")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand, because root may read everything.
    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.json").write_text("[]")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"x.json: no permission to read it"):
        read_table(tmp_path / "x.json")


def test_saved_splits_without_train_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"no split 'train' among \['dev'\]"):
        read_table(tmp_path / "d")
