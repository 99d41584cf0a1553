"""Progress inside a round: an interrupted write is passed over, damage as well, but aloud."""

import logging
from pathlib import Path

import pytest
import torch

from dpa_ds.federation.round_state import PhaseProgress, ProgressKeeper, RoundProgress
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter

ADAPTER = {"a.lora_A.weight": torch.ones(2, 3)}
LAYOUT = {"ranks": 1}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of client 0's progress in round 1, which holds step 2."""
    with BackgroundWriter() as writer:
        keeper = ProgressKeeper(RunFolder(tmp_path), writer, LAYOUT, is_leader=True)
        for step in (1, 2):
            keeper.save(1, 0, RoundProgress(inside=PhaseProgress(step)), {"local": ADAPTER}, {"local": step})
    (folder,) = (tmp_path / "rounds" / "round_000001.tmp" / "progress" / "client_00").iterdir()
    return folder


def find(run_dir: Path, is_leader: bool = True) -> int | None:
    """Steps done; None: the round starts from scratch."""
    with BackgroundWriter() as writer:
        found = ProgressKeeper(RunFolder(run_dir), writer, LAYOUT, is_leader).find(1, 0)
    return found[0].inside.step if found else None


def test_the_newest_counts(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find(tmp_path) == 2
    assert not caplog.records


def test_an_interrupted_write_is_passed_over(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unfinished = saved.with_name("000009")
    unfinished.mkdir()
    (unfinished / "local.safetensors").write_bytes(b"half")
    assert find(tmp_path) == 2
    assert not caplog.records


@pytest.mark.parametrize("is_leader", [True, False])
def test_damage_is_passed_over_aloud_by_the_leader(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_leader: bool
) -> None:
    file = saved / "local.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "dpa_ds"):
        assert find(tmp_path, is_leader) is None
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{file} is damaged (checksum differs): what came before it is used"] * is_leader
