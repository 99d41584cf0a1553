"""Which files a path means: a file, a pattern, a folder of shards, a data set of the hub, a file for each client.

Nothing is fetched: of a data set of the hub the copy in the hub's cache is read. Raises DataError.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpa_ds.config.paths import CLIENT
from dpa_ds.data.arrow_files import is_saved_dataset
from dpa_ds.data.byte_source import is_compressed
from dpa_ds.errors import DataError, list_some

_KINDS = {".json": "JSON", ".jsonl": "JSON", ".csv": "CSV", ".parquet": "parquet"}

# As the hub names the files of a split; any other split is found by its own name.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

# What data sets have beside their rows.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Layout:
    """How the recipe says that data are arranged at a path."""

    split: str = "train"
    """Of a folder or data set that has several."""
    split_field: str = "data.split"
    """Field of the recipe that names it."""
    field: str | None = None
    """Of a .json file that is one object: where in it the rows are."""


def file_kind(path: Path) -> str | None:
    """JSON, CSV or parquet, by the name, also of a compressed file; None: no file of rows."""
    name = Path(path.stem) if is_compressed(path) else path
    kind = _KINDS.get(name.suffix.lower())
    return None if kind == "parquet" and is_compressed(path) else kind


def has_lines(path: Path) -> bool:
    """Whether the name says that a JSON file has one object a line."""
    name = Path(path.stem) if is_compressed(path) else path
    return name.suffix.lower() == ".jsonl"


def find_sources(path: Path, layout: Layout) -> list[Path]:
    """The files that `path` means, sorted by name, or the one folder written by save_to_disk."""
    if path.is_dir():
        return _find_in_folder(path, layout)
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        return _find_by_pattern(path)
    folder = find_hub_snapshot(str(path))
    if folder is not None:
        return _find_in_folder(folder, layout)
    return [path]  # whoever opens it reports that it is not there


def _find_by_pattern(pattern: Path) -> list[Path]:
    found = []
    for name in sorted(glob.glob(str(pattern), recursive=True)):
        if Path(name).is_file():
            found.append(Path(name))
    if not found:
        raise DataError(f"{pattern}: no such file or folder: no file matches: check data.path and data.test_path")
    _check_kinds(pattern, found)
    return found


def _find_in_folder(folder: Path, layout: Layout) -> list[Path]:
    if is_saved_dataset(folder):
        return [folder]
    files = _find_configured(folder, layout)
    if files is None:
        files = _of_split(folder, _list_files(folder), layout)
    if not files:
        raise DataError(f"{folder}: folder without data: name a file in it, or a folder written by save_to_disk")
    _check_kinds(folder, files)
    return files


def _list_files(folder: Path) -> list[Path]:
    """Files of rows in a folder and below it, but for those of the authors' layout, which is no table."""
    if any(folder.glob("*/local_training_*.json")):
        return []
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and name not in _NO_DATA and file_kind(path) is not None:
                found.append(path)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _of_split(folder: Path, files: Sequence[Path], layout: Layout) -> list[Path]:
    """Files whose names below the folder have a word of the split; all of them, where no name has one of any."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = set(re.split(r"[^a-z0-9]+|(?<=[a-z])(?=\d)", path.relative_to(folder).as_posix().lower()))
        for split in (layout.split, *_SPLIT_WORDS):
            if words & {split.lower(), *_SPLIT_WORDS.get(split, ())}:
                splits.setdefault(split, []).append(path)
                break
    if not splits:
        return list(files)
    if layout.split not in splits:
        raise DataError(
            f"{folder}: no split {layout.split!r} among {sorted(splits)}: set {layout.split_field} to one of them, or "
            "give a pattern of files"
        )
    return splits[layout.split]


def _check_kinds(path: Path, files: Sequence[Path]) -> None:
    names: dict[str | None, str] = {}
    for file in files:
        names.setdefault(file_kind(file), file.name)
    if len(names) > 1:
        raise DataError(
            f"{path}: files of several kinds ({', '.join(names.values())}): name those of one kind by a pattern, such "
            f"as {path if path.is_dir() else path.parent}/*{Path(next(iter(names.values()))).suffix}"
        )


# ---- data sets of the hub ------------------------------------------------------------------------------------------


def find_hub_snapshot(name: str) -> Path | None:
    """Folder of a data set `owner/name` in the hub's cache; None where `name` can be none.

    Raises:
        DataError: it is not there.
    """
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "-")):
        return None
    # Not a suffix of a file alone: names of data sets have dots, but none ends as a file of rows does.
    if file_kind(Path(name)) is not None:
        return None
    cache = hub_cache()
    folder = cache / f"datasets--{name.replace('/', '--')}"
    snapshots = sorted((folder / "snapshots").glob("*"))
    revision = folder / "refs" / "main"
    if revision.is_file():
        snapshots = [folder / "snapshots" / revision.read_text(encoding="utf-8", errors="replace").strip()]
    if len(snapshots) != 1 or not snapshots[0].is_dir():
        what = f"{len(snapshots)} revisions of it" if len(snapshots) > 1 else "no data set of that name"
        raise DataError(
            f"{name}: no such file or folder, and {what} in the hub's cache {cache}: check data.path and "
            f"data.test_path, or run: hf download --repo-type dataset {name}"
        )
    return snapshots[0]


def hub_cache() -> Path:
    """Where the hub's programs keep what they fetched."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(cache)))


def _find_configured(folder: Path, layout: Layout) -> list[Path] | None:
    """Files of the split as the card of a data set (README.md) lists them; None where it lists none."""
    configurations = _read_configurations(folder / "README.md")
    names = [str(configuration.get("config_name", "default")) for configuration in configurations]
    chosen = [entry for entry in configurations if entry.get("default") is True] or configurations
    if not chosen:
        return None
    if len(chosen) > 1:
        raise DataError(
            f"{folder}: the data set has the configurations {list_some(names)}: name the files of one by a pattern, "
            f"such as {folder}/{names[0]}/train-*.parquet"
        )
    patterns = _patterns_by_split(chosen[0]["data_files"])
    if layout.split not in patterns:
        raise DataError(
            f"{folder}: no split {layout.split!r} among {sorted(patterns)}: set {layout.split_field} to one of them"
        )
    found: set[Path] = set()
    for pattern in patterns[layout.split]:
        found.update(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise DataError(
            f"{folder}: README.md names {patterns[layout.split]}, and no such file is there: run hf download again"
        )
    return sorted(found)


def _read_configurations(card: Path) -> list[dict[str, Any]]:
    """Those with a list of files."""
    if not card.is_file():
        return []
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    header, end, _ = rest.partition("\n---")
    try:
        content = yaml.safe_load(header) if end else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []  # a text for people that has lines in it
    listed = content.get("configs") if isinstance(content, dict) else None
    entries = listed if isinstance(listed, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.get("data_files")]


def _patterns_by_split(data_files: Any) -> dict[str, list[str]]:
    """From one pattern, a list of them, or a list of {split, path}. A pattern stays below the folder."""
    found: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str) and path and not path.startswith("/") and ".." not in path.split("/"):
                found.setdefault(split, []).append(path)
    return found


# ---- a file or folder for each client ------------------------------------------------------------------------------


def path_of_client(path: str, name: str) -> str:
    """Where the client `name` has its files."""
    if glob.has_magic(path):  # a pattern: what its client's name spells is not part of it
        name = glob.escape(name)
    return path.replace(CLIENT, name)


def find_client_names(path: str) -> list[str]:
    """Names of the clients whose files are here, sorted: what stands in the place of {client}. Opens no file.

    Raises:
        DataError: there are none.
    """
    before, _, after = path.partition(CLIENT)
    folder, prefix = os.path.split(before)
    suffix, separator, below = after.partition("/")
    root = Path(folder or ".")
    if not root.is_dir():
        raise DataError(f"{path}: no such file or folder: {root}: check data.path and data.test_path")
    names = []
    for entry in sorted(root.iterdir()):
        name = entry.name
        has_form = name.startswith(prefix) and name.endswith(suffix) and len(name) > len(prefix) + len(suffix)
        if not has_form or name.startswith("."):
            continue
        if separator:
            is_client = bool(glob.glob(os.path.join(glob.escape(str(entry)), below)))
        else:
            is_client = entry.is_dir() or file_kind(Path(f"x{suffix}")) is not None
        if is_client:
            names.append(name[len(prefix) : len(name) - len(suffix)])
    if not names:
        raise DataError(
            f"{path}: no such file or folder for any client: name files as in data/{CLIENT}.jsonl, folders as in "
            f"data/{CLIENT} or data/{CLIENT}/train.jsonl, or set data.clients where each host has its own clients' only"
        )
    return names
