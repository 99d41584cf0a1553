"""A few of the fault trials (`make faults` does many), and that they would find a bug."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.elastic import ElasticHarness, ElasticTrial, draw_elastic_trials
from tests.faults.full_disk import draw_full_disk_trials
from tests.faults.harness import Harness, Layout, Trial, draw_trials
from tests.faults.observed import STEPS
from tests.faults.planted import BUGS

pytestmark = pytest.mark.launch
NUM_TRIALS = 4
SMALL = Layout(1, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def harness(folder: Path) -> Harness:
    return Harness(folder)


@pytest.mark.parametrize("number", range(NUM_TRIALS))
def test_trial(number: int, harness: Harness) -> None:
    trial = draw_trials(NUM_TRIALS, seed=1)[number]
    harness.run(trial, f"trial_{number}")
    assert not trial.problem, f"{trial.layout}, {trial.victims} at {trial.moments}: {trial.problem}"


def inside_the_third_round(run_dir: Path) -> bool:
    """The first client is in the middle of a phase, and others have not begun."""
    for state in run_dir.glob("rounds/round_000003.tmp/progress/client_00/*/state.json"):
        try:
            return bool(json.loads(state.read_text())["info"]["inside"]["step"])
        except (OSError, ValueError):  # not whole yet, or gone again
            continue
    return False


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_found(bug: str | None, harness: Harness) -> None:
    """Killed and started again at this moment, the program as it is survives, and each bug shows."""
    trial = Trial(SMALL, ["everything"], [1.0])
    program = ["launch/run.py"] if bug is None else ["tests/faults/planted.py", bug]
    harness.run(trial, f"planted_{bug}", program, [inside_the_third_round])
    if bug is None:
        assert not trial.problem, trial.problem
    else:
        assert " apart" in trial.problem, f"not found: {trial.problem}"


# ---- groups with launchers of their own, and a full disk -------------------------------------------------------

CASCADES = [
    # The coordinator is lost as it completes a round, the next one halfway through a line of the records, and the
    # first again as all meet: what they left must be found by whoever is left.
    ElasticTrial(3, [["rename 2", "renamed 0"], ["record torn 0"], []], 0.5),
    ElasticTrial(2, [["deletion torn 3"], ["progress torn 2"]], 0.5),
]


@pytest.mark.parametrize("trial", CASCADES, ids=str)
def test_groups_that_are_killed_lose_nothing(trial: ElasticTrial, folder: Path, request: pytest.FixtureRequest) -> None:
    own = folder / request.node.name.split("[")[0] / str(trial.num_groups)
    own.mkdir(parents=True)
    ElasticHarness(own).run(trial, "trial")
    assert not trial.problem, f"{trial}: {trial.problem}"
    assert trial.kills, "no step was reached"


def test_elastic_trials_reach_every_step() -> None:
    trials = draw_elastic_trials(100, seed=0)
    planned = [fault for trial in trials for steps in trial.faults for fault in steps]
    assert len(planned) >= 100
    assert {fault.rpartition(" ")[0] for fault in planned} == set(STEPS)
    assert {trial.num_groups for trial in trials} == {2, 3}


def test_a_full_disk_loses_nothing() -> None:
    """In a process that may have file systems of its own."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of its own")
    command = [sys.executable, "-m", "tests.faults", "--mode", "disk", "--trials", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stdout
    assert "3 of 3 moments of a full disk survived" in ended.stdout


def test_full_disk_trials_are_spread_over_all_writes() -> None:
    writes = [trial.write for trial in draw_full_disk_trials(60, 258, seed=0)]
    assert writes == sorted(writes)
    assert min(writes) <= 5
    assert max(writes) >= 254
