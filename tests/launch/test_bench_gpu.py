"""The kit for one GPU, on a CPU with everything tiny: what runs there rarely must not rot."""

from pathlib import Path

import pytest

from benchmarks.gpu.claims import all_claims
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import read_results
from benchmarks.gpu.settings import DEFAULT_GPU
from tests.launch.processes import PYTHON, run

pytestmark = pytest.mark.launch


def test_a_dry_run_takes_every_measure(tmp_path: Path) -> None:
    """No part is left out, because each has lines of its own that would rot.

    100 s of CPU time, two parts at a time: a minute on two idle cores. Half of it is imports: of four programs (5 s each), and of
    three processes from which runs and benches are forked (8 s each). A bench takes 2 s, that of `speed_7b` 15 s.
    """
    ended = run([PYTHON, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)], 900.0)
    log = (tmp_path / "log.txt").read_text()
    assert ended.returncode == 0, ended.output + log
    results = read_results(tmp_path / "results.jsonl")
    statuses = {result["part"]: result.get("exit_status") for result in results if result["measure"] == "part"}
    assert statuses == dict.fromkeys([part.name for part in PARTS], 0), log
    assert not [result for result in results if "error" in result]
    for claim in all_claims(DEFAULT_GPU):
        found = [result for result in results if (result["part"], result["measure"]) == (claim.part, claim.measure)]
        assert any(claim.field in result for result in found), claim
    assert "the numbers mean nothing" in (tmp_path / "summary.md").read_text()
