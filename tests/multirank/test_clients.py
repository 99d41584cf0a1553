"""Hundreds of clients on one rank group: memory does not grow from round to round, and by an adapter for each
client."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
ROUNDS = 2


def live_bytes(job: Any, argv: list[str]) -> list[int]:
    """Train; bytes of all live tensors after each round."""
    import gc

    from benchmarks.planner import _live_storages
    from dpa_ds.federation import loop

    found: list[int] = []
    finish_round = loop.finish_round

    def watched(*args: Any, **kwargs: Any) -> None:
        finish_round(*args, **kwargs)
        gc.collect()
        found.append(sum(_live_storages().values()))

    loop.finish_round = watched
    train_on_rank(job, argv)
    return found


def test_two_hundred_clients_cost_their_adapters(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    after = {}
    for num_clients in (20, 200):
        folder = tmp_path / str(num_clients)
        data = tiny.make_federation(folder / "data", sizes=(4,) * num_clients)
        words = {
            "federation__num_rounds": ROUNDS,
            "train__max_steps": 1,
            "evaluation__every_rounds": 0,
        }
        argv = tiny.recipe(model, data, folder / "runs", **words)
        (after[num_clients],) = run_on_ranks(live_bytes, 1, tmp_path, argv)
        finals = list((folder / "runs" / "tiny" / "adapters" / "local").glob("client_*/adapter_model.safetensors"))
        assert len(finals) == num_clients
        adapter = sum(file.stat().st_size for file in finals) / num_clients
        saved = folder / "runs" / "tiny" / "rounds" / f"round_{ROUNDS:06d}" / "local" / "client_00"
    assert len(after[200]) == ROUNDS + 1
    for found in after.values():
        assert found[-1] <= 1.01 * found[1], f"memory grows from round to round: {found}"
    per_client = (after[200][-1] - after[20][-1]) / 180
    everything = sum(file.stat().st_size for file in saved.glob("*.safetensors"))  # its adapter, its references
    assert adapter * 0.7 < per_client < 1.5 * everything


def build_without_base(job: Any, argv: list[str]) -> str:
    """Build a session where no base can be loaded; what the error says."""
    from dpa_ds.cli import session
    from dpa_ds.config.load import load_config
    from dpa_ds.errors import DpaError

    def load_nothing(*args: Any) -> None:
        raise AssertionError("the base was loaded")

    patched: Any = session
    patched.load_base = load_nothing
    try:
        session.build_session(load_config(argv), job)
    except (DpaError, AssertionError) as error:
        return str(error)
    return ""


def test_data_is_checked_before_the_base_is_loaded(tmp_path: Path) -> None:
    """Training rows, and the test rows that are scored while training."""
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    argv = tiny.recipe(model, data, tmp_path / "runs")
    assert run_on_ranks(build_without_base, 1, tmp_path, argv) == ["the base was loaded"]
    scored = tiny.recipe(model, data, tmp_path / "a", evaluation__scores_every_rounds=1, evaluation__tasks=["none"])
    (error,) = run_on_ranks(build_without_base, 1, tmp_path, scored)
    assert "the test data has no task ['none']" in error
    last = sorted(data.glob("*/local_training_*.json"))[-1]
    last.write_text('[{"instruction": "ask", "output": ""}]')
    (error,) = run_on_ranks(build_without_base, 1, tmp_path, argv)
    assert "column 'output' is empty" in error
