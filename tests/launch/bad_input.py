"""What the tables of bad input share: a row, the folder that it spoils, and what every refusal must be.

Every case is a process of its own (forked from one that has imported everything), with the program's own entry point and
a deadline. A row is added with one `Case(...)` in a table.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dpa_ds.runs.storage import sha256_of
from tests import tiny
from tests.launch.processes import run_forked

DEADLINE_SECONDS = 60.0
ROUNDS = ("runs/tiny/rounds/round_000001", "runs/tiny/rounds/round_000002")
LAST = ROUNDS[1]
"""Of a trained run."""


@dataclass(frozen=True)
class Place:
    """A test's folder with copies of model, data and perhaps a run to spoil: a run from there would work."""

    root: Path

    @property
    def model(self) -> Path:
        """Model directory."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """Federation of two clients."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """`output_dir` of the recipe."""
        return self.root / "runs"

    @property
    def run(self) -> Path:
        """Where the run is, or will be."""
        return self.runs / "tiny"

    @property
    def recipe(self) -> Path:
        """The small run."""
        return self.root / "runs.yaml"

    def client(self, client: int) -> Path:
        """Training file of a client."""
        return self.data / "2" / f"local_training_{client}.json"

    def fill(self, text: str) -> str:
        """`text` with the paths for {root}, {model}, {data}, {run} and {recipe}."""
        for name in ("root", "model", "data", "run", "recipe"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text


@dataclass(frozen=True)
class Case:
    """One row: what the user does wrong, and what is said about it."""

    name: str
    says: str | tuple[str, ...]
    """What the message contains: the file, key or line, and the remedy. `Place.fill` puts in the paths."""
    arguments: tuple[str, ...] = ()
    """Of the command line, after the recipe. `Place.fill` puts in the paths."""
    spoil: Callable[[Place], object] = lambda place: None
    exit_code: int = 2
    program: str = "launch/run.py"
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment."""

    def __str__(self) -> str:
        """For pytest's -k."""
        return self.name


def make_place(root: Path, model: Path, federation: Path) -> Place:
    """Fresh copies, and the recipe."""
    place = Place(root)
    shutil.copytree(model, place.model)
    shutil.copytree(federation, place.data)
    tiny.recipe(place.model, place.data, place.runs, data__cache_dir=root / "cache")
    return place


def make_run(root: Path, trained: Place) -> Place:
    """A copy of the run, as if it had been trained there."""
    place = Place(root)
    shutil.copytree(trained.root, root, symlinks=True, dirs_exist_ok=True)
    for path in (place.recipe, place.run / "config.yaml"):
        path.write_text(path.read_text().replace(str(trained.root), str(root)))
    return place


def refuse(case: Case, place: Place) -> None:
    """The job must end with one error line that says what `case` expects, and leave every file as it was."""
    case.spoil(place)
    has_recipe = case.program in ("launch/run.py", "launch/compare.py")
    argv = [*(["--config", str(place.recipe)] if has_recipe else []), *map(place.fill, case.arguments)]
    before = checksums(place.root)
    ended = run_forked(argv, DEADLINE_SECONDS, case.program, **case.variables)
    shutil.rmtree(place.root / "cache", ignore_errors=True)  # tokens, and converted models
    assert ended.returncode == case.exit_code, ended.output
    assert ended.num_tracebacks == 0, ended.output
    assert len(ended.errors) == 1, ended.output
    reported = ended.output[ended.output.index("error: ") :]
    for words in [case.says] if isinstance(case.says, str) else case.says:
        assert place.fill(words) in reported
    assert len(reported) < 2000, "nobody reads that"
    assert checksums(place.root) == before


def checksums(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, and what is in it."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in [folder, *folder.rglob("*")]
        if path.exists() or path.is_symlink()
    }


# ---- spoilers: each gives a function for Case.spoil; paths are relative to the place ----------------------------


def write(path: str, content: str | bytes) -> Callable[[Place], object]:
    """Replace a file."""

    def spoil(place: Place) -> None:
        target = place.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def link(path: str, target: str) -> Callable[[Place], object]:
    """Put a symbolic link in place of a file or folder. A link to its own name is a loop."""

    def spoil(place: Place) -> None:
        remove(path)(place)
        (place.root / path).symlink_to(target)

    return spoil


def fifo(path: str) -> Callable[[Place], object]:
    """Put a pipe that nobody writes to in place of a file: who opens it waits for ever."""

    def spoil(place: Place) -> None:
        remove(path)(place)
        os.mkfifo(place.root / path)

    return spoil


def folder(path: str) -> Callable[[Place], object]:
    """Put a folder in place of a file."""

    def spoil(place: Place) -> None:
        remove(path)(place)
        (place.root / path).mkdir(parents=True)

    return spoil


def remove(*paths: str) -> Callable[[Place], object]:
    """Delete files or folders."""

    def spoil(place: Place) -> None:
        for path in paths:
            target = place.root / path
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)

    return spoil


def cut(path: str, num_bytes: int) -> Callable[[Place], object]:
    """Cut off the end of a file."""
    return lambda place: (place.root / path).write_bytes((place.root / path).read_bytes()[:-num_bytes])


def change_json(path: str, **changes: Any) -> Callable[[Place], object]:
    """Set keys of a JSON file."""
    return lambda place: (place.root / path).write_text(
        json.dumps({**json.loads((place.root / path).read_text()), **changes})
    )


def change_tensors(path: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Place], object]:
    """Rewrite a safetensors file."""
    return lambda place: save_file(change(load_file(place.root / path)), place.root / path, metadata={"format": "pt"})


def resealed(change: Callable[[dict[str, Any]], dict[str, Any]], client: str = "global") -> Callable[[Place], object]:
    """Change an adapter of the last round and make all checksums right again."""

    def spoil(place: Place) -> None:
        change_tensors(f"{LAST}/{client}/adapter_model.safetensors", change)(place)
        reseal(place, client, adapter_model=place.root / LAST / client / "adapter_model.safetensors")

    return spoil


def reseal(place: Place, client: str, **files: Path) -> None:
    state, meta = place.root / LAST / client / "state.json", place.root / LAST / "meta.json"
    content = json.loads(state.read_text())
    content["sha256"] |= {path.name: sha256_of(path) for path in files.values()}
    state.write_text(json.dumps(content))
    manifest = json.loads(meta.read_text())
    manifest["states"][f"{client}/state.json"] = sha256_of(state)
    meta.write_text(json.dumps(manifest))


def not_finite(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def other_rank(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.repeat(2, 1) if "lora_A" in name else tensor.repeat(1, 2) for name, tensor in tensors.items()}
