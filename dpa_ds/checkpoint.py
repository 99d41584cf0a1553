"""State of a run after a round, on disk: written whole or not at all, in PEFT's own format.

    runs/NAME/rounds/round_000003/global/{adapter_model.safetensors, adapter_config.json, state.json}
                                  local/client_02/{..., references.safetensors, optimizer.safetensors}
                                  meta.json                                     written last: the round is complete
    runs/NAME/adapters -> rounds/round_000003

Every leader writes its clients; the main leader the rest. All hosts see the folder (a shared file system).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors
from safetensors.torch import load_file, save_file

from dpa_ds.config import RunConfig
from dpa_ds.config_loader import diff_configs, fingerprint_sections, load_config
from dpa_ds.distributed.federation_group import AdapterState
from dpa_ds.errors import CheckpointError

KEPT_ROUNDS = 2
WEIGHTS, STATE, META = "adapter_model.safetensors", "state.json", "meta.json"
MODEL = "model.json"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter as it lies on disk."""

    weights: AdapterState
    extras: dict[str, AdapterState]
    """Further tensors by name, such as `optimizer` and `references`."""
    info: dict[str, Any]
    """What the saver added, such as the number of steps taken."""


class RunFolder:
    """The rounds of one run on disk."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rounds_dir = run_dir / "rounds"

    def claim(self, config: RunConfig) -> int:
        """Make sure that this folder is free, or holds this very run; the last complete round. Writes nothing.

        Raises:
            CheckpointError: another run lives here, or the place cannot be written.
        """
        recipe = self.run_dir / "config.yaml"
        if recipe.is_file():
            old = load_config(["--config", str(recipe)])
            differences = diff_configs(fingerprint_sections(old), fingerprint_sections(config))
            if differences:
                raise CheckpointError(
                    f"{self.run_dir} holds a different run ({'; '.join(differences)}): choose another name, "
                    "or delete that folder"
                )
        elif self.run_dir.exists() and (not self.run_dir.is_dir() or any(self.run_dir.iterdir())):
            raise CheckpointError(f"{self.run_dir} exists but is not a run (no config.yaml): choose another name")
        existing = next(path for path in (self.run_dir, *self.run_dir.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise CheckpointError(f"cannot write results to {self.run_dir} ({existing}): choose another output_dir")
        return self.latest_round()

    def check_model(self, fingerprint: str) -> None:
        """Refuse a base model other than the one that this run was trained over, wherever it lies now.

        Raises:
            CheckpointError: `model.json` of the run names another fingerprint, or cannot be read.
        """
        path = self.run_dir / MODEL
        try:
            recorded = json.loads(path.read_text())["fingerprint"] if path.exists() else fingerprint
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}): restore it; or delete it, if you are sure that "
                "model.path is the base that this run was trained over"
            ) from error
        if recorded != fingerprint:
            raise CheckpointError(
                f"the base model differs from the one that {self.run_dir} was trained over (see {path}): its adapters "
                "mean nothing on another; set model.path to the right one"
            )

    def latest_round(self) -> int:
        """Last complete round, 0 if there is none."""
        complete = [int(p.parent.name.removeprefix("round_")) for p in self.rounds_dir.glob(f"round_??????/{META}")]
        return max(complete, default=0)

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
        return sorted(int(p.name.removeprefix("client_")) for p in self.round_dir(server_round).glob("local/client_*"))

    def digest(self, server_round: int) -> str:
        """Which adapters a complete round holds, from the checksums that were saved with them: 16 hex digits."""
        states = sorted(self.round_dir(server_round).glob(f"**/{STATE}"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in states)).hexdigest()[:16]

    def remove_leftovers(self) -> None:
        """Delete what an interrupted attempt left half-written. Main leader, before any round starts."""
        for path in self.rounds_dir.glob("*.tmp"):
            shutil.rmtree(path)

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
        with _storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            config.save_pretrained(str(folder))
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            for extra, tensors in extras.items():
                save_file(tensors, folder / f"{extra}.safetensors")
            files = [path for path in sorted(folder.iterdir()) if path.name != STATE]
            for path in files:
                _fsync(path)
            content = {"sha256": {path.name: _sha256(path) for path in files}, "info": dict(info)}
            _write_text(folder / STATE, json.dumps(content, indent=1))
            for directory in (folder, folder.parent):  # the names of the files, too, must survive a power cut
                _fsync(directory)

    def complete_round(self, server_round: int, meta: Mapping[str, Any]) -> None:
        """Make the round count: main leader, after all leaders have saved. Keeps the last `KEPT_ROUNDS` rounds."""
        unfinished, final = self._unfinished(server_round), self.round_dir(server_round)
        with _storage_errors(final):
            _write_text(unfinished / META, json.dumps({"round": server_round, **meta}, indent=1))
            _fsync(unfinished)
            if final.exists():  # a damaged or abandoned round of the same number
                shutil.rmtree(final)
            unfinished.rename(final)
            link = self.run_dir / "adapters.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(final.relative_to(self.run_dir))
            link.replace(self.run_dir / "adapters")
            _fsync(self.rounds_dir)
        for old in sorted(self.rounds_dir.glob("round_??????"))[:-KEPT_ROUNDS]:
            shutil.rmtree(old, ignore_errors=True)  # the new round counts, whatever becomes of an old one

    def load_adapter(self, server_round: int, name: str) -> SavedAdapter:
        """Read one adapter of a complete round, checking its checksums.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        folder = self.round_dir(server_round) / name
        remedy = f"delete {folder.parents[len(Path(name).parts) - 1]} to continue from the round before"
        try:
            state = json.loads((folder / STATE).read_text())
            for file, expected in state["sha256"].items():
                if _sha256(folder / file) != expected:
                    raise CheckpointError(f"{folder / file} is damaged (checksum differs): {remedy}")
            files = {Path(file) for file in state["sha256"] if file.endswith(".safetensors") and file != WEIGHTS}
            extras = {file.stem: load_file(folder / file) for file in sorted(files)}
            return SavedAdapter(load_file(folder / WEIGHTS), extras, state["info"])
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read ({error}): {remedy}") from error

    def info(self, server_round: int, name: str) -> dict[str, Any]:
        """What the saver added to an adapter of a complete round, without reading its tensors.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = self.round_dir(server_round) / name / STATE
        try:
            info: dict[str, Any] = json.loads(path.read_text())["info"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): restore it, or delete that round") from error
        return info

    def _unfinished(self, server_round: int) -> Path:
        return self.rounds_dir / f"round_{server_round:06d}.tmp"


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all.

    Raises:
        CheckpointError: the file system refuses.
    """
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        _write_text(temporary, text)
        temporary.replace(path)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; earlier rounds are intact: make room or choose another output_dir, "
            "then run the same command again"
        ) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
