"""A few intruders (`make intruders` sends many), and the ports that they come to."""

import pytest

from tests.intruders.harness import INTRUDERS, Harness

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("intruders"))


@pytest.mark.parametrize("mode", INTRUDERS)
def test_a_job_is_not_disturbed(mode: str, harness: Harness) -> None:
    """One intruder of each kind. A minute: most of them are programs, which start and are refused one after the other."""
    harness.disturb(mode, INTRUDERS[mode], seed=0, report=print)
