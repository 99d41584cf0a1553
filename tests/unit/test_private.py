"""A run in two parts: which private copies belong to a round that counts, which are deleted, and who may read them."""

import os
import shutil
import stat
from pathlib import Path

import peft
import pytest
import torch

from dpa_ds.config.load import load_config, to_yaml
from dpa_ds.config.validate import fingerprint_sections
from dpa_ds.errors import CheckpointError, ConfigError
from dpa_ds.runs.folder import RunFolder, local_folder
from dpa_ds.runs.private import open_run_folder
from dpa_ds.runs.resume import create_private_part, find_resume_round, validate_private_part
from tests.tiny import recipe

CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj"])
LABELS = ["client_0", "client_1"]


class Groups:
    """The run folder of a run of two clients as each of its groups sees it."""

    def __init__(self, root: Path, private_dir: str = "private/{group}") -> None:
        self.root = root
        self.run_dir = root / "runs" / "tiny"
        self.private_dir = str(root / private_dir)

    def folder(self, group: int | None) -> RunFolder:
        """As a process of this group opens it now."""
        return open_run_folder(self.run_dir, self.private_dir, group)

    def save(self, server_round: int, client: int, value: float, group: int | None = None) -> None:
        """The client's local adapter, filled with a number."""
        folder = self.folder(client if group is None else group)
        weights = {"a.lora_A.weight": torch.full((2, 3), value)}
        folder.save_adapter(server_round, local_folder(client), weights, CONFIG, {}, {})

    def complete(self, server_round: int, absent: tuple[int, ...] = (), keep_rounds: int = 2) -> None:
        """The coordinator makes a round count."""
        folder = self.folder(0)
        weights = {"a.lora_A.weight": torch.full((2, 3), float(server_round))}
        folder.save_adapter(server_round, "global", weights, CONFIG, {}, {})
        folder.complete_round(server_round, {"clients": LABELS, "absent": list(absent)}, keep_rounds)

    def round(self, server_round: int, absent: tuple[int, ...] = (), keep_rounds: int = 2) -> None:
        """A whole round; each client's adapter holds the round's number."""
        for client in {0, 1} - set(absent):
            self.save(server_round, client, float(server_round))
        self.complete(server_round, absent, keep_rounds)
        for group in (0, 1):
            self.folder(group).delete_private_rounds()

    def value(self, server_round: int, client: int, group: int | None = None) -> float | None:
        """What `load_newest` finds of a client after a round."""
        folder = self.folder(client if group is None else group)
        saved = folder.load_newest(server_round, local_folder(client))
        return None if saved is None else float(saved.weights["a.lora_A.weight"][0, 0])

    def copies(self) -> list[str]:
        """`GROUP/ROUND/CLIENT` of all private copies."""
        found = self.root.glob("private/*/tiny/rounds/round_*/local/client_*")
        return sorted(f"{path.parts[-6]}/{int(path.parts[-3][6:])}/{int(path.name[7:])}" for path in found)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


# ---- where things lie ---------------------------------------------------------------------------------------------


def test_the_common_part_holds_nothing_of_a_client(groups: Groups) -> None:
    groups.round(1)
    groups.folder(0).save_progress(2, 0, {"local": {"a": torch.ones(2)}}, {})
    common = sorted(path.name for path in groups.run_dir.rglob("*"))
    assert not [name for name in common if name.startswith(("client_", "local", "progress"))]
    assert groups.copies() == ["0/1/0", "1/1/1"]
    assert groups.folder(0).clients(1) == [0, 1]


def test_private_files_are_their_owners(groups: Groups) -> None:
    groups.round(1)
    groups.folder(0).save_progress(2, 0, {"local": {"a": torch.ones(2)}}, {})
    paths = list((groups.root / "private" / "0" / "tiny").rglob("*"))
    assert len(paths) > 8
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_an_environment_variable_is_replaced_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE", str(tmp_path / "site"))
    folder = open_run_folder(tmp_path / "runs" / "tiny", "${SITE}/{group}", 3)
    assert folder.own_part == tmp_path / "site" / "3" / "tiny"
    with pytest.raises(ConfigError, match=r"private_dir: \$NOWHERE is not set"):
        open_run_folder(tmp_path / "runs" / "tiny", "$NOWHERE/x", 0)


def test_the_private_part_may_not_lie_in_the_common_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies in the common folder"):
        open_run_folder(tmp_path / "runs" / "tiny", str(tmp_path / "runs"), 0)


def test_one_folder_for_all_groups(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "private/all")
    groups.round(1)
    groups.round(2)
    assert [groups.value(2, client, group=0) for client in (0, 1)] == [2.0, 2.0]


@pytest.mark.skipif(os.geteuid() == 0, reason="no mode stops root")
def test_a_folder_that_is_closed_to_this_user_is_not_seen(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "private/all")
    groups.round(1)
    (tmp_path / "private" / "all" / "tiny").chmod(0)
    assert groups.folder(None).clients_here(1) == []
    (tmp_path / "private" / "all" / "tiny").chmod(0o700)


# ---- a kill at any moment -------------------------------------------------------------------------------------------


def test_a_private_part_that_is_newer_than_the_common_one_is_not_read(groups: Groups) -> None:
    groups.round(1)
    groups.save(2, 0, 99.0)
    groups.folder(0).remove_private_leftovers([0], completed=1)
    assert groups.value(1, 0) == 1.0
    groups.round(2)
    assert groups.value(2, 0) == 2.0


def test_nothing_of_an_earlier_attempt_stays_in_what_is_saved_again(groups: Groups) -> None:
    weights = {"a.lora_A.weight": torch.ones(2, 3)}
    groups.folder(0).save_adapter(1, local_folder(0), weights, CONFIG, {"leader_state": weights}, {})
    groups.round(1)
    saved = groups.folder(0).load_newest(1, local_folder(0))
    assert saved is not None
    assert saved.extras == {}


def test_what_was_saved_in_a_round_that_counted_without_it_is_not_read(groups: Groups) -> None:
    """The group was lost between the save and the exchange: the others completed the round without it."""
    groups.round(1)
    groups.save(2, 1, 99.0)
    groups.round(2, absent=(1,))
    assert groups.value(2, 1) == 1.0
    assert groups.copies() == ["0/1/0", "0/2/0", "1/1/1"]
    groups.round(3)
    assert groups.value(3, 1) == 3.0


def test_the_last_copy_of_a_client_is_kept_as_long_as_it_is_absent(groups: Groups) -> None:
    groups.round(1)
    for server_round in range(2, 7):
        groups.round(server_round, absent=(1,), keep_rounds=1)
    assert groups.copies() == ["0/6/0", "1/1/1"]
    assert groups.value(6, 1) == 1.0
    groups.round(7, keep_rounds=1)
    assert groups.copies() == ["0/7/0", "1/7/1"]


def test_the_only_copy_of_a_client_is_kept_though_no_round_counted_it(groups: Groups) -> None:
    groups.save(1, 1, 5.0)
    for server_round in (1, 2, 3):
        groups.round(server_round, absent=(1,), keep_rounds=1)
    assert groups.value(3, 1) == 5.0


def test_retention_follows_the_common_rounds(groups: Groups) -> None:
    for server_round in (1, 2, 3, 4):
        groups.round(server_round)
    assert groups.folder(0).complete_rounds() == [3, 4]
    assert groups.copies() == ["0/3/0", "0/4/0", "1/3/1", "1/4/1"]


def test_a_round_that_somebody_reads_keeps_its_private_copies(groups: Groups) -> None:
    groups.round(1)
    reader = groups.folder(None)
    assert reader.hold_trained_round() == 1
    for server_round in (2, 3):
        groups.round(server_round, keep_rounds=1)
    assert groups.copies() == ["0/1/0", "0/3/0", "1/1/1", "1/3/1"]
    assert float(reader.load_adapter(1, local_folder(1)).weights["a.lora_A.weight"][0, 0]) == 1.0


def test_progress_is_found_and_deleted_with_its_round(groups: Groups) -> None:
    groups.round(1)
    folder = groups.folder(0)
    folder.save_progress(2, 0, {"local": {"a": torch.ones(2)}}, {"step": 3})
    folder.save_progress(3, 0, {"local": {"a": torch.ones(2)}}, {"step": 9})
    folder = groups.folder(0)
    assert folder.has_progress()
    folder.remove_private_leftovers([0], completed=1)
    found = folder.load_progress(2, 0, lambda error: None)
    assert found is not None
    assert found.info == {"step": 3}
    assert folder.load_progress(3, 0, lambda error: None) is None, "of a round that is not the next one"
    groups.round(2)
    assert folder.load_progress(2, 0, lambda error: None) is None


# ---- groups that change, and parts that are missing ---------------------------------------------------------------


def test_clients_are_found_in_the_folders_of_other_groups(groups: Groups) -> None:
    groups.round(1)
    assert groups.value(1, 1, group=0) == 1.0, "one group hosts both now"
    groups.save(2, 0, 2.0)
    groups.save(2, 1, 2.0, group=0)
    groups.complete(2, keep_rounds=1)
    groups.folder(0).delete_private_rounds()
    assert groups.copies() == ["0/2/0", "0/2/1"], "the old copies went with the round that named them"
    assert groups.value(2, 1, group=1) == 2.0, "two groups again"


def test_a_copy_that_did_not_count_is_replaced_wherever_it_lies(groups: Groups) -> None:
    groups.save(1, 1, 99.0)
    groups.save(1, 0, 1.0)
    groups.save(1, 1, 1.0, group=0)
    groups.complete(1)
    assert groups.value(1, 1, group=1) == 1.0


def test_a_missing_part_is_one_line_with_its_remedy(groups: Groups) -> None:
    groups.round(1)
    groups.round(2)
    (groups.root / "private" / "1").rename(groups.root / "elsewhere")
    with pytest.raises(CheckpointError) as raised:
        groups.folder(1).load_newest(2, local_folder(1))
    text = str(raised.value)
    assert text.startswith("the adapter of client 1 after round 2 is not at ")
    assert f"{groups.private_dir}/tiny/rounds/round_000002/local/client_01: mount or copy" in text
    assert f"delete {groups.run_dir}/rounds/round_000002 to continue from the round before" in text
    assert groups.folder(None).clients_here(2) == [0]


def test_after_the_remedy_the_round_before_is_whole(groups: Groups) -> None:
    groups.round(1)
    groups.round(2)
    for client in (0, 1):
        shutil.rmtree(groups.root / "private" / str(client) / "tiny" / "rounds" / "round_000002")
    shutil.rmtree(groups.folder(0).round_dir(2))
    assert groups.folder(0).latest_round() == 1
    assert [groups.value(1, client) for client in (0, 1)] == [1.0, 1.0]


def test_a_run_stays_in_as_many_parts_as_it_began_with(groups: Groups, tmp_path: Path) -> None:
    groups.round(1)
    config = load_config(recipe(tmp_path / "model", tmp_path / "data", tmp_path / "runs"))
    (groups.run_dir / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(CheckpointError, match=r"was trained with private_dir: .* set private_dir to where it is"):
        find_resume_round(RunFolder(groups.run_dir), fingerprint_sections(config), "auto")
    with pytest.raises(CheckpointError, match="set private_dir"):
        RunFolder(groups.run_dir).hold_trained_round()


def test_a_run_that_began_in_one_part_stays_so(groups: Groups) -> None:
    folder = RunFolder(groups.run_dir)
    weights = {"a.lora_A.weight": torch.ones(2, 3)}
    for name in ("global", local_folder(0)):
        folder.save_adapter(1, name, weights, CONFIG, {}, {})
    folder.complete_round(1, {"clients": LABELS, "absent": []}, 2)
    with pytest.raises(CheckpointError, match="trained without private_dir"):
        groups.folder(0).hold_trained_round()


def test_the_private_part_of_another_run_is_refused(groups: Groups, tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path / "model", tmp_path / "data", tmp_path / "runs"))
    folder = groups.folder(0)
    validate_private_part(folder, fingerprint_sections(config))
    create_private_part(folder, to_yaml(config))
    validate_private_part(folder, fingerprint_sections(config))
    other = load_config([*recipe(tmp_path / "model", tmp_path / "data", tmp_path / "runs"), "--seed", "7"])
    with pytest.raises(CheckpointError, match=r"private/0/tiny holds a different run \(seed: 0 -> 7\)"):
        validate_private_part(folder, fingerprint_sections(other))
