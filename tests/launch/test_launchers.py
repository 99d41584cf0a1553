"""One recipe, every launcher: the same adapters come out, whoever started the ranks and however many there are."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.processes import (
    PYTHON,
    REPOSITORY,
    RUN,
    Ended,
    Running,
    adapters,
    assert_same_adapters,
    beside_python,
    free_port,
    own_environment,
    run,
    run_by_hand,
)

pytestmark = pytest.mark.launch


def deepspeed(arguments: list[str]) -> Ended:
    port = str(free_port())
    return run([beside_python("deepspeed"), "--num_gpus", "2", "--master_port", port, "launch/run.py", *arguments])


def torchrun(arguments: list[str]) -> Ended:
    port = str(free_port())
    command = [beside_python("torchrun"), "--nproc-per-node", "2", "--master-port", port]
    return run([*command, "launch/run.py", *arguments])


def mpirun(arguments: list[str]) -> Ended:
    return run([beside_python("mpirun"), "-n", "2", *RUN, *arguments])


def srun(arguments: list[str]) -> Ended:
    """What a Slurm step of two tasks on one node gives each of them; slurmd itself is not here."""
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(free_port())}
    ranks = [Running([*RUN, *arguments], **common, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    first, second = run_by_hand(ranks)
    return Ended(first.returncode or second.returncode, first.output + second.output, first.seconds)


def python(arguments: list[str]) -> Ended:
    """One rank that hosts both clients in turn."""
    return run([*RUN, *arguments])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, model: Path, federation: Path) -> Callable[..., tuple[Ended, Path]]:
    """Train the recipe with a launcher; what it printed and the run's folder."""

    def start(launcher: Callable[[list[str]], Ended]) -> tuple[Ended, Path]:
        folder = tmp_path_factory.mktemp(launcher.__name__)
        recipe = tiny.recipe(model, federation, folder / "runs", engine__deepspeed_config="ds_configs/zero2.json")
        return launcher(recipe), folder / "runs" / "tiny"

    return start


@pytest.fixture(scope="module")
def one_rank(start: Callable[..., tuple[Ended, Path]]) -> tuple[Ended, Path]:
    """The run that all others must equal."""
    return start(python)


def check_records(run_dir: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clients = [(record["round"], record["client"]) for record in records if record["kind"] == "client"]
    assert sorted(clients) == [(r, client) for r in range(3) for client in range(2)]
    assert [record["round"] for record in records if record["kind"] == "round"] == [0, 1, 2]


def test_one_rank_hosts_both_clients(one_rank: tuple[Ended, Path]) -> None:
    ended, run_dir = one_rank
    assert ended.returncode == 0, ended.output
    assert "group 0: 1 rank on" in ended.output
    assert "clients 0, 1" in ended.output
    assert not ended.errors
    check_records(run_dir)
    names = {key.rpartition("/")[0] for key in adapters(run_dir)}
    assert names == {"global", "local/client_00", "local/client_01"}


@pytest.mark.parametrize("launcher", [deepspeed, torchrun, mpirun, srun], ids=lambda launcher: launcher.__name__)
def test_same_adapters_under(
    launcher: Callable[[list[str]], Ended], start: Callable[..., tuple[Ended, Path]], one_rank: tuple[Ended, Path]
) -> None:
    ended, run_dir = start(launcher)
    assert ended.returncode == 0, ended.output
    assert not ended.errors, ended.output
    assert "2 clients in 2 rank groups (2 ranks)" in ended.output
    assert ended.output.count("held-out loss fell for") == 1, "one rank reports"
    check_records(run_dir)
    # Two leaders averaged over gloo what one rank averaged alone: the same sum, in another order at most.
    assert_same_adapters(adapters(run_dir), adapters(one_rank[1]), tolerance=1e-5)


def test_help_and_print_config_are_printed_once_and_start_nothing(
    tmp_path: Path, model: Path, federation: Path
) -> None:
    recipe = tiny.recipe(model, federation, tmp_path / "runs")
    command = [beside_python("mpirun"), "-n", "2", PYTHON, "launch/run.py", *recipe]
    printed = run([*command, "--print_config"])
    assert printed.returncode == 0, printed.output
    assert printed.output.count("local_epochs: 1.0") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("chosen", [None, "1"])
def test_torchrun_does_not_leave_cores_idle(chosen: str | None) -> None:
    """It sets OMP_NUM_THREADS to 1 for several ranks that have none; what the user sets counts."""
    environment = {**own_environment(), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    del environment["OMP_NUM_THREADS"]
    if chosen is not None:
        environment["OMP_NUM_THREADS"] = chosen
    command = [beside_python("torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    ended = subprocess.run(
        [*command, "tests/launch/says_threads.py"], cwd=REPOSITORY, env=environment, capture_output=True, timeout=100
    )
    expected = chosen or len(os.sched_getaffinity(0))
    assert ended.stdout.decode().count(f"threads={expected}\n") == 2, ended.stderr.decode()
