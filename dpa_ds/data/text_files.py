"""JSON arrays, JSON lines and CSV files: where each row is, found once, and the row itself, read when it is asked for.

Every row is parsed once as the file is opened, so that a fault ends a job at its start. Raises DataError with file and
line or row.
"""

import codecs
import csv
import io
import json
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dpa_ds.data.byte_source import ByteSource, Section, SectionReader, chunks
from dpa_ds.errors import DataError

_BOM = codecs.BOM_UTF8

# Characters that a scanner of JSON looks at together; more where one value is longer.
_WINDOW = 1 << 20
_WHITE_SPACE = re.compile("[ \t\n\r]*")


class TextRows:
    """Rows of a text file by their first and last bytes: sixteen bytes of memory each, and eight for a line number."""

    def __init__(
        self,
        path: Path,
        source: Section,
        starts: npt.NDArray[np.int64],
        stops: npt.NDArray[np.int64],
        lines: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._path = path
        self._source = source
        self._starts = starts
        self._stops = stops
        self._lines = lines

    def __len__(self) -> int:
        return len(self._starts)

    def text(self, index: int) -> str:
        """The row as it is written."""
        return self._source.read(int(self._starts[index]), int(self._stops[index])).decode("utf-8")

    def values(self, index: int) -> dict[str, Any]:
        """Cells of row `index` by column."""
        row: dict[str, Any] = json.loads(self.text(index))
        return row

    def place(self, index: int) -> str:
        """Row `index` for messages: by its line, or by its number where the file is one array."""
        if self._lines is None:
            return f"{self._path}: row {index + 1}"
        return f"{self._path}:{self._lines[index]}"

    def release(self) -> None:
        """Close the file."""
        self._source.release()


class CsvRows(TextRows):
    """Rows of a CSV file."""

    header: tuple[str, ...] = ()

    def values(self, index: int) -> dict[str, Any]:
        """Cells of row `index` by column."""
        text = self.text(index)
        with _any_cell_length(len(text)):
            fields = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        return dict(zip(self.header, fields, strict=True))


def open_json(path: Path, source: Section, field: str | None, may_be_array: bool) -> TextRows:
    """Rows of an array of objects, or of one object a line.

    Args:
        field: where the file is one object, the one of its fields that has the rows.
        may_be_array: the file need not be lines.
    """
    start = _check_text(path, source)
    first = _first_character(source, start)
    if may_be_array and first == "[":
        return _open_array(path, source, start)
    starts, stops = _find_lines(source, start)
    if may_be_array and first == "{" and _is_one_object(source, starts, stops):
        if field is not None:
            return _open_field(path, source, start, field)
        _refuse_fields(path, source, start)
    return _open_lines(path, source, starts, stops)


def open_csv(path: Path, source: Section) -> CsvRows:
    """Rows of a CSV file, whose first line names the columns."""
    start = _check_text(path, source)
    consumed = start

    def read_lines() -> Iterator[str]:
        nonlocal consumed
        # newline="": a line ends where csv says so, and a quoted line break stays what it is.
        for line in io.TextIOWrapper(io.BufferedReader(SectionReader(source, start)), "utf-8", newline=""):
            consumed += len(line.encode("utf-8"))
            yield line

    reader = csv.reader(read_lines(), strict=True)
    starts, stops, lines = array("q"), array("q"), array("q")
    with _any_cell_length(source.size):
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}:1: a column name occurs twice in {header}: rename one")
            begin = consumed
            for fields in reader:
                if fields and len(fields) != len(header):
                    place = f"{path}:{reader.line_num}"
                    raise DataError(f"{place}: {len(fields)} fields, but the header has {len(header)}: quote commas")
                if fields:  # else it is a blank line
                    starts.append(begin)
                    stops.append(consumed)
                    lines.append(reader.line_num)
                begin = consumed
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error}): check quotes") from error
    rows = CsvRows(path, source, _integers(starts), _integers(stops), _integers(lines))
    rows.header = tuple(header)
    return rows


def _check_text(path: Path, source: ByteSource) -> int:
    """Refuse what is no text in UTF-8; where the text begins, behind the mark that some editors write."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_lines = 0
    nul_line = 0
    pending = b""  # of a character that the last chunk has begun
    for chunk in chunks(source):
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            # What is decoded is the rest of the last chunk, which has no line break, and this chunk.
            line = num_lines + (pending + chunk).count(b"\n", 0, error.start) + 1
            byte = error.object[error.start]
            raise DataError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8: convert the file to UTF-8") from error
        pending = decoder.getstate()[0]
        if not nul_line and b"\0" in chunk:
            nul_line = num_lines + chunk.count(b"\n", 0, chunk.index(b"\0")) + 1
        num_lines += chunk.count(b"\n")
    if pending:
        line = num_lines + 1
        raise DataError(f"{path}:{line}: byte 0x{pending[0]:02x} is not UTF-8: convert the file to UTF-8")
    if nul_line:
        raise DataError(f"{path}:{nul_line}: contains a NUL byte: the file is damaged or not UTF-8; write it again")
    return len(_BOM) if source.read(0, min(3, source.size)) == _BOM else 0


def _first_character(source: ByteSource, start: int) -> str:
    for chunk in chunks(source, start):
        text = chunk.decode("utf-8", "ignore").lstrip()
        if text:
            return text[0]
    return ""


def _find_lines(source: ByteSource, start: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First byte of each line, and the byte behind its last. Not splitlines(): U+2028 may stand inside a string."""
    found = []
    at = start
    for chunk in chunks(source, start):
        found.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + at)
        at += len(chunk)
    breaks = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    starts = np.concatenate([np.array([start]), breaks + 1]).astype(np.int64)
    stops = np.concatenate([breaks, np.array([source.size])]).astype(np.int64)
    return starts, stops


def _open_lines(path: Path, source: Section, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> TextRows:
    is_filled = np.ones(len(starts), dtype=bool)
    for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        text = source.read(start, stop).decode("utf-8")
        if not text.strip():
            is_filled[index] = False
            continue
        item = _parse_json(text, path, index + 1)
        if not isinstance(item, dict):
            _refuse_item(f"{path}:{index + 1}", item)
    lines = np.flatnonzero(is_filled) + 1
    return TextRows(path, source, starts[is_filled], stops[is_filled], lines)


def _refuse_item(place: str, item: object) -> NoReturn:
    raise DataError(f"{place}: expected an object with named columns, got {type(item).__name__}")


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


# ---- JSON of which the whole is one value --------------------------------------------------------------------------


class _Scanner:
    """Reads JSON values one after the other, a window of the text at a time.

    It looks at bytes as if each were a character: what is no ASCII stands inside strings only, and positions are bytes.
    """

    def __init__(self, source: ByteSource, start: int) -> None:
        self._source = source
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._text_at = start
        self.at = start
        """Byte that comes next."""

    def next_character(self) -> str:
        """The next one that is no white space; "" at the end."""
        while True:
            white_space = _WHITE_SPACE.match(self._text, self.at - self._text_at)
            assert white_space is not None, "it matches the empty text, too"
            self.at = self._text_at + white_space.end()
            if self.at < self._text_at + len(self._text):
                return self._text[self.at - self._text_at]
            if self.at >= self._source.size:
                return ""
            self._read_window(_WINDOW)

    def expect(self, characters: str) -> str:
        """Step over the next character, which is one of these. Raises ValueError where it is not."""
        found = self.next_character()
        if not found or found not in characters:
            raise ValueError(f"expected one of {characters}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value. Raises ValueError, or RecursionError."""
        self.next_character()
        size = _WINDOW
        while True:
            is_whole = self._text_at + len(self._text) >= self._source.size
            try:
                item, end = self._decoder.raw_decode(self._text, self.at - self._text_at)
            except json.JSONDecodeError:
                if is_whole:
                    raise
            else:
                # A number at the end of the window may have further digits.
                if end < len(self._text) or is_whole:
                    self.at = self._text_at + end
                    return item
            self._read_window(size)
            size *= 4

    def _read_window(self, size: int) -> None:
        """Look at the next `size` bytes."""
        content = self._source.read(self.at, min(self.at + size, self._source.size))
        self._text = content.decode("latin-1")
        self._text_at = self.at


def _open_array(path: Path, source: Section, start: int) -> TextRows:
    scanner = _Scanner(source, start)
    try:
        scanner.expect("[")
        starts, stops = _scan_items(scanner, f"{path}")
        if scanner.next_character():
            raise ValueError("more behind the array")
    except (ValueError, RecursionError):
        _refuse_json(path, source, start)
    return TextRows(path, source, starts, stops)


def _open_field(path: Path, source: Section, start: int, field: str) -> TextRows:
    """Rows of an object's field."""
    scanner = _Scanner(source, start)
    found = None
    names: dict[str, str] = {}
    try:
        scanner.expect("{")
        while scanner.next_character() != "}":
            # Bytes were read as characters: the name is what they mean as UTF-8.
            name = str(scanner.value()).encode("latin-1", "replace").decode("utf-8", "replace")
            scanner.expect(":")
            names[name] = "list"
            if name == field and scanner.next_character() == "[":
                scanner.expect("[")
                found = _scan_items(scanner, f"{path}: field {field!r}")
            else:
                names[name] = type(scanner.value()).__name__
            if scanner.next_character() != "}":
                scanner.expect(",")
        scanner.expect("}")
        if scanner.next_character():
            raise ValueError("more behind the object")
    except (ValueError, RecursionError):
        _refuse_json(path, source, start)
    if found is None:
        lists = [name for name, kind in names.items() if kind == "list" and name != field]
        what = f"field {field!r} is {names[field]}, not a list" if field in names else f"no field {field!r}"
        remedy = f"one of {lists}" if lists else "null, for a file that is an array or has one object a line"
        raise DataError(f"{path}: {what}; fields are {sorted(names)}: set data.field to {remedy}")
    return TextRows(path, source, *found)


def _scan_items(scanner: _Scanner, place: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First byte of each object of an array whose bracket was read, and the byte behind its last."""
    starts, stops = array("q"), array("q")
    if scanner.next_character() == "]":
        scanner.expect("]")
    else:
        while True:
            scanner.next_character()
            starts.append(scanner.at)
            item = scanner.value()
            if not isinstance(item, dict):
                _refuse_item(f"{place}: row {len(starts)}", item)
            stops.append(scanner.at)
            if scanner.expect(",]") == "]":
                break
    return _integers(starts), _integers(stops)


def _refuse_json(path: Path, source: ByteSource, start: int) -> NoReturn:
    """The error of the whole text, whose place is exact."""
    _parse_json(source.read(start, source.size).decode("utf-8"), path, 1)
    raise DataError(f"{path}:1: JSON that cannot be read: write the file again, one object a line")


def _is_one_object(source: ByteSource, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> bool:
    """Whether a text that begins with a brace is one object, and not one a line."""
    filled = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if source.read(start, stop).strip():
            filled.append((start, stop))
        if len(filled) == 2:
            break
    if len(filled) == 1:
        return True
    try:
        json.loads(source.read(*filled[0]).decode("utf-8"))
    except (ValueError, RecursionError):
        return True
    return False


def _refuse_fields(path: Path, source: ByteSource, start: int) -> None:
    """Refuse one object of which a field has the rows; return where it is a row itself, or no JSON."""
    try:
        whole = json.loads(source.read(start, source.size).decode("utf-8"))
    except (ValueError, RecursionError):
        return
    fields = []
    for name, value in whole.items():
        if isinstance(value, list) and value and all(_is_row(item) for item in value):
            fields.append(name)
    if len(fields) == 1:
        raise DataError(f"{path}: is one object, whose field {fields[0]!r} has rows: set data.field to {fields[0]!r}")
    if fields:
        raise DataError(f"{path}: is one object, whose fields {fields} have rows: set data.field to one of them")


def _is_row(item: object) -> bool:
    # Messages of a conversation are a list of objects, too: such an object is a row.
    return isinstance(item, dict) and not ({"role", "from"} & item.keys())


# ---- CSV -----------------------------------------------------------------------------------------------------------


@contextmanager
def _any_cell_length(length: int) -> Iterator[None]:
    """Meanwhile a cell may have so many characters. The library's limit is 131,072, one for the whole process."""
    usual_limit = csv.field_size_limit()
    csv.field_size_limit(max(length, usual_limit, 1))
    try:
        yield
    finally:
        csv.field_size_limit(usual_limit)


def _integers(numbers: "array[int]") -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)
