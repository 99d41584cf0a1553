"""launch/preflight.py on one host; over hosts and a slow cable: tests/cluster."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.processes import PYTHON, beside_python, free_port, run

pytestmark = pytest.mark.launch
ROWS = ("code, packages, config", "1 hosts", "placement", "devices", "free host memory", "output_dir", "clocks")


@pytest.mark.parametrize(("ranks_per_group", "network"), [(1, "between leaders"), (2, "inside a group")])
def test_two_ranks(ranks_per_group: int, network: str, tmp_path: Path, model: Path, federation: Path) -> None:
    """Two groups exchange an adapter; one group gathers weights. Nothing is left behind."""
    found = tmp_path / "found.json"
    argv = tiny.recipe(model, federation, tmp_path / "runs", cluster__ranks_per_group=ranks_per_group)
    launcher = [beside_python("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    ended = run([*launcher, "launch/preflight.py", *argv, "--json", str(found)])
    assert ended.returncode == 0, ended.output
    report = json.loads(found.read_text())
    assert [row["what"] for row in report["checks"]] == [*ROWS, network]
    assert all(f"{row['what']} " in ended.output for row in report["checks"])
    assert "FAILED" not in ended.output
    leader, other = report["ranks"]
    assert (leader["gather_bandwidth"] > 1e6) == (ranks_per_group == 2)
    assert (0 < leader["exchange_seconds"] < 1) == (ranks_per_group == 1)
    assert abs(other["clock_offset"]) < 0.5, "one host, one clock"
    # q_proj (32 -> 32) and v_proj (32 -> 16) of two layers, rank 4, fp32
    assert report["needs"]["adapter"] == 4 * 2 * 4 * (32 + 32 + 32 + 16)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, model: Path, federation: Path) -> None:
    (tmp_path / "file").touch()
    argv = [*tiny.recipe(model, federation, tmp_path / "runs"), "--output_dir", str(tmp_path / "file" / "runs")]
    ended = run([PYTHON, "launch/preflight.py", *argv])
    assert ended.returncode != 0
    (error,) = ended.errors
    assert str(tmp_path / "file") in error
    assert ended.num_tracebacks == 0, ended.output


def test_help_teaches() -> None:
    ended = run([PYTHON, "launch/preflight.py", "--help"])
    assert ended.returncode == 0
    assert "Exit status 0: go ahead" in ended.output
