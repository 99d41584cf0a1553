"""May this job work on this run, and after which round does it resume?"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dpa_ds.config.load import load_config
from dpa_ds.config.validate import diff_configs, fingerprint_sections
from dpa_ds.errors import CheckpointError, storage_errors
from dpa_ds.runs.folder import META, RunFolder
from dpa_ds.runs.storage import UNREADABLE, lock_file, make_folder, sha256_of, verify_folder, write_file
from dpa_ds.runs.tracking import logger

_LEFTOVER = re.compile(r"lock(_group_\d+)?|config\.yaml\..+\.\d+\.tmp|log(_group_\d+)?\.txt|tensorboard")
"""Names of what a start leaves that ended before there was a `config.yaml`: the coordinator writes that, and other
leaders open their curves and logs without waiting for it."""


class RunLock:
    """Keeps other jobs away from a run as long as this object lives: two that write one run would spoil it.

    A run is read, and written, under its lock only. A run that does not exist yet has none: `acquire` then does
    nothing, so that a start that fails leaves nothing behind, and `create` is the first write. The file is made by
    one job and no other, so whoever makes it knows that what it found before, nothing, is still what is there.

    Args:
        group: of the job, where each rank group has a launcher, and a lock, of its own.
        wait_seconds: a job that is ending may hold the lock so long.
    """

    def __init__(self, run_dir: Path, group: int | None, wait_seconds: float) -> None:
        name = "lock" if group is None else f"lock_group_{group}"
        self._path = run_dir / name
        self._wait_seconds = wait_seconds
        self._is_held = False
        self._descriptor: int | None = None
        """Stays open: closing it would give the lock up. None where the file system knows no locks."""

    def acquire(self) -> None:
        """Take the lock of a run that exists, before anything of it is read. Rank 0 of a job.

        Raises:
            CheckpointError: another job works on the run, for longer than a job that is ending would.
        """
        if self._path.exists():
            self._descriptor = lock_file(self._path, self._wait_seconds)
            self._is_held = True

    def create(self) -> None:
        """Take the lock of a run that begins to exist, before anything of it is written. Rank 0 of a job.

        Raises:
            CheckpointError: another job has begun the run since this one looked, or the file system refuses.
        """
        if self._is_held:
            return
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError as error:
                raise CheckpointError(
                    f"another job has begun {self._path.parent} while this one was starting: choose another name, or "
                    "run the same command again to continue it once that job has ended"
                ) from error
        self._descriptor = lock_file(self._path, wait_seconds=0.0)
        self._is_held = True


def validate_run_dir(folder: RunFolder, fingerprint: Mapping[str, Any]) -> int:
    """Make sure that the folder is free, or holds this very run. Writes nothing.

    Args:
        fingerprint: of the recipe, `fingerprint_sections`.

    Returns:
        the last complete round.

    Raises:
        CheckpointError: another run lives here, or the place cannot be written.
    """
    run_dir = folder.run_dir
    _check_recipe(run_dir, fingerprint)
    _check_writable(run_dir, "choose another output_dir")
    return folder.latest_round()


def _check_recipe(run_dir: Path, fingerprint: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run, or something else."""
    recipe = run_dir / "config.yaml"
    # Before the recipe is looked for: groups with launchers of their own begin a run together, and what another one
    # writes behind its recipe must not be seen without it.
    is_free = _is_free(run_dir)
    if os.path.isfile(recipe):  # unlike Path.is_file it takes any path
        old = load_config(["--config", str(recipe)])
        differences = diff_configs(fingerprint_sections(old), fingerprint)
        if differences:
            raise CheckpointError(
                f"{run_dir} holds a different run ({'; '.join(differences)}): choose another name, or delete that "
                "folder"
            )
    elif not is_free:
        raise CheckpointError(f"{run_dir} exists but is not a run (no config.yaml): choose another name")


def _check_writable(run_dir: Path, remedy: str) -> None:
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CheckpointError(f"cannot write results to {run_dir} ({existing}): {remedy}")


def _is_free(run_dir: Path) -> bool:
    """Whether a folder is not there, or holds at most what an earlier start left that had no time for a recipe."""
    if not os.path.lexists(run_dir):
        return True
    return run_dir.is_dir() and all(_LEFTOVER.fullmatch(path.name) for path in run_dir.iterdir())


def find_resume_round(
    folder: RunFolder, fingerprint: Mapping[str, Any], policy: Literal["auto", "never", "must"]
) -> int:
    """The round to resume after, 0 for the beginning. A damaged round is quarantined, and the one before it used.

    Args:
        policy: the recipe's `resume`.

    Raises:
        CheckpointError: as `validate_run_dir`; or `policy` forbids it; or no round is left whole.
    """
    last, run_dir = validate_run_dir(folder, fingerprint), folder.run_dir
    has_progress = folder.has_progress()
    folder.check_link()
    if policy == "never" and (last or has_progress):
        raise CheckpointError(
            f"{run_dir} holds results (up to round {last}), and resume is never: choose another name, delete that "
            "folder, or continue with --resume auto"
        )
    last = _quarantine_damaged_rounds(folder)
    if policy == "must" and last == 0 and not has_progress:
        raise CheckpointError(f"{run_dir} holds nothing to resume from, and resume is must: see output_dir, name")
    if last:
        folder.check_parts(last)
    return last


def validate_private_part(folder: RunFolder, fingerprint: Mapping[str, Any]) -> None:
    """Make sure that the private part of a group is free, or holds this very run. Writes nothing. Leaders.

    Raises:
        CheckpointError: another run lives here, or the place cannot be written.
    """
    part = folder.own_part
    if part == folder.run_dir:
        return
    _check_recipe(part, fingerprint)
    _check_writable(part, "choose another private_dir")


def create_private_part(folder: RunFolder, recipe: str) -> None:
    """Make the private part of a group, closed to others, and say in it which run it belongs to. Leaders.

    Raises:
        CheckpointError: the file system refuses.
    """
    part = folder.own_part
    if part == folder.run_dir:
        return
    with storage_errors(part, "choose another private_dir"):
        make_folder(part, private=True)
    write_file(part / "config.yaml", recipe, private=True)


def _quarantine_damaged_rounds(folder: RunFolder) -> int:
    """Rename what is damaged among the last rounds, so that nothing reads it; the last round that is whole, 0
    if there is none.

    Raises:
        CheckpointError: there are rounds, and none is whole.
    """
    rounds = folder.complete_rounds()
    problems: dict[int, str] = {}
    while rounds:
        problem = _problem_of(folder, rounds[-1])
        if not problem:
            break
        problems[rounds.pop()] = problem
    if problems and not rounds:
        first = next(iter(problems.values()))
        raise CheckpointError(
            f"no complete round of {folder.run_dir} is whole: restore one, or delete the folder ({first})"
        )
    for damaged, problem in problems.items():
        aside = folder.round_dir(damaged).with_name(f"{folder.round_dir(damaged).name}.damaged")
        with storage_errors(aside):
            shutil.rmtree(aside, ignore_errors=True)
            folder.round_dir(damaged).rename(aside)
        logger.warning(f"round {damaged} is damaged and quarantined as {aside}: {problem}")
    return rounds[-1] if rounds else 0


def _problem_of(folder: RunFolder, server_round: int) -> str:
    """What is wrong with a complete round; empty if nothing is."""
    place = folder.round_dir(server_round)
    try:
        states: dict[str, str] = json.loads((place / META).read_text())["states"]
        for name, expected in states.items():
            if sha256_of(place / name) != expected:
                return f"{place / name} (checksum differs)"
            verify_folder((place / name).parent, "not used")
    except PermissionError as error:
        raise CheckpointError(f"{place} cannot be read ({error}): run this as the user who wrote it") from error
    except UNREADABLE as error:
        return f"{place / META} ({error})"
    except CheckpointError as error:
        if isinstance(error.__cause__, PermissionError):  # whole for all that is known
            raise
        return str(error)
    return ""
