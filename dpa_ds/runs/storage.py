"""Writes files that appear whole or not at all (another name, fsync, rename), and folders with their checksums.

Only safetensors and JSON are used: nothing that is read from disk can run code.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file

from dpa_ds.adapters.state import AdapterState
from dpa_ds.errors import CheckpointError, storage_errors

STATE = "state.json"
SHARED_FILE, PRIVATE_FILE = 0o666, 0o600
"""Modes of new files, less the umask: everybody's, and those of what a client keeps to itself."""
SHARED_FOLDER, PRIVATE_FOLDER = 0o777, 0o700
"""Modes of new folders, less the umask."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that reading a damaged JSON file, and looking into it, raises."""

_NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Of what the file system reports, the errors that bad content causes."""

# Writes that may wait in a BackgroundWriter: each holds its tensors in memory.
_MAX_PENDING_WRITES = 2


@dataclass(frozen=True)
class SavedFolder:
    """The content of a folder that `write_folder` wrote."""

    tensors: dict[str, AdapterState]
    """The content of each safetensors file, by the file's name without suffix."""
    info: dict[str, Any]


def write_folder(
    folder: Path, tensors: Mapping[str, AdapterState], info: Mapping[str, Any], private: bool = False
) -> None:
    """Write `tensors` as <name>.safetensors beside the files that `folder` holds already, and `state.json`.

    `state.json` holds the checksums of all files, and `info`; it is written last, so a folder that has it is whole.

    Args:
        private: only the owner may read the folder and each of its files; else the umask decides.

    Raises:
        CheckpointError: the file system refuses.
    """
    with storage_errors(folder):
        make_folder(folder, private)
        for name, state in tensors.items():
            _write_tensors(folder / f"{name}.safetensors", state)
        checksums = {}
        for path in sorted(folder.iterdir()):
            if path.name != STATE:
                if private:
                    path.chmod(PRIVATE_FILE)
                fsync(path)
                checksums[path.name] = sha256_of(path)
        content = {
            "sha256": checksums,
            "info": dict(info),
            "info_sha256": _digest(dict(info)),
        }
        write_file(folder / STATE, json.dumps(content, indent=1), private)
        fsync(folder.parent)  # the names of the files, too, must survive a power cut


def make_folder(folder: Path, private: bool) -> None:
    """Make a folder and those above it. A private one is closed to others, also where it was there before."""
    if not private:
        folder.mkdir(parents=True, exist_ok=True)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
    folder.chmod(PRIVATE_FOLDER)


def _write_tensors(path: Path, state: AdapterState) -> None:
    """One safetensors file, with the mode that the umask gives: the library's own is the owner's alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_folder(folder: Path, remedy: str) -> SavedFolder:
    """Read a folder that `write_folder` wrote, and compare its files with their checksums.

    Raises:
        CheckpointError: a file is missing or damaged; the message ends with `remedy`.
    """
    info = verify_folder(folder, remedy)
    tensors = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            tensors[path.stem] = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(folder, error, remedy) from error
    return SavedFolder(tensors, info)


def copy_folder(source: Path, target: Path) -> None:
    """Replace `target` by a private copy of `source`, a folder that `write_folder` wrote, and wait until it is on the
    disk.

    Raises:
        CheckpointError: the file system refuses.
    """
    with storage_errors(target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        target.chmod(PRIVATE_FOLDER)  # an older version left them open
        for path in target.iterdir():
            path.chmod(PRIVATE_FILE)
            fsync(path)
        fsync(target)
        fsync(target.parent)


def is_whole(folder: Path) -> bool:
    """Whether a folder that `write_folder` wrote is there, with all its files as they were written."""
    try:
        verify_folder(folder, "not used")
    except CheckpointError:
        return False
    return True


def verify_folder(folder: Path, remedy: str) -> dict[str, Any]:
    """Compare every file of a folder with its checksum, and return the folder's `info`.

    Raises:
        CheckpointError: a file is missing or damaged; the message ends with `remedy`.
    """
    info = read_info(folder, remedy)
    try:
        damaged = _damaged_file(folder, dict(json.loads((folder / STATE).read_text())["sha256"]))
    except UNREADABLE as error:
        raise _unreadable(folder, error, remedy) from error
    if damaged is not None:
        raise CheckpointError(f"{folder / damaged} is damaged (checksum differs): {remedy}")
    return info


def read_info(folder: Path, remedy: str) -> dict[str, Any]:
    """The `info` of a folder that `write_folder` wrote, compared with its checksum; no other file is looked at.

    Raises:
        CheckpointError: it is missing or damaged; the message ends with `remedy`.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        info = dict(state["info"])
        is_whole = state["info_sha256"] == _digest(info)
    except UNREADABLE as error:
        raise _unreadable(folder, error, remedy) from error
    if not is_whole:
        raise CheckpointError(f"{folder / STATE} is damaged (checksum differs): {remedy}")
    return info


@contextlib.contextmanager
def well_formed(what: object, remedy: str) -> Iterator[None]:
    """Turn what looking into content raises whose checksums are right, but which no run wrote, into one CheckpointError
    that ends with `remedy`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{what} holds what no run writes ({type(error).__name__}: {lines[0][:200]}): {remedy}"
        ) from error


def check_finite(folder: Path, state: AdapterState, remedy: str) -> None:
    """Raise CheckpointError, with `remedy` at its end, if a tensor of `state` has NaN or infinity."""
    bad = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise CheckpointError(f"{folder} has NaN or infinity in {bad[0]}{more}: {remedy}")


def write_file(path: Path, text: str, private: bool = False) -> None:
    """Write `text` to `path` whole or not at all.

    Args:
        private: only the owner may read it; else the umask decides.

    Raises:
        CheckpointError: the file system refuses.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Leaders on several hosts may write the same file at once.
        temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            temporary.touch(PRIVATE_FILE if private else SHARED_FILE)  # before there is anything in it
            write_text(temporary, text)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # a disk that is full, too, is left as it was
        fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to a new file and wait until it is on the disk."""
    path.write_text(text)
    fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_file(path: Path, wait_seconds: float) -> int | None:
    """Lock the file `path` until this process ends, however it ends.

    Waits for another process that holds the lock: it may just be saving its last step.

    Returns:
        the file's descriptor, which must stay open; None on a file system without locks.

    Raises:
        CheckpointError: another process holds the lock for longer than `wait_seconds`, or the file system refuses.
    """
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR)
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise CheckpointError(
                    f"another job works on {path.parent} (it holds {path.name}): wait for its end or stop it, "
                    "or choose another name"
                ) from None
            time.sleep(0.1)
        except OSError:
            # No locks on this file system: better to train unprotected than not at all.
            os.close(descriptor)
            return None


class BackgroundWriter:
    """Runs writes one after the other in a thread, beside the training. Leaving the context waits for all of them.

    The data of a submitted write must not change any more: pass tensors that nobody writes to again.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def submit(self, write: Callable[[], None]) -> None:
        """Call `write()` soon. Waits while two are unfinished, so that a slow disk cannot fill the memory.

        Raises:
            CheckpointError: an earlier write failed.
        """
        while len(self._pending) >= _MAX_PENDING_WRITES:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(write))

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: a write failed.
        """
        while self._pending:
            self._pending.pop(0).result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            # An error that ends the training is the one to report.
            if kind is None:
                raise
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _unreadable(folder: Path, error: Exception, remedy: str) -> CheckpointError:
    """The error of a folder that cannot be read. `remedy` is for bad content: what is private, or on a disk that
    fails, is whole for all that is known, and must not be deleted."""
    if isinstance(error, PermissionError):
        remedy = "it is private to the user who wrote it: run this as that user, or have the owner run it"
    elif isinstance(error, OSError) and not isinstance(error, _NOT_A_FILE):
        remedy = "look at the file system, then run the same command again"
    return CheckpointError(f"{folder} cannot be read ({error}): {remedy}")


def _damaged_file(folder: Path, checksums: dict[str, str]) -> str | None:
    """Name of the first file whose checksum differs. Raises OSError where one is missing."""
    for file, expected in checksums.items():
        if sha256_of(folder / file) != expected:
            return file
    return None


def _digest(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()
