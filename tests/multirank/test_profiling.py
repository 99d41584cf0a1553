"""`--profile` changes nothing of the result, and accounts for the whole round."""

import gzip
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank


def test_profile_of_two_groups(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    plain, watched = (
        tiny.recipe(model, data, tmp_path / name, train__batch_size=2, data__cache_dir=tmp_path / "cache")
        for name in ("plain", "watched")
    )
    run_on_ranks(train_on_rank, 2, tmp_path, plain)
    run_on_ranks(train_on_rank, 2, tmp_path, [*watched, "--profile"])
    adapters = sorted((tmp_path / "plain" / "tiny" / "rounds").rglob("adapter_model.safetensors"))
    assert len(adapters) == 2 * 5  # two rounds, the global adapter and four local ones
    for file in adapters:
        there = load_file(tmp_path / "watched" / file.relative_to(tmp_path / "plain"))
        assert all((there[key] == tensor).all() for key, tensor in load_file(file).items())

    folder = tmp_path / "watched" / "tiny" / "profile"
    for group in (0, 1):
        found = json.loads((folder / f"group_{group:02d}_round.json").read_text())
        parts = found["parts"]
        assert sum(parts.values()) == pytest.approx(found["seconds"])
        assert 0 <= parts["not in a part"] < 0.1 * found["seconds"]
        assert min(parts.values()) >= 0
        # sizes 7, 5, 9, 6 and steps of 2: clients 0 and 2, or 1 and 3; two phases each
        steps = {0: 2 * (4 + 5), 1: 2 * (3 + 3)}[group]
        assert {part: found["calls"][part] for part in ("steps", "phase switch")} == {"steps": steps, "phase switch": 4}
        assert f"| steps | {parts['steps']:.3f} |" in (folder / f"group_{group:02d}_round.md").read_text()
        for phase in ("global", "local"):
            (trace,) = folder.glob(f"group_{group:02d}_{phase}.*.pt.trace.json.gz")
            names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
            assert {"steps", "aten::mm", "MmBackward0"} <= names
    assert not list((tmp_path / "plain" / "tiny").glob("profile"))
