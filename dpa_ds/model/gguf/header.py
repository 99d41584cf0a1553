"""The counts in the header of a GGUF file, checked against the size of the file before any memory is taken.

The gguf package believes them: reading past the end gives it empty values, so an array that claims 2^60 elements fills
the memory, whatever the size of the file. Here no element is kept, and arrays of numbers are passed over in one step.
"""

import struct
from pathlib import Path
from typing import BinaryIO

MAX_ARRAY = 1 << 22
"""Elements of an array: the largest vocabularies have 2^18 tokens. The gguf package takes some 200 bytes for each."""
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


def check_counts(path: Path) -> None:
    """Pass over the header of a GGUF file.

    Raises:
        ValueError: it claims more than the file has, or what no GGUF file has; the message says which.
    """
    with path.open("rb") as stream:
        header = _Header(stream, path.stat().st_size)
        header.skip(4)  # the magic
        header.read_version()
        num_tensors = header.count(8)
        num_values = header.count(8)
        for _ in range(num_values):
            header.skip_string("a key")
            header.skip_value(header.count(4))
        for _ in range(num_tensors):
            header.skip_string("the name of a tensor")
            num_dimensions = header.count(4)
            if num_dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor claims {num_dimensions} dimensions")
            header.skip(8 * num_dimensions + 4 + 8)  # the dimensions, the type, the place


class _Header:
    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        self._stream = stream
        self._num_bytes = num_bytes
        self._byte_order = "<"

    def read_version(self) -> None:
        """The version is small, so it shows the byte order of all other numbers."""
        if self.count(4) & 0xFFFF == 0:
            self._byte_order = ">"

    def count(self, num_bytes: int) -> int:
        """The next unsigned number, of 4 or 8 bytes."""
        self._check_left(num_bytes, "a number")
        (number,) = struct.unpack(self._byte_order + {4: "I", 8: "Q"}[num_bytes], self._stream.read(num_bytes))
        return int(number)

    def skip(self, num_bytes: int, what: str = "the header") -> None:
        self._check_left(num_bytes, what)
        self._stream.seek(num_bytes, 1)

    def skip_string(self, what: str) -> None:
        self.skip(self.count(8), what)

    def skip_value(self, kind: int) -> None:
        """A value of the metadata, by the number of its type."""
        if kind == _STRING:
            self.skip_string("a text")
        elif kind == _ARRAY:
            self._skip_array(self.count(4), self.count(8))
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    def _skip_array(self, kind: int, num_elements: int) -> None:
        if num_elements > MAX_ARRAY:
            raise ValueError(f"an array claims {num_elements:,} elements, more than any model has ({MAX_ARRAY:,})")
        if kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind] * num_elements, f"an array of {num_elements:,} elements")
        elif kind == _STRING:
            for _ in range(num_elements):
                self.skip_string("a text")
        else:
            raise ValueError(f"an array has elements of the type {kind}")

    def _check_left(self, num_bytes: int, what: str) -> None:
        left = self._num_bytes - self._stream.tell()
        if num_bytes > left:
            raise ValueError(f"{what} claims {num_bytes:,} bytes where {left:,} are left")
