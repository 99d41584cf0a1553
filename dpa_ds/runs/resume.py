"""May this job work on this run, and after which round does it resume?"""

import json
import os
import shutil

from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import diff_configs, fingerprint_sections
from dpa_ds.errors import CheckpointError, storage_errors
from dpa_ds.runs.folder import META, RunFolder
from dpa_ds.runs.storage import UNREADABLE, lock_file, sha256_of, verify_folder
from dpa_ds.runs.tracking import logger

_held: dict[str, int] = {}
"""Descriptors of the locks of this process, which must stay open."""


def acquire_run_lock(folder: RunFolder, config: RunConfig, creates: bool = False) -> None:
    """Keep other jobs away from this run until the process ends: two that write one run would spoil it. Rank 0 of a job.

    Args:
        creates: the run begins to exist.

    Raises:
        CheckpointError: another job works on it, for longer than a job that is ending would.
    """
    group = config.cluster.group
    path = folder.run_dir / ("lock" if group is None else f"lock_group_{group}")
    if str(path) not in _held:
        descriptor = lock_file(path, config.checkpoint.grace_seconds, creates)
        if descriptor is not None:
            _held[str(path)] = descriptor


def validate_run_dir(folder: RunFolder, config: RunConfig) -> int:
    """Make sure that the folder is free, or holds this very run; the last complete round. Writes nothing.

    Raises:
        CheckpointError: another run lives here, or the place cannot be written.
    """
    run_dir = folder.run_dir
    recipe = run_dir / "config.yaml"
    if os.path.isfile(recipe):  # unlike Path.is_file it takes any path
        old = load_config(["--config", str(recipe)])
        differences = diff_configs(fingerprint_sections(old), fingerprint_sections(config))
        if differences:
            raise CheckpointError(
                f"{run_dir} holds a different run ({'; '.join(differences)}): choose another name, or delete that folder"
            )
    elif os.path.lexists(run_dir) and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise CheckpointError(f"{run_dir} exists but is not a run (no config.yaml): choose another name")
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CheckpointError(f"cannot write results to {run_dir} ({existing}): choose another output_dir")
    return folder.latest_round()


def find_resume_round(folder: RunFolder, config: RunConfig) -> int:
    """The round to resume after, 0 for the beginning. A damaged round is quarantined, and the one before it used.

    Raises:
        CheckpointError: as `claim`; or `config.resume` forbids it; or no round is left whole.
    """
    last, run_dir = validate_run_dir(folder, config), folder.run_dir
    if config.resume == "never" and (last or any(folder.rounds_dir.glob("*.tmp"))):
        raise CheckpointError(
            f"{run_dir} holds results (up to round {last}), and resume is never: choose another name, delete that folder, or "
            "continue with --resume auto"
        )
    problems: dict[int, str] = {}
    for last in reversed(folder.complete_rounds()):
        if not (problem := _problem_of(folder, last)):
            break
        problems[last] = problem
    if last in problems:
        first = next(iter(problems.values()))
        raise CheckpointError(f"no complete round of {run_dir} is whole: restore one, or delete the folder ({first})")
    for damaged, problem in problems.items():
        aside = folder.round_dir(damaged).with_name(f"{folder.round_dir(damaged).name}.damaged")
        with storage_errors(aside):
            shutil.rmtree(aside, ignore_errors=True)
            folder.round_dir(damaged).rename(aside)
        logger.warning(f"round {damaged} is damaged and quarantined as {aside}: {problem}")
    if config.resume == "must" and last == 0 and not any(folder.rounds_dir.glob("*.tmp")):
        raise CheckpointError(f"{run_dir} holds nothing to resume from, and resume is must: see output_dir, name")
    return last


def _problem_of(folder: RunFolder, server_round: int) -> str:
    """What is wrong with a complete round; empty if nothing is."""
    place = folder.round_dir(server_round)
    try:
        states: dict[str, str] = json.loads((place / META).read_text())["states"]
        for name, expected in states.items():
            if sha256_of(place / name) != expected:
                return f"{place / name} (checksum differs)"
            verify_folder((place / name).parent, "not used")
    except UNREADABLE as error:
        return f"{place / META} ({error})"
    except CheckpointError as error:
        return str(error)
    return ""
