"""Home directories and environment variables in paths, replaced in the same way wherever a user gives a path."""

import os
import re
from pathlib import Path

from dpa_ds.errors import ConfigError

PATH_FIELDS = ("output_dir", "model.path", "data.path", "data.test_path", "engine.deepspeed_config")
"""Fields of a recipe that are expanded as it is read. data.cache_dir and private_dir are expanded where they are used:
they may be another folder on each host, and recipes are compared among hosts."""
CLIENT = "{client}"
"""What stands for a client's name in data.path and data.test_path."""
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})", re.ASCII)


def has_client_files(path: str | None) -> bool:
    """Whether each client has a file or folder of its own there."""
    return path is not None and CLIENT in path


def is_expandable(text: str) -> bool:
    """Whether `expand` knows all of it."""
    return _fault(text) is None


def expand(text: str, given: str) -> Path:
    """The path with `~`, `~user` and `$VARIABLE` replaced.

    Args:
        given: field or option, for the message.

    Raises:
        ConfigError: no such home directory, or the variable is not set.
    """
    fault = _fault(text)
    if not text.strip():
        fault = "must be a path"
    if fault is not None:
        raise ConfigError(f"{given}: {fault}, got {text[:80]!r}")
    return Path(_expand(text))


def _expand(text: str) -> str:
    return os.path.expanduser(os.path.expandvars(text))


def _fault(text: str) -> str | None:
    """What cannot be expanded. The file system would make a folder of that name without a word."""
    expanded = _expand(text)
    if expanded.startswith("~"):
        name = expanded.partition("/")[0]
        return f"{name[:40]} is no home directory here: write the path out, or ./{name[:40]} for a folder of that name"
    for variable in _VARIABLE.findall(text):
        if variable.strip("${}") not in os.environ:
            return f"{variable[:40]} is not set: set it, or write the path out"
    return None
