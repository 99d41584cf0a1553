"""One tiny model and one federation of two clients for all tests that start processes."""

from pathlib import Path

import pytest

from tests import tiny
from tests.launch.bad_input import Place, make_place, remove
from tests.launch.processes import run_forked


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny Llama."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, in the authors' layout."""
    return tiny.make_federation(tmp_path_factory.mktemp("data") / "federation", sizes=(7, 5))


@pytest.fixture(scope="session")
def trained(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of two rounds beside its model and data."""
    place = make_place(tmp_path_factory.mktemp("trained"), model, federation)
    ended = run_forked(["--config", str(place.recipe)])
    assert ended.returncode == 0, ended.output
    remove("cache")(place)
    return place
