"""Progress inside a round: an interrupted write is passed over, damage as well, but aloud; a handed-over
update stays on disk."""

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import dpa_ds
from dpa_ds.data.references import REPRESENTATIONS, References
from dpa_ds.errors import CheckpointError
from dpa_ds.federation.progress import ClientState
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter, read_info, well_formed, write_folder
from tests.unit.round_state_for_tests import make_round_state, one_client

ADAPTER = {"a.lora_A.weight": torch.ones(2, 3)}
NUM_STEPS = {"global": 1, "local": 1}
FRESH = ClientState({"a.lora_A.weight": torch.zeros(2, 3)}, {"global": 0, "local": 0})
"""A client as the round found it: says what its tensors must look like."""
MOMENTS = {name: torch.ones(2, 3) for name in ("exp_avg.a.lora_A.weight", "exp_avg_sq.a.lora_A.weight")}
OPTIMIZER = {"step": torch.ones(1), **MOMENTS}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of client 0's progress in round 1, which holds step 2."""
    client = one_client(ClientState(ADAPTER, NUM_STEPS))
    with BackgroundWriter() as writer:
        rounds = make_round_state(tmp_path, writer)
        for step in (1, 2):
            rounds.open(client).inside.step = step
            rounds.open(client).optimizer = OPTIMIZER
            rounds.save(client, 1)
    (folder,) = (tmp_path / "rounds" / "round_000001.tmp" / "progress" / "client_00").iterdir()
    return folder


def restored_step(run_dir: Path) -> int:
    """Steps done; 0: the round starts from scratch."""
    client = one_client(FRESH)
    with BackgroundWriter() as writer:
        rounds = make_round_state(run_dir, writer)
        rounds.restore_progress([client], 1)
        step = rounds.open(client).inside.step
    if step:
        assert client.state.num_steps == NUM_STEPS
        assert torch.equal(client.state.local_adapter["a.lora_A.weight"], torch.ones(2, 3))
    return step


def test_the_newest_counts(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert restored_step(tmp_path) == 2
    assert not caplog.records


def test_an_interrupted_write_is_passed_over(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unfinished = saved.with_name("000009")
    unfinished.mkdir()
    (unfinished / "local.safetensors").write_bytes(b"half")
    assert restored_step(tmp_path) == 2
    assert not caplog.records


def test_damage_is_passed_over_aloud(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved / "local.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "dpa_ds"):
        assert restored_step(tmp_path) == 0
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{file} is damaged (checksum differs): what came before it is used"]


MALFORMED = [
    {"phase": "one"},
    {"phase": -1},
    {"inside": []},
    {"inside": {"step": 2}},
    {"inside": {"step": True, "losses": [], "norms": [], "num_skipped": 0, "scaler": {}}},
    {"inside": {"step": 2, "losses": ["low"], "norms": [], "num_skipped": 0, "scaler": {}}},
    {"metrics": {}},
    {"is_update_saved": 1},
    {"steps_taken": {"global": 1}},
    {"steps_taken": [1, 1]},
    {"loss_scale": None},
    {"has_local_optimizer": "yes"},
]


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_whole_but_malformed_progress_is_passed_over_aloud(
    change: dict[str, Any], saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = read_info(saved, "")
    write_folder(saved, {}, info | change)
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path) == 0
    (record,) = caplog.records
    assert "the progress of client 0 holds what no run writes" in record.message
    assert record.message.endswith("it starts the round from scratch")


KEY = "a.lora_A.weight"
WRONG_TENSORS: list[dict[str, dict[str, torch.Tensor]]] = [
    {"local": {KEY: torch.ones(3, 2)}},
    {"local": {KEY: torch.ones(2, 3), "b": torch.ones(1)}},
    {"local": {}},
    {"local": {KEY: torch.ones(2, 3).half()}},
    {"local": {KEY: torch.full((2, 3), float("nan"))}},
    {"update": {KEY: torch.ones(4, 3)}},
    {"optimizer": MOMENTS},
    {"optimizer": {"step": torch.ones(2), **MOMENTS}},
    {"optimizer": {**OPTIMIZER, f"exp_avg.{KEY}": torch.ones(6)}},
    {"local_optimizer": {"step": torch.ones(1)}},
    {"somebody_elses": {KEY: torch.ones(2, 3)}},
]


@pytest.mark.parametrize("tensors", WRONG_TENSORS, ids=lambda tensors: next(iter(tensors)))
def test_progress_with_tensors_of_another_model_is_passed_over_aloud(
    tensors: dict[str, dict[str, torch.Tensor]], saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(saved, tensors, read_info(saved, ""))
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path) == 0
    (record,) = caplog.records
    assert "the progress of client 0 holds what no run writes" in record.message


def test_progress_that_lacks_its_optimizer_is_passed_over_aloud(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "optimizer.safetensors").unlink()
    write_folder(saved, {}, read_info(saved, ""))
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path) == 0
    assert "holds what no run writes (KeyError: 'optimizer')" in caplog.text


def test_other_names_among_the_progress_are_left_alone(saved: Path, tmp_path: Path) -> None:
    stranger = saved.with_name("9x")
    stranger.mkdir()
    assert restored_step(tmp_path) == 2
    client = one_client(ClientState(ADAPTER, NUM_STEPS))
    with BackgroundWriter() as writer:
        rounds = make_round_state(tmp_path, writer)
        rounds.open(client).inside.step = 3
        rounds.open(client).optimizer = OPTIMIZER
        rounds.save(client, 1)
    assert restored_step(tmp_path) == 3
    assert stranger.is_dir()


def test_an_update_that_was_handed_over_is_kept_on_disk(tmp_path: Path) -> None:
    """Memory forgets it; a process that resumes after any later save has it again, since it must be reduced
    once more."""
    client = one_client(ClientState(ADAPTER, NUM_STEPS))
    update = {"a.lora_A.weight": torch.full((2, 3), 5.0)}
    with BackgroundWriter() as writer:
        rounds = make_round_state(tmp_path, writer)
        progress = rounds.open(client)
        progress.update, progress.is_update_saved = update, True
        rounds.save(client, 1)
        progress.update = None
        for phase in (1, 2):  # two saves without it
            progress.phase = phase
            rounds.save(client, 1)
    again = one_client(FRESH)
    with BackgroundWriter() as writer:
        rounds = make_round_state(tmp_path, writer)
        rounds.restore_progress([again], 1)
        restored = rounds.open(again)
    assert restored.phase == 2
    assert restored.update is not None
    assert torch.equal(restored.update["a.lora_A.weight"], update["a.lora_A.weight"])


def test_a_checkout_that_was_never_installed_completes_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "dpa_ds":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    folder = RunFolder(tmp_path)
    weights = {"a.lora_A.weight": torch.ones(2, 3)}
    folder.save_adapter(1, "global", weights, peft.LoraConfig(r=2, target_modules=["q_proj"]), {}, {})
    folder.complete_round(1, {}, keep_rounds=1)
    meta = json.loads((tmp_path / "rounds" / "round_000001" / "meta.json").read_text())
    assert meta["versions"]["dpa_ds"] == dpa_ds.__version__
    assert meta["versions"]["torch"] == installed("torch")


def test_references_that_no_run_wrote() -> None:
    tensors = References([[1, 2], [3]], dict.fromkeys(REPRESENTATIONS, torch.ones(2, 4))).to_tensors()
    assert References.from_tensors(tensors).prompts == [[1, 2], [3]]
    changes: list[dict[str, torch.Tensor]] = [
        {"lengths": torch.tensor([2, 2])},
        {"lengths": torch.tensor([3, 0])},
        {"lengths": torch.tensor([], dtype=torch.int32), "tokens": torch.tensor([], dtype=torch.int32)},
        {"tokens": torch.tensor([1, -2, 3])},
        {"tokens": torch.tensor([1.0, 2.0, 3.0])},
        {"embeddings.mean": torch.ones(1, 4)},
        {"embeddings.mean": torch.ones(2)},
        {"embeddings.mean": torch.full((2, 4), float("nan"))},
    ]
    for change in changes:
        with pytest.raises(CheckpointError, match=r"round_000001 holds what no run writes .*: delete it"):
            read_references(tensors | change)
    del tensors["embeddings.last_token"]
    with pytest.raises(CheckpointError, match="KeyError"):
        read_references(tensors)


def read_references(tensors: dict[str, torch.Tensor]) -> None:
    with well_formed("round_000001", "delete it"):
        References.from_tensors(tensors)
