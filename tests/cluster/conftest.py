"""Two hosts with ssh and Slurm, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.machines import Machines, why_no_machines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A second try: sshd, Slurm and mpirun have races of their own when the machine is busy. An R tells that it was needed."""
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """n1 and n2, with a network between them and nothing else."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """n1 and n2, up; tests leave them so."""
    reason = why_no_machines()
    if reason:
        pytest.skip(reason)
    with Machines(2, tmp_path_factory.mktemp("machines")) as machines:
        yield machines


@pytest.fixture(autouse=True)
def no_job_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test left in the queue, or switched off, does not meet the next one."""
    yield
    if "machines" in request.fixturenames:
        request.getfixturevalue("machines").clear()
