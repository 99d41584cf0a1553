"""Starts commands as a user would, each with a deadline after which everything that it started is killed.

torchrun and mpirun put their ranks into sessions of their own, so a process group does not hold them all: a mark in
the environment, which every descendant inherits, does.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.ranks import _forkserver

REPOSITORY = Path(__file__).parents[2]
PYTHON = sys.executable
RUN = [PYTHON, "launch/run.py"]
MARK = "DPA_DS_TEST_MARK"
LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI", "PMIX_", "MV2_", "TORCHELASTIC_", "MASTER_")
LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"}


@dataclass(frozen=True)
class Ended:
    """What came of a command."""

    returncode: int
    output: str
    """stdout and stderr together, as they were written."""
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines that tell the user what to mend."""
        return [line for line in self.output.splitlines() if "error: " in line]

    @property
    def num_tracebacks(self) -> int:
        """Exceptions printed as Python prints them."""
        return self.output.count("Traceback (most recent call last)")


class Running:
    """A started command; use as a context manager, so that nothing of it is left whatever the test does."""

    def __init__(self, command: Sequence[str], cwd: Path = REPOSITORY, **variables: str) -> None:
        self._mark = uuid.uuid4().hex
        # Not a pipe: nobody needs to read it for the ranks to continue.
        self._output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self._started = time.monotonic()
        self.command = list(command)
        # What it starts in this way in turn belongs to both.
        marks = f"{os.environ.get(MARK, '')} {self._mark}".strip()
        self.process = self._start(cwd, {**own_environment(), MARK: marks, **variables})

    def _start(self, cwd: Path, environment: dict[str, str]) -> Any:
        """The process, in a session of its own."""
        return subprocess.Popen(
            self.command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    def kill(self) -> None:
        """SIGKILL for everything that this command started."""
        while remaining := self.remaining():
            for process in remaining:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()

    def remaining(self) -> list[psutil.Process]:
        """Processes of this command that still run."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # ended meanwhile, or belongs to another user
                if process.status() != psutil.STATUS_ZOMBIE and self._owns(process):
                    found.append(process)
        return found

    def _owns(self, process: psutil.Process) -> bool:
        return self._mark in process.environ().get(MARK, "").split()

    def wait(self, deadline_seconds: float) -> Ended:
        """Wait until the command has ended, and every rank with it (some launchers leave ranks behind)."""
        try:
            self.process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.command} hung for {deadline_seconds:g} s:\n{self.output()}") from None
        seconds = time.monotonic() - self._started
        grace = time.monotonic() + 10.0
        while (left := self.remaining()) and time.monotonic() < grace:
            time.sleep(0.05)
        assert not left, f"{self.command} left {[p.cmdline() for p in left]} behind:\n{self.output()}"
        return Ended(self.process.returncode, self.output(), seconds)

    def output(self) -> str:
        """What was written so far."""
        self._output.seek(0)
        return self._output.read()


class Forked(Running):
    """`python launch/PROGRAM ARGV` in a process forked from one that has imported everything: no start of 5 s and more.

    The process as such is as good as a started one; what the start itself does is for tests with a launcher to show.
    """

    def _start(self, cwd: Path, environment: dict[str, str]) -> "ForkedProcess":
        assert self.command[0] == PYTHON, self.command
        work = (self.command[1:], cwd, self._output.name, environment)
        return ForkedProcess(_forkserver().Process(target=_run_program, args=work, daemon=True))

    def _owns(self, process: psutil.Process) -> bool:
        """It, its session, and what these have started: the mark is seen in programs only, not in a process that was forked."""
        with suppress(ProcessLookupError):
            return self.process.pid in (process.pid, os.getsid(process.pid)) or super()._owns(process)
        return False


class ForkedProcess:
    """What tests use of `subprocess.Popen`, of a process that another one has forked; it starts here."""

    def __init__(self, process: Any) -> None:
        self._process = process
        process.start()
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Less than 0: the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its `returncode`, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until its end."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[str], deadline_seconds: float = 120.0, cwd: Path = REPOSITORY, **variables: str) -> Ended:
    """Start `command` with `variables` in its environment and wait for its end."""
    with Running(command, cwd, **variables) as running:
        return running.wait(deadline_seconds)


def type_into(command: Sequence[str], typed: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with these lines on its standard input, its output and errors apart."""
    return subprocess.run(
        command,
        input=typed,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=own_environment(),
        timeout=120,
    )


def start_by_hand(command: Sequence[str], num_ranks: int) -> list[Forked]:
    """A process for each rank, without a launcher that would end the others if one fails: srun without --kill-on-bad-exit."""
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Forked(command, **common, RANK=str(i), LOCAL_RANK=str(i)) for i in range(num_ranks)]


def wait_for(folder: Path, pattern: str, running: Sequence[Running], deadline_seconds: float) -> None:
    """Until a file of `folder` is there, while all of `running` continue."""
    deadline = time.monotonic() + deadline_seconds
    while not list(folder.glob(pattern)):
        assert all(one.process.poll() is None for one in running), "\n\n".join(one.output() for one in running)
        assert time.monotonic() < deadline, f"no {pattern}: " + "\n\n".join(one.output() for one in running)
        time.sleep(0.01)


def run_by_hand(ranks: Sequence[Running], deadline_seconds: float = 120.0) -> list[Ended]:
    """Wait for ranks that were started one by one, without a launcher that would end the others if one fails."""
    deadline = time.monotonic() + deadline_seconds
    try:
        return [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.__exit__()


def run_forked(
    argv: Sequence[str], deadline_seconds: float = 120.0, program: str = "launch/run.py", **variables: str
) -> Ended:
    """`python PROGRAM ARGV`, `Forked`, until its end."""
    with Forked([PYTHON, program, *argv], **variables) as running:
        return running.wait(deadline_seconds)


def adapters(run_dir: Path, server_round: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the global and all local adapters of a run, after its last round or after `server_round`."""
    folder = run_dir / ("adapters" if server_round is None else f"rounds/round_{server_round:06d}")
    tensors = {
        f"{path.parent.relative_to(folder)}/{key}": tensor
        for path in sorted(folder.glob("**/adapter_model.safetensors"))
        for key, tensor in load_file(path).items()
    }
    assert any(key.startswith("global/") for key in tensors), sorted(tensors)
    return tensors


def assert_same_adapters(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal keys, shapes and values, each tensor within `tolerance` of the expected one's norm."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].shape == tensor.shape, key
        difference = float((actual[key] - tensor).norm())
        assert difference <= tolerance * float(tensor.norm()), f"{key}: {difference:g} apart"
        assert float(tensor.norm()) > 0, f"{key} is zero: nothing was trained"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def beside_python(name: str) -> str:
    """The launcher that belongs to this python."""
    return str(Path(PYTHON).with_name(name))


def own_environment() -> dict[str, str]:
    """This process's environment without what some launcher left there; never a hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }
    path = f"{Path(PYTHON).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _run_program(argv: list[str], cwd: Path, output: str, environment: dict[str, str]) -> None:
    """Body of the forked process."""
    os.setsid()
    file = os.open(output, os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
