"""Two hosts with ssh and Slurm, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.cluster.machines import Machines, why_no_machines


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """n1 and n2, up; tests leave them so."""
    reason = why_no_machines()
    if reason:
        pytest.skip(reason)
    with Machines(2, tmp_path_factory.mktemp("machines")) as machines:
        yield machines
