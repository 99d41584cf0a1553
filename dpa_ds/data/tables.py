"""Tables on disk as rows with their place: JSON arrays, JSONL, CSV, parquet, folders written by save_to_disk.

A fault of a file or a cell raises DataError, which names file and row.
"""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa_ds.errors import DataError

_DAMAGED = (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors that `datasets` raises at a folder of which a file is missing or damaged."""

_MOST_EXACT = 2.0**53
"""From here on a float does not hold every whole number, so that its digits would be invented."""


@dataclass(frozen=True)
class Row:
    """One row of a table, with its place (`file:line` or `file: row n`) for messages."""

    values: dict[str, Any]
    place: str

    def text(self, column: str, remedy: str = "set the data.*_column that fits") -> str:
        """The cell as text; numbers and truth values are written out.

        A whole number has no fraction, 3.0 is "3": pandas makes floats of a column of whole numbers in which a cell is
        missing, and in JSON both are the same number. A missing cell is None, or NaN as pandas writes it.

        Args:
            remedy: what to do where there is no such column.

        Raises:
            DataError: there is no such column, the cell is missing, or it is neither text nor a finite number.
        """
        if column not in self.values:
            raise DataError(f"{self.place}: no column {column!r}; columns are {self.list_columns()}: {remedy}")
        value = self.values[column]
        if _is_missing(value):
            raise DataError(f"{self.place}: column {column!r} is empty: fill it in, or remove the row")
        if isinstance(value, float):
            return self._float_as_text(column, value)
        if isinstance(value, bool | int):
            return str(value)
        if not isinstance(value, str):
            raise DataError(f"{self.place}: column {column!r} must be text, got {type(value).__name__}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{self.place}: column {column!r} has half a surrogate pair: remove the \\ud8xx") from error
        return value

    def list_columns(self) -> str:
        """Names of the columns, for messages."""
        columns = ", ".join(repr(name) for name in self.values)
        return textwrap.shorten(columns, 300, placeholder=" ...") or "none"

    def optional_text(self, column: str, remedy: str = "set the data.*_column that fits") -> str:
        """The cell as text, "" where it is missing. Raises DataError as `text` does."""
        if column in self.values and _is_missing(self.values[column]):
            return ""
        return self.text(column, remedy)

    def _float_as_text(self, column: str, value: float) -> str:
        if math.isinf(value):
            raise DataError(f"{self.place}: column {column!r} is an infinite number: write what it means, or remove it")
        if value.is_integer() and abs(value) < _MOST_EXACT:
            return str(int(value))
        return str(value)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_table(path: str | Path) -> list[Row]:
    """All rows of a JSON array, JSONL, CSV or parquet file, or of a folder written by `datasets` save_to_disk.

    Raises DataError (file and line or row) for a file that is missing, unreadable, malformed or has no rows.
    """
    rows = read_rows(Path(path))
    if not rows:
        raise DataError(f"{path}: is empty: no rows; give data.path and data.test_path a file with examples")
    return rows


def read_rows(path: Path) -> list[Row]:
    """All rows of a file or folder, as `read_table`, where it may have none."""
    with reading(path):
        if path.is_dir():
            return _read_saved_dataset(path)
        match path.suffix.lower():
            case ".json" | ".jsonl":
                return _read_json(path)
            case ".csv":
                return _read_csv(path)
            case ".parquet":
                return _read_parquet(path)
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}: use .json, .jsonl, .csv, .parquet, "
        "or a folder written by save_to_disk"
    )


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` wrote by save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system about `path` into a DataError with its remedy."""
    try:
        # Opening a pipe would wait for ever for a writer, and /dev/zero has no end.
        if path.exists() and not path.is_file() and not path.is_dir():
            kind = "pipe" if path.is_fifo() else "device"
            raise DataError(f"{path}: is a {kind}, not a file: write the rows to a file")
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder: check data.path and data.test_path") from error
    except PermissionError as error:
        raise DataError(f"{path}: no permission to read it: chmod it for the user of this job") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}): check the file and its file system") from error


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8: convert the file to UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: contains a NUL byte: the file is damaged or not UTF-8; write it again")
    return text.removeprefix("\ufeff")


def _read_json(path: Path) -> list[Row]:
    text = _read_text(path)
    items: list[tuple[str, Any]] = []  # (place, value)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, item in enumerate(_parse_json(text, path, 1), start=1):
            items.append((f"{path}: row {number}", item))
    else:
        # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                items.append((f"{path}:{number}", _parse_json(line, path, number)))
    for place, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected an object with named columns, got {type(item).__name__}")
    return [Row(item, place) for place, item in items]


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{first_line + error.lineno - 1}: not JSON ({error.msg}, column {error.colno}): "
            "a file is one array of objects (.json), or one object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{first_line}: JSON that cannot be read ({error}): shorten that value") from error


def _read_csv(path: Path) -> list[Row]:
    text = _read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    # The library takes no cell above 131,072 characters unless it is asked to; the limit is one for the whole process.
    usual_limit = csv.field_size_limit(max(len(text), 1))
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column name occurs twice in {header}: rename one")
        for fields in reader:
            place = f"{path}:{reader.line_num}"
            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise DataError(f"{place}: {len(fields)} fields, but the header has {len(header)}: quote commas")
            rows.append(Row(dict(zip(header, fields, strict=True)), place))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}): check quotes") from error
    finally:
        csv.field_size_limit(usual_limit)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    # Imported here: only this format needs it.
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}): write it again") from error
    return [Row(value, f"{path}: row {n}") for n, value in enumerate(values, start=1)]


def _read_saved_dataset(path: Path) -> list[Row]:
    # Imported here: `datasets` takes seconds to import, and only this format needs it.
    import datasets
    import pyarrow

    if not is_saved_dataset(path):
        raise DataError(f"{path}: folder without data: name a file in it, or a folder written by save_to_disk")
    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if "train" not in loaded:
                raise DataError(f"{path}: no split 'train' among {sorted(loaded)}: give the folder of one split")
            loaded = loaded["train"]
        values = list(loaded.with_format(None))  # plain Python values, whatever format was saved with the data
    except (*_DAMAGED, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable data set ({error}): save it again with save_to_disk") from error
    return [Row(dict(value), f"{path}: row {n}") for n, value in enumerate(values, start=1)]
