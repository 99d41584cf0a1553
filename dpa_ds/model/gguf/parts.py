"""A GGUF model in several files, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf and so forth."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa_ds.errors import ModelError

_PART = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def named_parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of by its name, the first part first; there or not."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['name']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def is_split(metadata: Mapping[str, Any]) -> bool:
    """Whether a file with these metadata holds a part of a model."""
    return int(metadata.get("split.count", 1)) > 1


def find_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All files of the split model that `path`, with these metadata, is a part of, the first part first.

    Raises:
        ModelError: one of them is missing, or they are not named as gguf-split names them.
    """
    number, count = int(metadata.get("split.no", 0)) + 1, int(metadata["split.count"])
    parts = named_parts(path)
    if len(parts) != count or parts[number - 1] != path:
        raise ModelError(
            f"{path}: is part {number} of {count} of a model: name it NAME-{number:05d}-of-{count:05d}.gguf and put "
            "the other parts beside it, or merge them with llama.cpp's gguf-split --merge"
        )
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{path}: is part {number} of {count} of a model, and {part} is missing: put it there")
    return parts
