"""Every script of launch/slurm, submitted to a real Slurm of two nodes."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.cluster.machines import NUM_CPUS, Machines
from tests.launch.processes import RUN, adapters, assert_same_adapters, run_by_hand, start_by_hand
from tests.launch.test_elastic import last_round, presence

pytestmark = pytest.mark.cluster
DEADLINE_SECONDS = 150.0
SILENCE_SECONDS = 3
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
ONE_TASK = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
Arguments = Callable[..., list[str]]


class SlurmJob:
    """A script of launch/slurm that was submitted."""

    def __init__(
        self, machines: Machines, output: Path, script: str, options: list[str], argv: list[str], **variables: str
    ) -> None:
        self._machines, self._output = machines, output
        command = ["sbatch", "--parsable", f"--output={output}", *options, f"launch/slurm/{script}.sbatch", *argv]
        self.number = machines.ask(*command, **variables)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self._output.read_text() if self._output.exists() else ""

    @property
    def state(self) -> str:
        """Slurm's word."""
        return self._machines.job_state(self.number)

    def wait_for(self, what: Callable[[], object]) -> None:
        """Until `what()` is true; the job has not ended otherwise."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not what():
            assert time.monotonic() < deadline, f"{self.state}: {self.output}"
            assert self.state not in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED"), self.output
            time.sleep(0.2)

    def wait(self) -> str:
        """Until it is complete; its output."""
        self.wait_for(lambda: self.state == "COMPLETED")
        return self.output


@pytest.fixture
def arguments(model: Path, federation: Path, tmp_path: Path) -> Arguments:
    """Two clients, phases of a second or more, with dropout: all of the state counts."""

    def arguments(**overrides: object) -> list[str]:
        settings = {
            "federation__num_rounds": 3,
            "train__max_steps": 100,
            "lora__dropout": 0.1,
            "checkpoint__every_steps": 20,
            "cluster__heartbeat_timeout_seconds": SILENCE_SECONDS,
            "federation__timeout_seconds": 20,
        }
        return tiny.recipe(model, federation, tmp_path / "runs", **{**settings, **overrides})

    return arguments


@pytest.fixture(scope="module")
def undisturbed(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test that needs it: the run of `arguments()` on one host."""
    return {}


@pytest.mark.parametrize("how", ["preempted", "requeued", "node lost"])
def test_train_resumes_by_itself(
    how: str, machines: Machines, arguments: Arguments, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    """The job starts again, inside the round where it was, and ends with the bits of a run on one host."""
    argv, run_dir = arguments(), tmp_path / "runs" / "tiny"
    job = SlurmJob(machines, tmp_path / "job.out", "train", TWO_NODES, argv)
    job.wait_for(lambda: list(run_dir.glob("rounds/round_000002.tmp/progress/*/*/state.json")))
    match how:
        case "preempted":
            wanted = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
            machines.ask(*wanted, "--wrap", "sleep 3")
        case "requeued":
            machines.ask("scontrol", "requeue", job.number)
        case "node lost":
            machines.crash(2)
            job.wait_for(lambda: job.state == "PENDING")
            machines.boot(2)
    output = job.wait()
    assert "start 2, on n[1-2]" in output
    assert "continues after round 1 of 3" in output
    expected = {"preempted": "stopped by SIGUSR1", "requeued": "stopped by SIGTERM", "node lost": "Node failure on n2"}
    assert expected[how] in output
    if not undisturbed:
        alone = tmp_path / "alone"
        alone.mkdir()
        ended = run_by_hand(start_by_hand([*RUN, *argv, "--output_dir", str(alone)], 2), DEADLINE_SECONDS)
        assert [one.returncode for one in ended] == [0, 0], ended[0].output
        undisturbed["run"] = alone / "tiny"
    assert_same_adapters(adapters(run_dir), adapters(undisturbed["run"]), tolerance=0.0)


def test_the_end_of_its_time_is_not_the_end(machines: Machines, arguments: Arguments, tmp_path: Path) -> None:
    """USR1 before the time limit, which Slurm keeps to the half minute: the job saves, and starts again with new time."""
    argv, run_dir = arguments(federation__num_rounds=1000, checkpoint__keep_rounds=1000), tmp_path / "runs" / "tiny"
    job = SlurmJob(machines, tmp_path / "job.out", "train", [*TWO_NODES, "--time=2", "--signal=USR1@60"], argv)
    try:
        job.wait_for(lambda: "start 2, on n[1-2]" in job.output)
        done = last_round(run_dir)
        job.wait_for(lambda: last_round(run_dir) > done)
    finally:
        machines.cancel_all()
    assert "stopped by SIGUSR1" in job.output
    assert f"continues after round {done} of 1000" in job.output
    alone = tmp_path / "alone"
    alone.mkdir()
    words = ["--output_dir", str(alone), "--federation.num_rounds", str(done + 1)]
    ended = run_by_hand(start_by_hand([*RUN, *argv, *words], 2), DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [0, 0], ended[0].output
    assert_same_adapters(adapters(run_dir, done + 1), adapters(alone / "tiny", done + 1), tolerance=0.0)


def test_a_lost_node_is_not_the_end_of_train_groups(machines: Machines, arguments: Arguments, tmp_path: Path) -> None:
    """The other group continues alone; once the node is back, the lost one runs there as a job of its own, and joins."""
    run_dir = tmp_path / "runs" / "tiny"
    argv = arguments(federation__num_rounds=500, train__max_steps=30, checkpoint__keep_rounds=500)
    whole_node = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--cpus-per-task={NUM_CPUS}"]
    job = SlurmJob(machines, tmp_path / "job.out", "train_groups", whole_node, argv, RANKS="1 1")
    try:
        job.wait_for((run_dir / "rounds/round_000002/meta.json").exists)
        machines.crash(2)
        crashed = time.monotonic()
        job.wait_for(lambda: presence(run_dir).get(last_round(run_dir)) == [0])
        print(f"the survivor's next round was complete {time.monotonic() - crashed:.1f} s after the node was lost")
        job.wait_for(lambda: "it gets a job of its own" in job.output)
        machines.boot(2)
        alone = last_round(run_dir)
        job.wait_for(lambda: [0, 1] in [presence(run_dir)[r] for r in range(alone, last_round(run_dir))])
        assert (
            machines.ask("squeue", "--noheader", f"--name=dpa_ds-again-{job.number}", "--format=%T %N") == "RUNNING n2"
        )
    finally:
        machines.cancel_all()
    assert "group 1: of its nodes n2 one is lost" in job.output


def assert_nothing_is_left(folder: Path) -> None:
    """No process of a job over the recipe in `folder`, on any host: the rendezvous, which waits for ever, either."""
    deadline = time.monotonic() + 10
    while left := [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if mentions(p.info["cmdline"], folder)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def mentions(command: list[str] | None, folder: Path) -> bool:
    return any(word.startswith(str(folder)) for word in command or ())


def test_groups_of_unequal_size(machines: Machines, arguments: Arguments, tmp_path: Path) -> None:
    """A group over two nodes would need more ranks than there are cores here: two ranks on n1, one on n2."""
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    output = SlurmJob(
        machines, tmp_path / "job.out", "train_groups", options, arguments(train__max_steps=30), RANKS="2 1"
    ).wait()
    assert "group 0: 2 ranks on n1; clients 0" in output
    assert "group 1: 1 rank on n2; clients 1" in output
    assert presence(tmp_path / "runs" / "tiny") == {r: [0, 1] for r in range(4)}
    assert_nothing_is_left(tmp_path)


def test_groups_of_a_heterogeneous_job(machines: Machines, arguments: Arguments, tmp_path: Path) -> None:
    """A component for each group, of other nodes and sizes."""
    first = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    second = [":", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--cpus-per-task={NUM_CPUS}"]
    output = SlurmJob(
        machines, tmp_path / "job.out", "train_groups", [*first, *second], arguments(train__max_steps=30)
    ).wait()
    assert re.search("group 0: 2 ranks on n[12]; clients 0", output), output
    assert re.search("group 1: 1 rank on n[12]; clients 1", output), output
    assert presence(tmp_path / "runs" / "tiny") == {r: [0, 1] for r in range(4)}
    assert_nothing_is_left(tmp_path)


def test_train_then_evaluate_then_compare(machines: Machines, arguments: Arguments, tmp_path: Path) -> None:
    """A chain of jobs, each behind the one before; a sweep's tasks train one method each, and the last job makes the table."""
    argv = arguments(train__max_steps=2, federation__num_rounds=1, generation__max_new_tokens=4)
    trained = SlurmJob(machines, tmp_path / "train.out", "train", ONE_TASK, argv)
    run_dir = tmp_path / "runs" / "tiny"
    behind = [*ONE_TASK, f"--dependency=afterok:{trained.number}"]
    evaluated = SlurmJob(machines, tmp_path / "evaluate.out", "evaluate", behind, ["--run", str(run_dir)])
    sweep = {"METHODS": "fedit local", "SEEDS": "0"}
    compared = [*argv, "--name", "sweep"]
    pairs = SlurmJob(machines, tmp_path / "sweep-%a.out", "sweep", [*ONE_TASK, "--array=0-1"], compared, **sweep)
    table = SlurmJob(
        machines,
        tmp_path / "sweep.out",
        "sweep",
        [*ONE_TASK, f"--dependency=afterok:{pairs.number}"],
        compared,
        **sweep,
    )
    assert "adapters (PEFT format)" in trained.wait()
    assert "report:" in evaluated.wait()
    assert list(run_dir.glob("evaluations/*/*/summary.json"))
    output = table.wait()
    for index, method in enumerate(("fedit", "local")):
        assert f"{method}-seed0" in (tmp_path / f"sweep-{index}.out").read_text()
        assert json.loads((tmp_path / "runs" / "sweep" / f"{method}-seed0" / "results.json").read_text())
    assert "training" not in output, "the last job found all done"
    assert "fedit" in output
