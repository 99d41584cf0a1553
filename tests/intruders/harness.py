"""Real jobs at work while others come to where they listen: what comes out must be what an undisturbed run gives, to the bit."""

import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import tiny
from tests.launch.processes import (
    PYTHON,
    RUN,
    Forked,
    Running,
    adapters,
    assert_same_adapters,
    free_port,
    run_by_hand,
    wait_for,
)
from tests.launch.test_elastic import last_round, rendezvous
from tests.sockets import listening

DEADLINE_SECONDS = 150.0
RUN_SECONDS = 1800.0
"""Bound on the disturbed run: on two cores each program that intrudes slows it."""
Arguments = Sequence[str]
Intruder = Callable[["RunningJob", random.Random], None]


@dataclass
class RunningJob:
    """A run at work."""

    processes: list[Running]
    """Its ranks, or its groups and their rendezvous."""
    argv: Arguments
    """Its recipe."""
    others: Path
    """Folder for the runs of intruders."""
    intrude: Callable[[Arguments, str, int], list[Running]]
    """Starts a program that comes to where this job is: `intrude(argv, program, number of ranks or groups)`."""
    num_intruders: int = 0
    silent: list[socket.socket] = field(default_factory=list)
    """Connections that are kept open and say nothing."""

    @property
    def ranks(self) -> list[Running]:
        """Those of `processes` that train."""
        return [one for one in self.processes if RUN[1] in one.command]

    def ports(self) -> list[tuple[str, int]]:
        """Where something can be said to it."""
        found = listening(process for running in self.processes for process in running.remaining())
        return sorted(("127.0.0.1" if address in ("0.0.0.0", "::") else address, port) for address, port in found)

    def refuses(self, argv: Arguments, program: str = RUN[1], number: int = 2) -> None:
        """A program that is not of this job ends, with one line, while this job continues."""
        ended = run_by_hand(self.intrude(argv, program, number), DEADLINE_SECONDS)
        output = "\n\n".join(one.output for one in ended)
        assert all(one.returncode not in (0, 1) for one in ended), output
        assert sum(len(one.errors) for one in ended) == 1, output
        assert sum(one.num_tracebacks for one in ended) == 0, output
        self.assert_at_work()

    def own_recipe(self, *words: str) -> list[str]:
        """This job's, for a run of another name, with `words` added."""
        self.num_intruders += 1
        return [*self.argv, "--name", f"intruder_{self.num_intruders}", "--output_dir", str(self.others), *words]

    def assert_at_work(self) -> None:
        """None of its processes has ended: an intruder that comes after the end says nothing."""
        for running in self.processes:
            assert running.process.poll() is None, running.output()


# ---- who comes ----------------------------------------------------------------------------------------------------


def bad_recipe(job: RunningJob, _: random.Random) -> None:
    """A mistake in the recipe."""
    job.refuses(job.own_recipe("--train.learning_rate", "fast"))


def other_recipe(job: RunningJob, _: random.Random) -> None:
    """Another learning rate."""
    job.refuses(job.own_recipe("--train.learning_rate", "0.5"))


def same_recipe(job: RunningJob, _: random.Random) -> None:
    """The same command once more."""
    job.refuses(job.argv)


def other_program(job: RunningJob, _: random.Random) -> None:
    """The probe of the hosts, where a run trains."""
    job.refuses(job.own_recipe(), "launch/preflight.py")


def other_number(job: RunningJob, _: random.Random) -> None:
    """Three ranks, or a group of three."""
    job.refuses(job.own_recipe(), number=3)


def scanner(job: RunningJob, _: random.Random) -> None:
    """Connects to everything, and hangs up."""
    for place in job.ports():
        with suppress(OSError):
            socket.create_connection(place, 5).close()
    job.assert_at_work()


def garbage(job: RunningJob, drawn: random.Random) -> None:
    """Says something to everything: a request of the web, or random bytes."""
    text = drawn.choice([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", drawn.randbytes(drawn.randrange(1, 5000))])
    for place in job.ports():
        with suppress(OSError), socket.create_connection(place, 5) as connection:
            connection.sendall(text)
            connection.settimeout(0.2)
            connection.recv(1)
    job.assert_at_work()


def silent(job: RunningJob, _: random.Random) -> None:
    """Connects to everything, and stays."""
    for place in job.ports():
        with suppress(OSError):
            job.silent.append(socket.create_connection(place, 5))
    job.assert_at_work()


OF_ALL = (bad_recipe, other_recipe, same_recipe, other_number, scanner, garbage, silent)
INTRUDERS: dict[str, Sequence[Intruder]] = {"fixed": (*OF_ALL, other_program), "elastic": OF_ALL}
"""Who comes, by mode. The probe of the hosts meets nobody at a rendezvous."""


# ---- where they come to -------------------------------------------------------------------------------------------


class Harness:
    """Runs jobs in `folder`, and lets others come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny.make_model(folder / "llama")
        self._data = tiny.make_federation(folder / "federation", sizes=(7, 5))

    def disturb(
        self, mode: str, intruders: Sequence[Intruder], seed: int, report: Callable[[str], object] = len
    ) -> None:
        """Train while `intruders` come, one after the other, and then train undisturbed: equal, or AssertionError.

        Args:
            mode: of MODES.
            report: called with a line for each of them.
        """
        drawn = random.Random(seed)
        folder = self._folder / f"{mode}_{seed}"
        # Rounds without end; it is stopped once all have been here.
        argv = self._recipe(folder, 100_000)
        with MODES[mode](argv, folder / "others") as job:
            wait_for(folder / "runs" / "tiny", "rounds/round_000001/meta.json", job.processes, DEADLINE_SECONDS)
            for number, intruder in enumerate(intruders, 1):
                intruder(job, drawn)
                report(f"{number}/{len(intruders)} {mode}: {intruder.__name__}, and the job continues")
            after = last_round(folder / "runs" / "tiny") + 1
            wait_for(folder / "runs" / "tiny", f"rounds/round_{after:06d}/meta.json", job.processes, DEADLINE_SECONDS)
            _stop(job)
        num_rounds = last_round(folder / "runs" / "tiny")
        disturbed = adapters(folder / "runs" / "tiny", num_rounds)
        expected = self._folder / f"{mode}_{seed}_undisturbed"
        with MODES[mode](self._recipe(expected, num_rounds), expected / "others") as job:
            ended = [rank.wait(RUN_SECONDS) for rank in job.ranks]
        assert all(one.returncode == 0 for one in ended), ended[0].output
        assert_same_adapters(disturbed, adapters(expected / "runs" / "tiny", num_rounds), tolerance=0.0)

    def _recipe(self, folder: Path, num_rounds: int) -> list[str]:
        folder.mkdir()
        settings = {
            "federation__num_rounds": num_rounds,
            "train__max_steps": 2,
            "checkpoint__keep_rounds": 1000,
            "federation__timeout_seconds": 120,
            "cluster__timeout_seconds": 60,
            "cluster__heartbeat_timeout_seconds": 60,
        }
        return tiny.recipe(self._model, self._data, folder / "runs", **settings)


def _stop(job: RunningJob) -> None:
    for rank in job.ranks:
        rank.process.terminate()
    for rank in job.ranks:
        rank.wait(DEADLINE_SECONDS)
    for connection in job.silent:
        connection.close()


@contextmanager
def fixed(argv: Arguments, others: Path) -> Iterator[RunningJob]:
    """Two ranks, each a group; others have the same MASTER_PORT."""
    port = free_port()

    def start(argv: Arguments, program: str = RUN[1], num_ranks: int = 2) -> list[Running]:
        common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [PYTHON, program, *argv]
        return [Forked(command, **common, RANK=str(i), LOCAL_RANK=str(i)) for i in range(num_ranks)]

    ranks = start(argv)
    try:
        yield RunningJob(ranks, argv, others, start)
    finally:
        for rank in ranks:
            rank.__exit__()


@contextmanager
def elastic(argv: Arguments, others: Path) -> Iterator[RunningJob]:
    """Two groups with launchers of their own; others come to their rendezvous as group 1 once more."""

    with rendezvous(argv) as (meeting, gate):

        def start(argv: Arguments, group: int, program: str = RUN[1]) -> Running:
            own = ["--cluster.group", str(group), "--cluster.rendezvous", meeting]
            secret = Path(argv[1]).with_name("runs") / "tiny.secret"
            variables = {"DPA_DS_SECRET": secret.read_text()} if "--output_dir" in argv else {}
            return Forked([PYTHON, program, *argv, *own], DS_ACCELERATOR="cpu", **variables)

        def intrude(argv: Arguments, program: str, num_groups: int) -> list[Running]:
            return [start([*argv, "--cluster.num_groups", str(num_groups)], 1, program)]

        groups = [start(argv, group) for group in range(2)]
        try:
            yield RunningJob([*groups, gate], argv, others, intrude)
        finally:
            for group in groups:
                group.__exit__()


MODES = {"fixed": fixed, "elastic": elastic}
