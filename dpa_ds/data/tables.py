"""Tables on disk as rows with their place: JSON arrays, JSONL, CSV, parquet, folders written by save_to_disk.

A table holds no rows: each is read from its file when it is asked for. A fault of a file or a cell raises DataError,
which names file and row.
"""

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpa_ds.data.arrow_files import open_parquet, open_saved_dataset
from dpa_ds.data.byte_source import Spool, open_bytes
from dpa_ds.data.layouts import Layout, file_kind, find_sources, has_lines
from dpa_ds.data.lazy import Joined, Lazy
from dpa_ds.data.text_files import open_csv, open_json
from dpa_ds.errors import DataError

DEFAULT_LAYOUT = Layout()

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


class RowFile(Protocol):
    """Rows of one file, read when they are asked for."""

    def __len__(self) -> int:
        """Number of rows."""

    def values(self, index: int) -> dict[str, Any]:
        """Cells of row `index` by column."""

    def place(self, index: int) -> str:
        """Row `index` for messages."""

    def release(self) -> None:
        """Close the file; the next row opens it again."""


class FileRows(Lazy[Row]):
    """The rows of one file as `Row`s."""

    def __init__(self, path: Path, file: RowFile) -> None:
        self._path = path
        self._file = file

    def __len__(self) -> int:
        return len(self._file)

    def make(self, index: int) -> Row:
        """Row `index`. Raises DataError where the file cannot be read any more."""
        try:
            return Row(self._file.values(index), self._file.place(index))
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error}): check the file and its file system") from error

    def release(self) -> None:
        """Close the file."""
        self._file.release()


def read_table(path: str | Path, layout: Layout = DEFAULT_LAYOUT) -> Lazy[Row]:
    """All rows of a file (JSON array, JSONL, CSV, parquet), of several, or of a data set; read when they are asked for.

    Every row is looked at once, here. Raises DataError (file and line or row) for a file that is missing, unreadable,
    malformed or has no rows.
    """
    rows = read_rows(path, layout)
    if not rows:
        raise DataError(f"{path}: is empty: no rows; give data.path and data.test_path a file with examples")
    return rows


def read_rows(path: str | Path, layout: Layout = DEFAULT_LAYOUT) -> Lazy[Row]:
    """All rows of a file, a pattern, a folder or a data set, as `read_table`, where it may have none."""
    spool = Spool()
    with reading(Path(path)):
        sources = find_sources(Path(path), layout)
    tables = []
    for source in sources:
        with reading(source):
            table = FileRows(source, _open_file(source, layout, spool))
        table.release()  # each row was looked at
        tables.append(table)
    return tables[0] if len(tables) == 1 else Joined(tables)


def _open_file(path: Path, layout: Layout, spool: Spool) -> RowFile:
    if path.is_dir():
        return open_saved_dataset(path, layout.split, layout.split_field)
    match file_kind(path):
        case "JSON":
            return open_json(path, open_bytes(path, spool), layout.field, may_be_array=not has_lines(path))
        case "CSV":
            return open_csv(path, open_bytes(path, spool))
        case "parquet":
            return open_parquet(path, spool)
    with path.open("rb"):  # what is not there is reported as such
        pass
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}: use .json, .jsonl, .csv, .parquet, the first three also with "
        ".gz or .zst, or a folder written by save_to_disk"
    )


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
