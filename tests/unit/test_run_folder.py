"""The rounds of a run on disk: which are kept, what absent clients keep, and what an interrupted commit leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dpa_ds.errors import CheckpointError, ConfigError
from dpa_ds.runs.folder import RunFolder, local_folder
from dpa_ds.runs.resume import _quarantine_damaged_rounds

CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def save(folder: RunFolder, server_round: int, clients: dict[int, float], with_global: bool = True) -> None:
    """Write local adapters that are filled with a number, and the global one; the round does not count yet."""
    for client, value in clients.items():
        weights = {"a.lora_A.weight": torch.full((2, 3), value)}
        folder.save_adapter(server_round, local_folder(client), weights, CONFIG, {}, {})
    if with_global:
        weights = {"a.lora_A.weight": torch.full((2, 3), float(server_round))}
        folder.save_adapter(server_round, "global", weights, CONFIG, {}, {})


def complete(folder: RunFolder, server_round: int, clients: dict[int, float], keep_rounds: int = 2) -> None:
    save(folder, server_round, clients)
    folder.complete_round(server_round, {}, keep_rounds)


def value_of(folder: RunFolder, server_round: int, client: int) -> float | None:
    """What `load_newest` finds of a client after a round."""
    saved = folder.load_newest(server_round, local_folder(client))
    return None if saved is None else float(saved.weights["a.lora_A.weight"][0, 0])


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.rounds_dir.iterdir())


# ---- which rounds are kept -----------------------------------------------------------------------------------------


def test_folders_of_strangers_are_neither_counted_nor_deleted(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0})
    complete(folder, 2, {0: 2.0})
    strangers = ["round_backup", "round_2", "round_000002_old", "round_0000002", "notes.tmp", "round_backup.tmp"]
    for name in strangers:
        shutil.copytree(folder.round_dir(2), folder.rounds_dir / name)
    (folder.round_dir(2) / "local" / "client_copy").mkdir()
    assert folder.complete_rounds() == [1, 2]
    assert folder.clients(2) == [0]
    complete(folder, 3, {0: 3.0}, keep_rounds=1)
    folder.remove_leftovers(3)
    assert names(folder) == sorted([*strangers, "round_000003"])
    assert (folder.run_dir / "adapters" / "meta.json").is_file()


def test_rounds_of_more_digits_count(folder: RunFolder) -> None:
    complete(folder, 999_999, {0: 1.0})
    complete(folder, 1_000_000, {0: 2.0}, keep_rounds=1)
    assert folder.complete_rounds() == [1_000_000]


def test_the_last_copy_of_a_client_is_not_deleted(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0, 1: 1.0})
    for server_round in (2, 3, 4):
        complete(folder, server_round, {1: float(server_round)}, keep_rounds=1)
    assert folder.complete_rounds() == [1, 4]
    assert value_of(folder, 4, 0) == 1.0
    folder.carry_over(5, [0])
    complete(folder, 5, {1: 5.0}, keep_rounds=1)
    assert folder.complete_rounds() == [5]
    assert value_of(folder, 5, 0) == 1.0


def test_a_round_whose_deletion_was_interrupted_is_removed(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0})
    complete(folder, 2, {0: 2.0})
    (folder.round_dir(1) / "meta.json").unlink()
    assert folder.complete_rounds() == [2]
    folder.remove_leftovers(2)
    assert names(folder) == ["round_000002"]


def test_a_round_that_is_read_is_kept_until_then(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0})
    reader = RunFolder(folder.run_dir)
    assert reader.hold_trained_round() == 1
    complete(folder, 2, {0: 2.0}, keep_rounds=1)
    complete(folder, 3, {0: 3.0}, keep_rounds=1)
    assert folder.complete_rounds() == [1, 3]
    assert float(reader.load_adapter(1, local_folder(0)).weights["a.lora_A.weight"][0, 0]) == 1.0
    del reader
    complete(folder, 4, {0: 4.0}, keep_rounds=1)
    assert folder.complete_rounds() == [4]


def test_a_round_that_is_deleted_in_the_moment_of_the_look_is_passed_over(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(folder, 1, {0: 1.0})
    looks = iter([0, 1])

    def latest_round(self: RunFolder) -> int:
        if next(looks, None) == 0:
            complete(folder, 2, {0: 2.0}, keep_rounds=1)
            return 1  # it was the last one a moment ago
        return max(self.complete_rounds())

    monkeypatch.setattr(RunFolder, "latest_round", latest_round)
    assert folder.hold_trained_round() == 2


# ---- clients that are absent ------------------------------------------------------------------------------------------


def test_an_absent_client_is_carried_from_the_newest_round_that_has_it(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0, 1: 1.0}, keep_rounds=9)
    complete(folder, 2, {1: 2.0}, keep_rounds=9)
    folder.carry_over(3, [0])
    complete(folder, 3, {1: 3.0}, keep_rounds=9)
    assert [value_of(folder, 3, client) for client in (0, 1)] == [1.0, 3.0]


def test_a_damaged_copy_is_not_carried(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0}, keep_rounds=9)
    complete(folder, 2, {0: 1.0}, keep_rounds=9)
    (folder.round_dir(2) / local_folder(0) / "adapter_model.safetensors").write_bytes(b"damaged")
    folder.carry_over(3, [0])
    complete(folder, 3, {}, keep_rounds=9)
    assert value_of(folder, 3, 0) == 1.0


def test_a_client_that_is_in_no_complete_round_is_carried_from_one_that_never_counted(folder: RunFolder) -> None:
    save(folder, 1, {0: 1.0})
    save(folder, 2, {0: 2.0})
    complete(folder, 3, {1: 3.0})
    folder.remove_leftovers(3)
    assert names(folder) == ["round_000002.tmp", "round_000003"], "the newest copy of client 0, and no other"
    assert value_of(folder, 3, 0) == 2.0
    folder.carry_over(4, [0])
    complete(folder, 4, {1: 4.0})
    folder.remove_leftovers(4)
    assert names(folder) == ["round_000003", "round_000004"]
    assert value_of(folder, 4, 0) == 2.0


def test_what_was_written_halfway_is_no_copy(folder: RunFolder) -> None:
    save(folder, 1, {0: 1.0, 1: 1.0})
    (folder.rounds_dir / "round_000001.tmp" / local_folder(0) / "state.json").unlink()
    folder.carry_over(1, [0, 1])
    folder.complete_round(1, {}, keep_rounds=2)
    assert folder.clients(1) == [1], "client 0 starts from scratch"
    assert value_of(folder, 1, 0) is None


def test_a_global_adapter_of_another_round_is_not_used(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0}, keep_rounds=9)
    save(folder, 2, {0: 2.0}, with_global=False)
    folder.complete_round(2, {}, keep_rounds=9)
    assert folder.load_newest(2, "global") is None


# ---- what another user may not read ---------------------------------------------------------------------------------


def close_to_this_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder of another user is; the tests may run as root, whom no mode stops."""
    read_text = Path.read_text

    def refuse(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)


def test_what_is_private_to_another_user_is_not_to_be_deleted(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(folder, 1, {0: 1.0, 1: 1.0})
    close_to_this_user(folder.round_dir(1) / local_folder(1), monkeypatch)
    with pytest.raises(CheckpointError) as raised:
        folder.load_adapter(1, local_folder(1))
    assert "Permission denied" in str(raised.value)
    assert "run this as that user" in str(raised.value)
    assert "delete" not in str(raised.value)
    folder.load_adapter(1, local_folder(0))


def test_what_is_private_to_another_user_is_not_quarantined(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(folder, 1, {0: 1.0})
    complete(folder, 2, {0: 2.0})
    close_to_this_user(folder.round_dir(2) / local_folder(0), monkeypatch)
    with pytest.raises(CheckpointError, match="Permission denied"):
        _quarantine_damaged_rounds(folder)
    assert names(folder) == ["round_000001", "round_000002"]


# ---- a commit that was interrupted ------------------------------------------------------------------------------------


def test_the_next_coordinator_may_complete_a_round_again(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0})
    complete(folder, 2, {0: 2.0})
    (folder.run_dir / "adapters").unlink()
    folder.complete_round(2, {}, keep_rounds=1)
    assert names(folder) == ["round_000002"]
    assert (folder.run_dir / "adapters").resolve() == folder.round_dir(2)


@pytest.mark.parametrize("target", ["rounds/round_000001", "/nonexistent", None])
def test_a_stale_or_missing_link_is_repaired(folder: RunFolder, target: str | None) -> None:
    complete(folder, 1, {0: 1.0})
    complete(folder, 2, {0: 2.0})
    link = folder.run_dir / "adapters"
    link.unlink()
    if target is not None:
        link.symlink_to(target)
    folder.check_link()
    folder.repair_link(2)
    assert link.resolve() == folder.round_dir(2)


def test_a_folder_in_the_place_of_the_link_is_named(folder: RunFolder) -> None:
    complete(folder, 1, {0: 1.0})
    link = folder.run_dir / "adapters"
    link.unlink()
    shutil.copytree(folder.round_dir(1), link)
    with pytest.raises(
        CheckpointError, match=r"adapters is no link, which training sets to the last round .* delete it"
    ):
        folder.check_link()


def test_half_written_files_of_the_run_are_removed(folder: RunFolder) -> None:
    for name in ("config.yaml.host.7.tmp", "model.json.host-1.b.70.tmp", "mine.tmp", "config.yaml"):
        (folder.run_dir / name).write_text("")
    folder.remove_leftovers(0)
    assert sorted(path.name for path in folder.run_dir.iterdir()) == ["config.yaml", "mine.tmp"]


def test_clients_are_found_by_id_and_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    labels = ["client_0 sums", "client_1 sums", "3", "client_3 verbs and more", "left out"]
    for client in range(4):
        (folder.round_dir(1) / "local" / f"client_{client:02d}").mkdir(parents=True)
    (folder.round_dir(1) / "meta.json").write_text(json.dumps({"clients": labels}))
    for wanted, found in {0: 0, "1": 1, "client_0": 0, "client_1 sums": 1, "client_3": 3, "3": 3}.items():
        assert folder.find_clients([wanted], 1) == [found]
    assert folder.find_clients(["client_1", 0, 1], 1) == [0, 1]
    known = r"its clients are 0 \(client_0 sums\), 1 \(client_1 sums\), 2 \(3\), 3 \(client_3 verbs and more\)$"
    for wanted, problem in {7: "no client 7", "sums": "several clients sums", "left out": "no client left out"}.items():
        with pytest.raises(ConfigError, match=f"has {problem}: {known}"):
            folder.find_clients([wanted], 1)
