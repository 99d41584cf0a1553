"""Parquet files and folders written by save_to_disk: columns as Arrow keeps them, some rows of which become Python
values at a time.

Every row is decoded once as the file is opened, so that a fault ends a job at its start. Raises DataError.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpa_ds.data.byte_source import Spool
from dpa_ds.errors import DataError

_DAMAGED = (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors that `datasets` raises at a folder of which a file is missing or damaged."""

# Of the rows that are decoded together: enough for the libraries to be fast, and little memory however long a cell is.
_MOST_ROWS = 1000
_MOST_BYTES = 1 << 20


class _Batches(Protocol):
    """Rows in batches of `rows_per_batch` that can be read in any order."""

    rows_per_batch: int

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, batch: int) -> Sequence[dict[str, Any]]:
        """Rows of a batch. Raises DataError."""


class ArrowRows:
    """Rows of a table of columns: the batch that was asked for last is kept as Python values."""

    def __init__(self, path: Path, batches: _Batches) -> None:
        self._path = path
        self._batches = batches
        self._batch = -1
        self._rows: Sequence[dict[str, Any]] = ()
        for batch in range(-(-len(batches) // batches.rows_per_batch)):
            batches.read(batch)

    def __len__(self) -> int:
        return len(self._batches)

    def values(self, index: int) -> dict[str, Any]:
        """Cells of row `index` by column."""
        batch, position = divmod(index, self._batches.rows_per_batch)
        if batch != self._batch:
            self._rows = self._batches.read(batch)
            self._batch = batch
        return self._rows[position]

    def place(self, index: int) -> str:
        """Row `index` for messages."""
        return f"{self._path}: row {index + 1}"

    def release(self) -> None:
        """Forget the batch that was decoded last."""
        self._batch, self._rows = -1, ()


def open_parquet(path: Path, spool: Spool) -> ArrowRows:
    """Rows of a parquet file. They go to `spool` uncompressed, where any is read without those before it."""
    # Imported here: only this format needs it.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = _SpooledBatches(path, spool, _rows_per_batch(_uncompressed_bytes(file), file.metadata.num_rows))
            for batch in file.iter_batches(batch_size=batches.rows_per_batch):
                batches.append(batch)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}): write it again") from error
    return ArrowRows(path, batches)


class _SpooledBatches:
    """Batches of a parquet file, each in the stream format of Arrow, with the schema that it needs."""

    def __init__(self, path: Path, spool: Spool, rows_per_batch: int) -> None:
        self.rows_per_batch = rows_per_batch
        self._path = path
        self._spool = spool
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, batch: Any) -> None:
        """Add a batch; all but the last have the same number of rows."""
        import pyarrow

        assert self._num_rows == self.rows_per_batch * len(self._starts), self._path
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        content = sink.getvalue()
        start = self._spool.append(content)
        self._starts.append(start)
        self._stops.append(start + len(content))
        self._num_rows += batch.num_rows

    def read(self, batch: int) -> Sequence[dict[str, Any]]:
        """Rows of a batch."""
        import pyarrow

        content = self._spool.read(self._starts[batch], self._stops[batch])
        try:
            rows: list[dict[str, Any]] = pyarrow.ipc.open_stream(content).read_all().to_pylist()
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}: not a readable parquet file ({error}): write it again") from error
        return rows


def _uncompressed_bytes(file: Any) -> int:
    return sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` wrote by save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_saved_dataset(path: Path, split: str, split_field: str) -> ArrowRows:
    """Rows of a folder written by save_to_disk, which Arrow maps into memory.

    Args:
        split: which one, where the folder has several.
        split_field: field of the recipe that names it.
    """
    # Imported here: `datasets` takes seconds to import, and only this format needs it.
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataError(
                    f"{path}: no split {split!r} among {sorted(loaded)}: set {split_field} to one of them, or give the "
                    "folder of one split"
                )
            loaded = loaded[split]
        loaded = loaded.with_format(None)  # plain Python values, whatever format was saved with the data
        rows_per_batch = _rows_per_batch(loaded.data.nbytes, len(loaded))
    except (*_DAMAGED, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable data set ({error}): save it again with save_to_disk") from error
    return ArrowRows(path, _SavedBatches(path, loaded, rows_per_batch))


class _SavedBatches:
    """Batches of a saved data set."""

    def __init__(self, path: Path, loaded: Any, rows_per_batch: int) -> None:
        self.rows_per_batch = rows_per_batch
        self._path = path
        self._loaded = loaded

    def __len__(self) -> int:
        return len(self._loaded)

    def read(self, batch: int) -> Sequence[dict[str, Any]]:
        """Rows of a batch."""
        import pyarrow

        start = batch * self.rows_per_batch
        try:
            columns = self._loaded[start : start + self.rows_per_batch]
        except (*_DAMAGED, pyarrow.ArrowException) as error:
            raise DataError(
                f"{self._path}: not a readable data set ({error}): save it again with save_to_disk"
            ) from error
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _rows_per_batch(num_bytes: int, num_rows: int) -> int:
    bytes_per_row = max(1.0, num_bytes / max(num_rows, 1))
    return int(np.clip(_MOST_BYTES / bytes_per_row, 1, _MOST_ROWS))
