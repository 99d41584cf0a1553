"""A few of the fault trials (`make faults` does many), and that they would find a bug."""

import json
from pathlib import Path

import pytest

from tests.faults.harness import Harness, Layout, Trial, draw_trials
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
