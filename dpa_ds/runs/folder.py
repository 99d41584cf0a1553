"""State of a run on disk, after each round and inside the current one, in PEFT's own format.

    runs/NAME/rounds/round_000003/global/{adapter_model.safetensors, adapter_config.json, state.json}
                                  local/client_02/{..., references.safetensors, optimizer.safetensors}
                                  meta.json               written last: the round is complete; checksums of all
                                  state.json
    runs/NAME/rounds/round_000004.tmp/progress/client_02/000017/...        how far a client has come in round 4
    runs/NAME/adapters -> rounds/round_000003

Every leader writes its clients; the coordinator the rest. All hosts see the folder (a shared file system). The
frozen base is never written.
"""

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft

from dpa_ds import __version__
from dpa_ds.adapters.methods import LOCAL
from dpa_ds.adapters.state import AdapterState
from dpa_ds.errors import CheckpointError, storage_errors
from dpa_ds.runs.storage import (
    STATE,
    UNREADABLE,
    SavedFolder,
    check_finite,
    fsync,
    read_folder,
    read_info,
    sha256_of,
    write_folder,
    write_text,
)

_NUMBER = re.compile("[0-9]{1,9}")
META, MODEL = "meta.json", "model.json"
WEIGHTS = "adapter_model"
PACKAGES = ("torch", "deepspeed", "transformers", "peft")


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as it lies on disk."""

    weights: AdapterState
    extras: dict[str, AdapterState]
    """Further tensors by name, such as `optimizer` and `references`."""
    info: dict[str, Any]
    """What the saver added, such as the number of steps taken."""


def local_folder(client_id: int) -> str:
    """Name of a client's adapter in a round: `local/client_02`."""
    return f"{LOCAL}/client_{client_id:02d}"


def _numbered(folder: Path) -> list[Path]:
    """What lies in `folder` under a number, in the order of the numbers; what else a user may have put there is left
    alone."""
    return sorted((path for path in folder.glob("*") if _NUMBER.fullmatch(path.name)), key=lambda path: int(path.name))


class RunFolder:
    """The rounds of one run on disk."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rounds_dir = run_dir / "rounds"

    # ---- which run, which round -------------------------------------------------------------------------------

    def check_model(self, fingerprint: str) -> None:
        """Refuse a base model other than the one that this run was trained over, wherever it lies now.

        Raises:
            CheckpointError: `model.json` of the run names another fingerprint, or cannot be read.
        """
        path = self.run_dir / MODEL
        try:
            recorded = json.loads(path.read_text())["fingerprint"] if path.exists() else fingerprint
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path} cannot be read ({repr(error)[:200]}): restore it; or delete it, if you are sure that "
                "model.path is the base that this run was trained over"
            ) from error
        if recorded != fingerprint:
            raise CheckpointError(
                f"the base model differs from the one that {self.run_dir} was trained over (see {path}): its adapters "
                "mean nothing on another; set model.path to the right one"
            )

    def latest_round(self) -> int:
        """Last complete round, 0 if there is none."""
        return max(self.complete_rounds(), default=0)

    def complete_rounds(self) -> list[int]:
        """All complete rounds, in their order."""
        names = (path.parent.name.removeprefix("round_") for path in self.rounds_dir.glob(f"round_??????/{META}"))
        return sorted(int(name) for name in names if name.isdecimal())

    def trained_round(self) -> int:
        """Last complete round.

        Raises:
            CheckpointError: there is none.
        """
        server_round = self.latest_round()
        if server_round == 0:
            raise CheckpointError(f"{self.run_dir} has no complete round yet: train it with launch/run.py first")
        return server_round

    def round_dir(self, server_round: int) -> Path:
        """Where a complete round lies."""
        return self.rounds_dir / f"round_{server_round:06d}"

    def clients(self, server_round: int) -> list[int]:
        """Ids of the clients whose local adapters a complete round holds."""
        names = [path.name.removeprefix("client_") for path in self.round_dir(server_round).glob("local/client_*")]
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def digest(self, server_round: int) -> str:
        """Which adapters a complete round holds, from the checksums that were saved with them: 16 hex digits."""
        states = sorted(self.round_dir(server_round).glob(f"**/{STATE}"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in states)).hexdigest()[:16]

    # ---- a round ----------------------------------------------------------------------------------------------

    def save_adapter(
        self,
        server_round: int,
        name: str,
        weights: AdapterState,
        config: peft.LoraConfig,
        extras: Mapping[str, AdapterState],
        info: Mapping[str, Any],
    ) -> None:
        """Write one adapter ("global", "local/client_02") of a round that is not yet complete. Leaders only."""
        folder = self._unfinished(server_round) / name
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            config.save_pretrained(str(folder))
        write_folder(folder, {WEIGHTS: weights, **extras}, info)

    def carry_over(self, server_round: int, clients: list[int]) -> None:
        """Give a round that is not yet complete the local adapters of `clients` as they were one round before."""
        for client in clients:
            name = local_folder(client)
            old, new = (
                self.round_dir(server_round - 1) / name,
                self._unfinished(server_round) / name,
            )
            if old.is_dir():
                with storage_errors(new):
                    shutil.rmtree(new, ignore_errors=True)
                    shutil.copytree(old, new)

    def complete_round(self, server_round: int, meta: Mapping[str, Any], keep_rounds: int) -> None:
        """Make the round count: coordinator, after all leaders have saved. Keeps the last `keep_rounds` rounds."""
        unfinished, final = self._unfinished(server_round), self.round_dir(server_round)
        with storage_errors(final):
            paths = [*unfinished.glob(f"global/{STATE}"), *unfinished.glob(f"local/*/{STATE}")]
            states = {str(path.relative_to(unfinished)): sha256_of(path) for path in sorted(paths)}
            # Our own is not asked of the metadata: a checkout that was never installed has none.
            versions = {"dpa_ds": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
            manifest = {"round": server_round, **meta, "versions": versions, "states": states}
            write_text(unfinished / META, json.dumps(manifest, indent=1))
            fsync(unfinished)
            if final.exists():  # an abandoned round of the same number
                shutil.rmtree(final)
            unfinished.rename(final)
            link = self.run_dir / "adapters.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(final.relative_to(self.run_dir))
            link.replace(self.run_dir / "adapters")
            fsync(self.rounds_dir)
        # The new round counts, whatever becomes of old ones.
        shutil.rmtree(final / "progress", ignore_errors=True)
        for old in sorted(self.rounds_dir.glob("round_??????"))[:-keep_rounds]:
            shutil.rmtree(old, ignore_errors=True)

    def load_adapter(self, server_round: int, name: str) -> SavedAdapter:
        """Read one adapter of a complete round, checking its checksums.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapter has NaN or infinity.
        """
        folder = self.round_dir(server_round) / name
        remedy = f"delete {self.round_dir(server_round)} to continue from the round before"
        saved = read_folder(folder, remedy)
        if WEIGHTS not in saved.tensors:
            raise CheckpointError(f"{folder} has no {WEIGHTS}.safetensors: {remedy}")
        remedy = f"delete {self.round_dir(server_round)} to use the round before, or train again"
        check_finite(folder, saved.tensors[WEIGHTS], remedy)
        extras = {key: tensors for key, tensors in saved.tensors.items() if key != WEIGHTS}
        return SavedAdapter(saved.tensors[WEIGHTS], extras, saved.info)

    def load_newest(self, server_round: int, name: str) -> SavedAdapter | None:
        """`load_adapter`, of a later round if this one is gone: other groups continue, and delete, while one starts.

        The local adapters of clients that are not there are the same in all rounds that they miss.

        Returns:
            None if no round has such an adapter.

        Raises:
            CheckpointError: as `load_adapter`.
        """
        while True:
            try:
                if (self.round_dir(server_round) / name).is_dir():
                    return self.load_adapter(server_round, name)
            except CheckpointError:
                if self.latest_round() == server_round:
                    raise
            latest = self.latest_round()
            if latest == server_round:
                return None
            server_round = latest

    def info(self, server_round: int, name: str) -> dict[str, Any]:
        """What the saver added to an adapter of a complete round, without reading its tensors.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return read_info(self.round_dir(server_round) / name, "restore it, or delete that round")

    # ---- inside a round ---------------------------------------------------------------------------------------

    def save_progress(
        self,
        server_round: int,
        client: int,
        tensors: Mapping[str, AdapterState],
        info: Mapping[str, Any],
        kept: Sequence[str] = (),
    ) -> None:
        """Write how far a client has come in a round; what was there before is deleted afterwards. Its leader only.

        Of no use, and not an error, once other groups have completed the round without this one, and closed its folder.

        Args:
            kept: names of tensors that stay as they were saved before.
        """
        folder = self._progress(server_round, client)
        older = _numbered(folder)
        number = int(older[-1].name) + 1 if older else 0
        new = folder / f"{number:06d}"
        try:
            with storage_errors(new):
                new.mkdir(parents=True, exist_ok=True)
                for name in kept:
                    file = older[-1] / f"{name}.safetensors"
                    if file.exists():  # a method without a global phase has no update
                        shutil.copyfile(file, new / file.name)
            write_folder(new, tensors, info)
        except CheckpointError:
            if self.latest_round() < server_round:
                raise
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def load_progress(
        self, server_round: int, client: int, on_damage: Callable[[CheckpointError], None]
    ) -> SavedFolder | None:
        """The newest whole progress of a client in a round, if there is one; `on_damage` is reported what was
        passed over."""
        for folder in reversed(_numbered(self._progress(server_round, client))):
            if (folder / STATE).exists():  # else the write was interrupted
                try:
                    return read_folder(folder, "what came before it is used")
                except CheckpointError as error:
                    on_damage(error)
        return None

    def remove_leftovers(self, completed: int) -> None:
        """Delete what cannot be of use after round `completed`. Coordinator, before any round starts."""
        current = self._unfinished(completed + 1)
        stale = [path for path in self.rounds_dir.glob("*.tmp") if path != current]
        stale += [path for path in current.glob("*") if path.name != "progress"]
        stale += self.rounds_dir.glob("round_??????/progress")
        for path in stale:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _progress(self, server_round: int, client: int) -> Path:
        return self._unfinished(server_round) / "progress" / f"client_{client:02d}"

    def _unfinished(self, server_round: int) -> Path:
        return self.rounds_dir / f"round_{server_round:06d}.tmp"
