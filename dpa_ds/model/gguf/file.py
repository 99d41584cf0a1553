"""Reads a GGUF file as it is on disk: metadata and quantised tensors, through the gguf package."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from dpa_ds.errors import ModelError
from dpa_ds.model.gguf.header import check_counts
from dpa_ds.model.gguf.parts import find_parts, is_split

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own; None where the file names none."""

    unknown: int | None
    bos: int | None
    eos: int
    pad: int


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file, or a split one: metadata by key, and tensors as stored (quantised), memory-mapped."""

    path: Path
    """Of the first part."""
    metadata: Mapping[str, Any]
    tensors: Sequence[gguf.ReaderTensor]

    def require(self, key: str) -> Any:
        """The metadata's value of `key`. Raises ModelError if the file lacks it."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: the GGUF metadata lack {key}: convert the model to GGUF again")
        return self.metadata[key]


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file, or all parts of a split one, of which `path` is any.

    Raises:
        ModelError: a file is missing, truncated, or not a GGUF file, or the parts do not belong together.
    """
    file = _read_one(path)
    if not is_split(file.metadata):
        return file
    parts = [_read_one(part) for part in find_parts(path, file.metadata)]
    tensors: list[gguf.ReaderTensor] = []
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no", 0), part.metadata.get("split.count")) != (number, len(parts)):
            raise ModelError(f"{part.path}: is not part {number + 1} of {len(parts)}: download it again")
        tensors.extend(part.tensors)
    first = parts[0]
    expected = int(first.metadata.get("split.tensors.count", len(tensors)))
    if len(tensors) != expected:
        raise ModelError(
            f"{path}: its {len(parts)} parts hold {len(tensors)} tensors where the model has {expected}: they are not "
            "parts of one model; download them again"
        )
    return GgufFile(first.path, first.metadata, tensors)


def _read_one(path: Path) -> GgufFile:
    if not path.is_file():
        raise ModelError(f"{path}: no such file: model.path must name a GGUF file that is there")
    with path.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(f"{path}: not a GGUF file (it does not begin with 'GGUF'): download it again")
    try:
        check_counts(path)
        reader = gguf.GGUFReader(path)
        metadata = {key: reader_field.contents() for key, reader_field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError, struct.error) as error:
        num_bytes = path.stat().st_size
        raise ModelError(
            f"{path}: truncated or damaged GGUF ({num_bytes:,} bytes; {error}): download it again"
        ) from error
    return GgufFile(path, metadata, reader.tensors)


def special_ids(file: GgufFile) -> SpecialIds:
    """The special tokens of the file; the end token pads where it names no pad token. Raises ModelError without one."""

    def token_id(kind: str) -> int | None:
        return file.metadata.get(f"tokenizer.ggml.{kind}_token_id")

    eos = token_id("eos")
    if eos is None:
        raise ModelError(f"{file.path}: the GGUF metadata name no end token (tokenizer.ggml.eos_token_id)")
    pad = token_id("padding")
    return SpecialIds(unknown=token_id("unknown"), bos=token_id("bos"), eos=eos, pad=eos if pad is None else pad)
