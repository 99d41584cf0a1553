"""Errors that are the user's to mend: each message names the value, what is allowed, and the remedy."""

import contextlib
from collections.abc import Iterator, Sequence

from safetensors import SafetensorError


class DpaError(Exception):
    """Base of every error that is printed once, without a traceback, before the job ends with `exit_code`."""

    exit_code = 2


class ConfigError(DpaError):
    """The recipe, an override or a combination of both is not usable."""


class DataError(DpaError):
    """A data file is missing, empty or malformed; the message names file and line where there is one."""


class ModelError(DpaError):
    """The model directory or its adapters cannot be used as configured."""


class MemoryLimitError(DpaError):
    """What the recipe asks for does not fit the memory of the device or of the host."""


class ClusterError(DpaError):
    """Ranks, hosts or launchers do not fit together."""

    exit_code = 3


class TrainingError(DpaError):
    """A client's training diverged."""

    exit_code = 5


class CheckpointError(DpaError):
    """Saved state cannot be read, or belongs to another run."""

    exit_code = 4


class Preempted(DpaError):
    """Asked to stop by a signal: everything is saved, and the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextlib.contextmanager
def storage_errors(
    what: object,
    remedy: str = "earlier rounds are intact: make room or choose another output_dir, then run the same command again",
) -> Iterator[None]:
    """Turn a refusal of the file system, such as a full disk, into one CheckpointError: `what`, why, `remedy`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {what}: {error}; {remedy}") from error


def list_some(names: Sequence[str]) -> str:
    """The names with commas between them, for a message; of more than eight the first eight."""
    text = ", ".join(names[:8])
    if len(names) > 8:
        text += ", ..."
    return text
