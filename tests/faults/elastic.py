"""Groups with launchers of their own that are killed at a named step of a round, and come back."""

import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import tiny
from tests.faults.checks import curves_are_whole, nothing_is_lost, rounds_are_means
from tests.faults.observed import COORDINATOR_STEPS, STEPS
from tests.launch.processes import PYTHON, Forked, Running, free_port

PROGRAM = "tests/faults/observed.py"
SIZES = (3, 5, 6, 7)
"""Examples of the clients: no two sets of them have the same sum."""
NUM_ROUNDS = 5
DEADLINE_SECONDS = 240.0
STORM_KILLS = 5
STORM_EVERY = 5
"""Every fifth trial is a storm."""
KILLED, AGAIN = -9, (3, 4)
"""Exit status of a group that was killed; and of one that says: start it again."""
MOST_STARTS = 40


@dataclass
class ElasticTrial:
    """What is done to one run of several groups, and what came of it."""

    num_groups: int
    faults: list[list[str]]
    """Of each group: the step at which each start of it ends ("rename 3"); later starts are left alone."""
    pause_seconds: float
    """Between the end of a group and its next start."""
    kills: list[str] = field(default_factory=list)
    """Steps that were reached."""
    rounds_without: int = 0
    """Rounds that were completed while some group was away."""
    seconds_to_return: list[float] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line."""
        planned = "; ".join(f"group {group}: {', '.join(steps)}" for group, steps in enumerate(self.faults) if steps)
        return f"{self.num_groups} groups, {planned}"


def draw_elastic_trials(num_kills: int, seed: int) -> list[ElasticTrial]:
    """At least `num_kills` kills over all trials: every step in turn, each by 2 and by 3 groups; the same for the same
    arguments."""
    drawn = random.Random(seed)
    steps = [(step, num_groups) for num_groups in (2, 3) for step in STEPS]
    drawn.shuffle(steps)
    trials: list[ElasticTrial] = []
    planned = 0
    while planned < num_kills:
        number = len(trials)
        step, num_groups = steps[number % len(steps)]
        faults: list[list[str]] = [[] for _ in range(num_groups)]
        if number % STORM_EVERY == STORM_EVERY - 1:
            for _ in range(STORM_KILLS):
                # Of any round: a start that comes late reaches it, too.
                faults[drawn.randrange(num_groups)].append(f"{drawn.choice(list(STEPS))} 0")
        else:
            # The first group is the coordinator; another one reaches the coordinator's steps only after it.
            group = 0 if step in COORDINATOR_STEPS else drawn.randrange(num_groups)
            server_round = NUM_ROUNDS if step == "end of run" else drawn.randrange(2, NUM_ROUNDS)
            faults[group].append(f"{step} {server_round}")
        planned += sum(map(len, faults))
        trials.append(ElasticTrial(num_groups, faults, drawn.uniform(0.0, 2.0)))
    return trials


class ElasticHarness:
    """Runs trials in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny.make_model(folder / "llama")
        self._data = tiny.make_federation(folder / "federation", sizes=SIZES)

    def run(self, trial: ElasticTrial, name: str) -> None:
        """Do a trial; `trial.problem` is empty if nothing was lost."""
        folder = self._folder / name
        folder.mkdir()
        argv = tiny.recipe(
            self._model,
            self._data,
            folder / "runs",
            federation__num_rounds=NUM_ROUNDS,
            federation__aggregation_weights="num_examples",
            federation__timeout_seconds=30,
            train__max_steps=4,
            train__keep_optimizer_state=True,
            lora__dropout=0.1,
            checkpoint__every_steps=2,
            checkpoint__keep_rounds=1,
            checkpoint__grace_seconds=10,
            cluster__heartbeat_timeout_seconds=3,
            cluster__timeout_seconds=15,  # how long a group that comes back waits for others that have ended
            tracking__tensorboard=True,
        )
        started = time.monotonic()
        try:
            self._until_done(trial, argv, folder)
            run_dir = folder / "runs" / "tiny"
            trial.rounds_without = _rounds_without(run_dir)
            nothing_is_lost(run_dir, NUM_ROUNDS)
            rounds_are_means(run_dir, folder / "dump", NUM_ROUNDS, SIZES)
            curves_are_whole(run_dir)
        except (AssertionError, OSError, ValueError, KeyError) as error:
            trial.problem = str(error) or repr(error)
        trial.seconds = time.monotonic() - started

    def _until_done(self, trial: ElasticTrial, argv: list[str], folder: Path) -> None:
        """Start every group again until it ends well."""
        port = free_port()
        with Forked([PYTHON, "launch/rendezvous.py", *argv, "--port", str(port)]) as rendezvous:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while "rendezvous for tiny at" not in rendezvous.output():
                assert rendezvous.process.poll() is None, rendezvous.output()
                assert time.monotonic() < deadline, rendezvous.output()
                time.sleep(0.02)
            groups = []
            for number, steps in enumerate(trial.faults):
                groups.append(_Group(number, trial.num_groups, steps, argv, port, folder))
            try:
                while not all(group.is_done for group in groups):
                    outputs = "\n\n".join(f"group {g.number}: {g.outputs[-1][-3000:]}" for g in groups if g.outputs)
                    assert time.monotonic() < deadline, f"hung for {DEADLINE_SECONDS:g} s: {outputs}"
                    for group in groups:
                        group.look_after(trial)
                    time.sleep(0.02)
            finally:
                for group in groups:
                    group.close()


class _Group:
    """One group, which is started again until it ends with 0."""

    def __init__(
        self, number: int, num_groups: int, faults: list[str], argv: list[str], port: int, folder: Path
    ) -> None:
        self.number = number
        self.is_done = False
        self.outputs: list[str] = []
        self._faults = list(faults)
        self._command = [PYTHON, PROGRAM, *argv, "--cluster.group", str(number)]
        self._command += ["--cluster.num_groups", str(num_groups)]
        self._command += ["--cluster.rendezvous", f"127.0.0.1:{port}"]
        self._folder = folder
        self._running: Running | None = None
        self._fault = ""
        self._start_at = 0.0
        self._num_starts = 0

    def look_after(self, trial: ElasticTrial) -> None:
        """Start it if it is time; note its end."""
        if self.is_done:
            return
        if self._running is None:
            if time.monotonic() >= self._start_at:
                self._start(trial)
            return
        if self._running.process.poll() is None:
            return
        status = self._running.process.returncode
        self.outputs.append(self._running.output())
        note = f"[{time.strftime('%X')}] start {self._num_starts}, to end at {self._fault or 'none'}, ended with {status}\n"
        with (self._folder / f"group_{self.number}.log").open("a") as log:
            log.write(f"{self.outputs[-1]}{note}")
        self.close()
        self._start_at = time.monotonic() + trial.pause_seconds
        self.is_done = status == 0
        if status == KILLED:
            trial.kills.append(self._fault)
        else:
            assert status in (0, *AGAIN), f"group {self.number} ended with {status}: {self.outputs[-1]}"
            assert "Traceback" not in self.outputs[-1], self.outputs[-1]

    def _start(self, trial: ElasticTrial) -> None:
        self._num_starts += 1
        assert self._num_starts < MOST_STARTS, f"group {self.number} ends again and again: {self.outputs[-1]}"
        self._fault = self._faults.pop(0) if self._faults else ""
        self._running = Forked(
            self._command,
            DS_ACCELERATOR="cpu",
            FAULT_STEP=self._fault,
            FAULT_DUMP=str(self._folder / "dump"),
            FAULT_GROUPS=str(trial.num_groups),
        )

    def close(self) -> None:
        """End it, if it runs."""
        if self._running is not None:
            self._running.__exit__()
            self._running = None


def _rounds_without(run_dir: Path) -> int:
    """Rounds that lack a client."""
    count = 0
    present: dict[int, int] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        with suppress(KeyError):
            record = json.loads(line)
            present[record["round"]] = present.get(record["round"], 0) + bool(record["client"] >= 0)
    for num_present in present.values():
        count += num_present < len(SIZES)
    return count
