"""A run is read and written under its lock: of two jobs that begin one run, one does, and the other writes nothing."""

import errno
import os
from pathlib import Path

import pytest

from dpa_ds.config.load import to_yaml
from dpa_ds.config.schema import DataConfig, ModelConfig, RunConfig
from dpa_ds.config.validate import fingerprint_sections
from dpa_ds.errors import CheckpointError
from dpa_ds.runs import storage
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.resume import RunLock, find_resume_round, validate_run_dir
from dpa_ds.runs.storage import write_file


def lock_of(run_dir: Path, group: int | None = None) -> RunLock:
    return RunLock(run_dir, group, wait_seconds=0.1)


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    lock_of(tmp_path / "run").acquire()
    assert not (tmp_path / "run").exists()


def test_of_two_jobs_that_begin_a_run_one_does(tmp_path: Path) -> None:
    """Both have looked, and found nothing; whether the first still runs when the second begins is all the same."""
    run_dir = tmp_path / "run"
    first, second = lock_of(run_dir), lock_of(run_dir)
    first.acquire()
    second.acquire()
    first.create()
    for ended in (False, True):
        if ended:
            os.close(first._descriptor or -1)
        with pytest.raises(CheckpointError, match=r"another job has begun .* while this one was starting"):
            second.create()


def test_a_run_is_locked_before_it_is_read(tmp_path: Path) -> None:
    first = lock_of(tmp_path)
    first.create()
    with pytest.raises(CheckpointError, match=r"another job works on .* \(it holds lock\)"):
        lock_of(tmp_path).acquire()
    os.close(first._descriptor or -1)
    again = lock_of(tmp_path)
    again.acquire()
    again.create()  # held already


def test_groups_with_launchers_of_their_own_begin_a_run_together(tmp_path: Path) -> None:
    for group in (0, 1):
        lock = lock_of(tmp_path, group)
        lock.acquire()
        lock.create()
    with pytest.raises(CheckpointError, match="it holds lock_group_1"):
        lock_of(tmp_path, 1).acquire()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    for _ in range(2):
        lock = lock_of(tmp_path)
        lock.acquire()
        lock.create()


def config_of(run_dir: Path) -> RunConfig:
    return RunConfig(
        name=run_dir.name,
        output_dir=str(run_dir.parent),
        model=ModelConfig(path="m"),
        data=DataConfig(path="d"),
    )


def test_what_a_start_leaves_that_was_killed_is_no_other_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml.host.example.7.tmp", "lock", "lock_group_3", "log.txt", "log_group_3.txt", "tensorboard"):
        (run_dir / name).write_text("")
    fingerprint = fingerprint_sections(config_of(run_dir))
    assert validate_run_dir(RunFolder(run_dir), fingerprint) == 0
    (run_dir / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="exists but is not a run"):
        validate_run_dir(RunFolder(run_dir), fingerprint)


def test_another_group_that_writes_the_run_meanwhile_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups with launchers of their own begin together: one has looked for the recipe when the other writes it."""
    config, is_file = config_of(tmp_path / "run"), os.path.isfile
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def look_just_before_the_other_writes(path: Path) -> bool:
        found = is_file(path)
        (run_dir / "config.yaml").write_text(to_yaml(config))
        (run_dir / "model.json").write_text("{}")
        return found

    monkeypatch.setattr(os.path, "isfile", look_just_before_the_other_writes)
    assert validate_run_dir(RunFolder(run_dir), fingerprint_sections(config)) == 0


def test_a_folder_in_the_place_of_the_link_is_refused_before_training(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "adapters").mkdir()
    with pytest.raises(CheckpointError, match="is no link"):
        find_resume_round(RunFolder(tmp_path), fingerprint_sections(config), "auto")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        path.write_text(text[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_file(tmp_path / "config.yaml", "name: x")
    assert not list(tmp_path.iterdir())
