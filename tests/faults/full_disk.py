"""Runs whose disk is full from one of their writes on, and which are started again once there is room.

The disk is a small file system of its own (tmpfs), which `small_disk` mounts; the run fills it itself with the write
that the trial names (tests/faults/observed.py), so every write has its turn.
"""

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import tiny
from tests.faults.checks import curves_are_whole, nothing_is_lost
from tests.faults.harness import comparable_records
from tests.faults.observed import FILLER
from tests.launch.processes import PYTHON, Ended, Forked, adapters, assert_same_adapters

PROGRAM = "tests/faults/observed.py"
DEADLINE_SECONDS = 120.0
NUM_ROUNDS = 2
SIZES = (7, 5)
ROOM_BYTES = (0, 4096, 40960)
"""What is left: nothing; the rest of a page for each file; enough for a small file, and not for an adapter."""
DISK = "size=16m"


@dataclass
class FullDiskTrial:
    """When the disk is full, and what came of it."""

    write: int
    """Number of the write that finds it full, from 1."""
    bytes_left: int
    problem: str = ""
    outcome: str = ""
    """How the run ended: the write, without the names of folders; or that it needed no more room."""
    seconds: float = 0.0


def draw_full_disk_trials(num_trials: int, num_writes: int, seed: int) -> list[FullDiskTrial]:
    """The writes of a run, each as often as the others, spread evenly over the run."""
    drawn = random.Random(seed)
    trials = []
    for number in range(num_trials):
        write = 1 + int((number + drawn.random()) * num_writes / num_trials)
        trials.append(FullDiskTrial(min(write, num_writes), drawn.choice(ROOM_BYTES)))
    return trials


def can_mount() -> bool:
    """Whether this process may have file systems of its own (root may; else start under `unshare -rm`)."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own at `folder`."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class FullDiskHarness:
    """Runs trials in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny.make_model(folder / "llama")
        self._data = tiny.make_federation(folder / "federation", sizes=SIZES)
        runs = folder / "undisturbed" / "runs"
        runs.mkdir(parents=True)
        ended = self._run(runs, FAULT_FILL=f"0 0 {runs}")
        assert ended.returncode == 0, ended.output
        self._undisturbed = runs / "tiny"
        self.num_writes = int(Path(f"{runs}.writes").read_text())
        """Writes of an undisturbed run: its lock, recipe, tokens, progress, rounds, records, curves and results."""

    def run(self, trial: FullDiskTrial, name: str) -> None:
        """Do a trial; `trial.problem` is empty if the run ended with one line, and then as if nothing had been."""
        started = time.monotonic()
        folder = self._folder / name
        folder.mkdir()
        with small_disk(folder / "runs") as runs:
            try:
                self._try(trial, runs)
            except (AssertionError, OSError, ValueError, KeyError) as error:
                trial.problem = str(error) or repr(error)
        trial.seconds = time.monotonic() - started

    def _try(self, trial: FullDiskTrial, runs: Path) -> None:
        ended = self._run(runs, FAULT_FILL=f"{trial.write} {trial.bytes_left} {runs}")
        has_lost_curves = "without TensorBoard curves" in ended.output
        assert ended.num_tracebacks == 0, ended.output
        if ended.returncode == 0:
            trial.outcome = "ended without more room"
            assert not ended.errors, ended.output
        else:
            assert (ended.returncode, len(ended.errors)) == (4, 1), ended.output
            assert "No space left on device" in ended.errors[0], ended.output
            assert "run the same command again" in ended.errors[0], ended.output
            trial.outcome = ended.errors[0].partition(":")[2].partition(":")[0].replace(str(runs), "")
        (runs / FILLER).unlink(missing_ok=True)
        ended = self._run(runs)
        assert ended.returncode == 0, ended.output
        run_dir = runs / "tiny"
        assert_same_adapters(adapters(run_dir), adapters(self._undisturbed), tolerance=0.0)
        assert comparable_records(run_dir) == comparable_records(self._undisturbed), "metrics differ"
        nothing_is_lost(run_dir, NUM_ROUNDS)
        if not has_lost_curves:
            curves_are_whole(run_dir)

    def _run(self, runs: Path, **variables: str) -> Ended:
        argv = tiny.recipe(
            self._model,
            self._data,
            runs,
            federation__num_rounds=NUM_ROUNDS,
            federation__aggregation_weights="num_examples",
            train__max_steps=3,
            train__keep_optimizer_state=True,
            lora__dropout=0.1,
            checkpoint__every_steps=2,
            checkpoint__keep_rounds=1,
            checkpoint__grace_seconds=5,
            tracking__tensorboard=True,
        )
        with Forked([PYTHON, PROGRAM, *argv], DS_ACCELERATOR="cpu", **variables) as running:
            return running.wait(DEADLINE_SECONDS)
