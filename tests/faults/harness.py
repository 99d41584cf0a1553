"""Real runs that are killed at random moments and started again: what comes out must be what an undisturbed run gives, to the bit."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import tiny
from tests.faults.checks import curves_are_whole
from tests.launch.processes import Running, adapters, assert_same_adapters, beside_python, free_port

PROGRAM = ("launch/run.py",)
DEADLINE_SECONDS = 180.0
ORPHAN_SECONDS = 60.0
"""Within this time all ranks of a job have ended, whatever was killed."""
SECOND_KILL = 0.3
"""Share of the trials in which the run is killed again while it recovers."""


@dataclass(frozen=True)
class Layout:
    """How the four clients are placed."""

    num_ranks: int
    ranks_per_group: int
    zero_stage: int

    def __str__(self) -> str:
        groups = self.num_ranks // self.ranks_per_group
        return f"{groups} x {self.ranks_per_group} ranks, ZeRO {self.zero_stage}"


LAYOUTS = {Layout(2, 1, 1): 3, Layout(2, 2, 3): 3, Layout(4, 2, 2): 1}
"""And how often each is drawn: four ranks take long to start on two cores."""
VICTIMS = ("rank", "group", "launcher", "everything", "preempted rank", "preempted launcher")


@dataclass
class Trial:
    """What is done to one run, and what came of it."""

    layout: Layout
    victims: list[str]
    moments: list[float]
    """When, as shares of the time that an undisturbed run takes."""
    problem: str = ""
    seconds_to_recover: list[float] = field(default_factory=list)
    """From each start after a kill to the first thing that it saved."""


def draw_trials(num_trials: int, seed: int) -> list[Trial]:
    """The same for the same arguments. Kills are uniform over the run, its start and its end included."""
    drawn = random.Random(seed)
    trials = []
    for number in range(num_trials):
        kills = 1 + (drawn.random() < SECOND_KILL)
        layout = drawn.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        victims = [VICTIMS[number % len(VICTIMS)], *drawn.choices(VICTIMS, k=kills - 1)]
        trials.append(Trial(layout, victims, [drawn.uniform(0.05, 1.0) for _ in range(kills)]))
    return trials


class Harness:
    """Runs trials in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny.make_model(folder / "llama")
        self._data = tiny.make_federation(folder / "federation", sizes=(7, 5, 6, 4))
        self._undisturbed: dict[Layout, tuple[Path, float]] = {}

    def undisturbed(self, layout: Layout) -> tuple[Path, float]:
        """Folder and seconds of a run in this layout that nothing happened to."""
        if layout not in self._undisturbed:
            argv, run_dir = self._recipe(layout, f"undisturbed_{layout.num_ranks}_{layout.zero_stage}")
            with self._start(layout, argv) as running:
                ended = running.wait(DEADLINE_SECONDS)
            assert ended.returncode == 0, ended.output
            self._undisturbed[layout] = run_dir, ended.seconds
        return self._undisturbed[layout]

    def run(
        self,
        trial: Trial,
        name: str,
        program: Sequence[str] = PROGRAM,
        moments: Sequence[Callable[[Path], bool]] = (),
    ) -> None:
        """Do a trial; `trial.problem` is empty if it was survived.

        Args:
            program: what is started again after a kill: PROGRAM, or the same with a planted bug.
            moments: in place of `trial.moments`: the kill comes as soon as one is true of the run's folder.
        """
        expected, seconds = self.undisturbed(trial.layout)
        argv, run_dir = self._recipe(trial.layout, name)
        try:
            for number, victim in enumerate(trial.victims):
                with self._start(trial.layout, argv, program if number else PROGRAM) as running:
                    started = time.time()
                    if moments:
                        _wait_until(lambda: moments[number](run_dir), running)  # noqa: B023
                    else:
                        _wait_until(lambda: time.time() > started + trial.moments[number] * seconds, running)  # noqa: B023
                    _kill(victim, running, trial.layout)
                    _all_gone(running)
                    if number:
                        self._note_recovery(trial, run_dir, started)
            started = time.time()
            with self._start(trial.layout, argv, program) as running:
                ended = running.wait(DEADLINE_SECONDS)
            assert ended.returncode == 0, ended.output
            self._note_recovery(trial, run_dir, started)
            assert_same_adapters(adapters(run_dir), adapters(expected), tolerance=0.0)
            assert comparable_records(run_dir) == comparable_records(expected), "metrics differ"
            curves_are_whole(run_dir)
        except AssertionError as error:
            trial.problem = str(error) or repr(error)

    def _recipe(self, layout: Layout, name: str) -> tuple[list[str], Path]:
        folder = self._folder / name
        folder.mkdir()
        argv = tiny.recipe(
            self._model,
            self._data,
            folder / "runs",
            federation__num_rounds=3,
            train__local_epochs=8.0,
            train__keep_optimizer_state=True,
            lora__dropout=0.1,
            checkpoint__every_steps=2,
            checkpoint__grace_seconds=30,
            cluster__ranks_per_group=layout.ranks_per_group,
            cluster__heartbeat_timeout_seconds=8,
            tracking__tensorboard=True,
            engine__deepspeed_config=f"ds_configs/zero{layout.zero_stage}.json",
        )
        return argv, folder / "runs" / "tiny"

    def _start(self, layout: Layout, argv: Sequence[str], program: Sequence[str] = PROGRAM) -> Running:
        launcher = [beside_python("deepspeed"), "--num_gpus", str(layout.num_ranks), "--master_port", str(free_port())]
        return Running([*launcher, *program, *argv])

    def _note_recovery(self, trial: Trial, run_dir: Path, started: float) -> None:
        """Of what this start saved, the first thing that is still there."""
        saved = [path.stat().st_mtime for path in run_dir.glob("rounds/**/state.json") if path.exists()]
        later = [moment - started for moment in saved if moment > started]
        if later:
            trial.seconds_to_recover.append(min(later))


def _kill(victim: str, running: Running, layout: Layout) -> None:
    """Of what is there: while the ranks are still starting, a launcher stands for them."""
    launchers, ranks = [], {}
    for process in running.remaining():
        with suppress(psutil.Error):
            rank = process.environ().get("RANK")
            if rank is None:
                launchers.append(process)
            else:
                ranks[int(rank)] = process
    number = signal.SIGTERM if victim.startswith("preempted") else signal.SIGKILL
    drawn = random.Random(len(running.output()))
    chosen: list[psutil.Process]
    match victim.removeprefix("preempted "):
        case "rank":
            chosen = [ranks[drawn.choice(sorted(ranks))]] if ranks else launchers
        case "group":
            group = drawn.randrange(layout.num_ranks // layout.ranks_per_group)
            chosen = [
                process for rank, process in ranks.items() if rank // layout.ranks_per_group == group
            ] or launchers
        case "launcher":
            chosen = launchers
        case _:
            chosen = [*launchers, *ranks.values()]
    for process in chosen:
        with suppress(psutil.NoSuchProcess):
            os.kill(process.pid, number)


def _wait_until(condition: Callable[[], bool], running: Running) -> None:
    """Or until the run is over: a kill that comes too late must not do harm either."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while running.process.poll() is None and not condition():
        assert time.monotonic() < deadline, f"hung for {DEADLINE_SECONDS:g} s:\n{running.output()}"
        time.sleep(0.005)


def _all_gone(running: Running) -> None:
    """Nothing of the job is left, without anybody's help."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := running.remaining():
        running.process.poll()
        named = [process.pid for process in left]
        assert time.monotonic() < deadline, f"still there after {ORPHAN_SECONDS:g} s: {named}\n{running.output()}"
        time.sleep(0.05)


def comparable_records(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without times, and without bytes, which are counted by process."""
    leave_out = ("seconds", "tokens_per_second", "restored_tokens", "bytes_handed")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith(leave_out)} for record in records]
