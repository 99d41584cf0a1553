"""Bytes of a data file, read where they are asked for: of the file itself, or of what was decompressed from it.

A file is read, not memory-mapped: one that shrinks under a mapping ends the process without a word.
"""

import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from dpa_ds.errors import DataError

CHUNK_BYTES = 4 << 20
"""Read at a time where a file is read from its beginning to its end."""

# Read ahead where rows are asked for in their order: enough that a row of text costs no call, and little where only
# some rows are wanted.
_AHEAD_BYTES = 64 << 10

# Decompressed data up to here stay in memory, longer ones in a file that has no name.
_MEMORY_BYTES = 8 << 20


class ByteSource(Protocol):
    """Bytes that do not change."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop - 1. Raises OSError, or DataError where they have changed."""

    def release(self) -> None:
        """Close what is open; the next `read` opens it again."""


class FileBytes:
    """A file, open only while it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        with path.open("rb") as file:
            self._identity = _identity(file)
            if self._identity[0] == 0 and file.read(1):  # as those of /proc, which are made while they are read
                raise DataError(f"{path}: is a file of which the system knows no length: copy it to an ordinary one")
        self.size = self._identity[0]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop - 1. Raises DataError where the file is another one than it was."""
        if self._file is None:
            self._file = self._path.open("rb")
            if _identity(self._file) != self._identity:
                self._raise_changed()
        self._file.seek(start)
        content = self._file.read(stop - start)
        if len(content) != stop - start:
            self._raise_changed()
        return content

    def release(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _raise_changed(self) -> None:
        self.release()
        raise DataError(f"{self._path}: changed while it was read: start again once it is complete")


class Spool:
    """Bytes that were made while reading, such as decompressed ones. A temporary file without a name: it goes with
    the process, whatever its end."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_BYTES)  # noqa: SIM115  (as long as its rows)
        self.size = 0

    def append(self, content: bytes) -> int:
        """Add bytes at the end; where they begin. Raises DataError where the disk is full."""
        start = self.size
        try:
            self._file.seek(start)
            self._file.write(content)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise DataError(
                f"{folder} has no room for decompressed data ({error}): set TMPDIR to one that has"
            ) from error
        self.size += len(content)
        return start

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop - 1."""
        self._file.seek(start)
        return self._file.read(stop - start)

    def release(self) -> None:
        """Nothing: it has no name by which it could be opened again."""


class Section:
    """Some bytes of a source as a source, with what follows the last bytes read ahead."""

    def __init__(self, whole: ByteSource, start: int, stop: int) -> None:
        self._whole = whole
        self._start = start
        self.size = stop - start
        self._at = 0
        self._ahead = b""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes start to stop - 1 of the section."""
        end = self._at + len(self._ahead)
        if not self._at <= start <= stop <= end:
            follows = 0 <= start - end <= _AHEAD_BYTES
            last = max(stop, min(start + _AHEAD_BYTES, self.size)) if follows else stop
            self._ahead = self._whole.read(self._start + start, self._start + last)
            self._at = start
        return self._ahead[start - self._at : stop - self._at]

    def release(self) -> None:
        """Close the source."""
        self._at, self._ahead = 0, b""
        self._whole.release()


class SectionReader(io.RawIOBase):
    """A source as a file, for libraries that read files."""

    def __init__(self, source: ByteSource, start: int = 0) -> None:
        self._source = source
        self._at = start

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; the number of bytes, 0 at the end."""
        stop = min(self._at + len(buffer), self._source.size)
        content = self._source.read(self._at, stop)
        buffer[: len(content)] = content
        self._at = stop
        return len(content)


def chunks(source: ByteSource, start: int = 0) -> Iterator[bytes]:
    """The bytes from `start`, in order."""
    for at in range(start, source.size, CHUNK_BYTES):
        yield source.read(at, min(at + CHUNK_BYTES, source.size))


def open_bytes(path: Path, spool: Spool) -> Section:
    """The bytes of a file; of one that ends in .gz or .zst the decompressed ones, which go to `spool`.

    Raises DataError for a compressed file that is damaged, and OSError.
    """
    if not is_compressed(path):
        file = FileBytes(path)
        return Section(file, 0, file.size)
    start = spool.size
    with path.open("rb"):  # the error of a file that is not there, whatever the library makes of it
        pass
    for content in _decompressed(path):
        spool.append(content)
    return Section(spool, start, spool.size)


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in (".gz", ".zst")


def _decompressed(path: Path) -> Iterator[bytes]:
    # Imported here: only compressed files need it.
    import pyarrow

    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else pyarrow.input_stream(path, "zstd") as stream:
            while content := stream.read(CHUNK_BYTES):
                yield content
    except (EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise DataError(f"{path}: not a readable {path.suffix} file ({error}): compress it again") from error


def _identity(file: IO[bytes]) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino
