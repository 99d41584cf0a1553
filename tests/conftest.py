"""One tiny model and one federation of two clients for all tests that start processes."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny Llama."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, in the authors' layout."""
    return tiny.make_federation(tmp_path_factory.mktemp("data") / "federation", sizes=(7, 5))
