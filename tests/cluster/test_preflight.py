"""launch/preflight.py over two hosts, and with a slow cable between them."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.machines import Machines
from tests.cluster.test_slurm import TWO_NODES, SlurmJob
from tests.launch.processes import PYTHON, Running, free_port, run_by_hand

pytestmark = pytest.mark.cluster
DEADLINE_SECONDS = 120.0


def test_under_slurm_all_is_well(machines: Machines, model: Path, federation: Path, tmp_path: Path) -> None:
    """Both hosts, by the addresses that the other reaches."""
    argv = tiny.recipe(model, federation, tmp_path / "runs")
    output = SlurmJob(machines, tmp_path / "job.out", "preflight", TWO_NODES, argv).wait()
    assert f"n1 {machines.address(1)} (eth0), n2 {machines.address(2)} (eth0)" in output
    assert "between leaders" in output
    assert "FAILED" not in output


def test_a_slow_cable_is_found(machines: Machines, federation: Path, tmp_path: Path) -> None:
    """An adapter of 3.7 MB over 8 Mbit/s takes seconds: too much of a round that may take ten."""
    model = tiny.make_model(tmp_path / "model", hidden_size=512, intermediate_size=512)
    argv = tiny.recipe(model, federation, tmp_path / "runs", lora__rank=256, federation__timeout_seconds=30)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": machines.address(1), "MASTER_PORT": str(free_port())}
    command = [PYTHON, "launch/preflight.py", *argv, "--json", str(tmp_path / "found.json")]
    with machines.slow(2, "8mbit"):
        ranks = [Running(machines.on(r + 1, command), **common, RANK=str(r), LOCAL_RANK="0") for r in (0, 1)]
        ended = run_by_hand(ranks, DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [3, 3], ended[0].output
    assert "FAILED: between leaders: the leaders: an exchange takes more than 10%" in ended[0].output
    (error,) = (line for one in ended for line in one.errors)
    assert "1 of the checks above failed" in error
    found = json.loads((tmp_path / "found.json").read_text())
    floor = found["needs"]["adapter"] * 8 / 8e6
    assert 0.9 * floor < found["ranks"][0]["exchange_seconds"] < 1.5 * floor


def test_a_folder_that_the_hosts_do_not_share_is_found(
    machines: Machines, model: Path, federation: Path, tmp_path: Path
) -> None:
    """/dev/shm is each host's own."""
    argv = [*tiny.recipe(model, federation, tmp_path / "runs"), "--output_dir", "/dev/shm/runs"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": machines.address(1), "MASTER_PORT": str(free_port())}
    command = [PYTHON, "launch/preflight.py", *argv]
    ranks = [Running(machines.on(r + 1, command), **common, RANK=str(r), LOCAL_RANK="0") for r in (0, 1)]
    ended = run_by_hand(ranks, DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [3, 3], ended[0].output
    assert "n2: does not see what rank 0 writes into output_dir" in ended[0].output
