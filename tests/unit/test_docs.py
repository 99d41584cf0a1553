"""README and docs say what is there: links, commands, fields, recipes, paths, the folder tree, and the
generated reference."""

import importlib.util
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dpa_ds.config.fields import FIELDS, SECTIONS
from dpa_ds.config.load import load_config

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.name != "reference.md"]
OTHERS = [REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PACKAGE = REPOSITORY / "dpa_ds"
MAX_README_LINES = 180
FILE_ENDINGS = ("json", "jsonl", "sbatch")
"""`model.json`, `metrics.jsonl` and `train.sbatch` look like fields, and are files."""
ELSEWHERE = {"runtime/zero/utils.py"}
"""Files of DeepSpeed."""

Check = Callable[[str, Path], list[str]]
parametrize = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(text: str) -> set[str]:
    """What a link may point to: the headings outside code, as GitHub names them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links to files or headings that do not exist. From docs/ they must stay inside docs/, which is
    the site."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        content = (
            text
            if path == page
            else path.read_text(encoding="utf-8")
            if path.suffix == ".md" and path.is_file()
            else ""
        )
        outside = page.parent.name == "docs" and page.parent.resolve() not in path.parents
        if not path.exists() or outside or (anchor and anchor not in anchors(content)):
            broken.append(target)
    return broken


def missing_programs(text: str, page: Path) -> list[str]:
    """Programs, job scripts, recipes, DeepSpeed JSONs and benchmarks that are named and do not exist."""
    named = re.findall(r"(?<![\w/])(?:launch|benchmarks|ds_configs)/[\w/]+\.(?:py|sbatch|yaml|json)\b", text)
    return [name for name in named if not (REPOSITORY / name).is_file()]


def unknown_fields(text: str, page: Path) -> list[str]:
    """`--section.field` in a command, and `section.field` in code, that no recipe has."""
    sections = "|".join(re.escape(section) for section in SECTIONS)
    options = re.findall(rf"--((?:{sections})\.[\w.]*\w)", text)
    quoted = re.findall(rf"`((?:{sections})\.[\w.]*\w)(?::? [^`]*)?`", text)
    keys = [key for key in (*options, *quoted) if key.rpartition(".")[2] not in FILE_ENDINGS]
    return [key for key in keys if key not in FIELDS and key not in SECTIONS]


def missing_paths(text: str, page: Path) -> list[str]:
    """Source and test files in code (`engine/engine.py`, `tests/plain.py`, `test_stop.py`) that do not exist."""
    roots = [
        REPOSITORY,
        PACKAGE,
        *(path for path in (REPOSITORY / "tests").iterdir() if path.is_dir()),
    ]
    roots += [REPOSITORY / "launch", REPOSITORY / "launch" / "slurm"]
    named = re.findall(r"`([\w/]+\.(?:py|sbatch))`", text)
    return [name for name in named if name not in ELSEWHERE and not any((root / name).is_file() for root in roots)]


CHECKS: tuple[Check, ...] = (broken_links, missing_programs, unknown_fields, missing_paths)


@parametrize
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_page(check: Check, page: Path) -> None:
    assert check(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_other_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page) == []
    assert missing_programs(text, page) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (broken_links, "[a](no_such_page.md)"),
        (broken_links, "[a](index.md#no-such-heading)"),
        (broken_links, "[a](#no-such-heading)"),
        (broken_links, "[a](../README.md)"),
        (missing_programs, "python launch/no_such_program.py --config RECIPE"),
        (missing_programs, "`ds_configs/zero4.json`"),
        (unknown_fields, "run.py --federation.compresion int16"),
        (unknown_fields, "set `federation.num_round`"),
        (unknown_fields, "set `cluster.heartbeat_seconds: 3`"),
        (missing_paths, "see `engine/no_such_file.py`"),
    ],
)
def test_faults_are_found(check: Check, text: str) -> None:
    assert len(check(text, REPOSITORY / "docs" / "guide.md")) == 1


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (
            broken_links,
            "[a](index.md), [b](concepts.md#glossary), [c](https://arxiv.org/abs/2403.19211)",
        ),
        (missing_programs, "deepspeed launch/run.py --config launch/recipes/demo.yaml"),
        (unknown_fields, "`federation.compression: int16` and --train.learning_rate 1e-3"),
        (missing_paths, "`config/schema.py`"),
    ],
)
def test_what_exists_passes(check: Check, text: str) -> None:
    assert check(text, REPOSITORY / "docs" / "guide.md") == []


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_recipes_in_pages_are_valid(tmp_path: Path) -> None:
    """A YAML block is a recipe, or a part of one."""
    blocks = [
        block for page in GUIDES for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    ]
    assert blocks
    for block in blocks:
        recipe = tmp_path / "recipe.yaml"
        given = yaml.safe_load(block)
        for section in ("model", "data"):
            given.setdefault(section, {}).setdefault("path", "somewhere")
        recipe.write_text(yaml.safe_dump(given))
        load_config(["--config", str(recipe)])


def test_the_folder_tree_is_that_of_the_package() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\ndpa_ds/\n(.*?)^```", page, flags=re.M | re.S)
    shown = {name: set(files.split()) for name, files in re.findall(r"^  (\w+)/ +(.+)$", tree, flags=re.M)}
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    there = {path.name: {_shown_as(entry) for entry in path.iterdir()} - {""} for path in folders}
    assert shown == there


def test_the_order_of_imports_is_the_contract() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(cli\n.*?)^```", page, flags=re.M | re.S)
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "order"]
    assert block.splitlines() == layers


def test_every_page_is_in_the_site() -> None:
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"\w+\.md", str(navigation)))
    assert named == {page.name for page in PAGES if page.name != "README.md"}


def test_the_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert _generator().main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_reference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = _generator()
    stale = tmp_path / "reference.md"
    stale.write_text(generator.render().replace("Federated rounds", "Rounds"))
    monkeypatch.setattr(generator, "PAGE", stale)
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0


def test_the_reference_names_every_field() -> None:
    headings = re.findall(r"^### (.+)$", _generator().render(), flags=re.M)
    assert sorted(headings) == sorted(FIELDS)


def _shown_as(entry: Path) -> str:
    """Of a file or folder inside a package: as the tree shows it; empty where it does not."""
    if entry.is_dir():
        return f"{entry.name}/" if (entry / "__init__.py").is_file() else ""
    return entry.name if entry.suffix == ".py" and entry.name != "__init__.py" else ""


def _generator() -> ModuleType:
    """docs/generate_reference.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("generate_reference", REPOSITORY / "docs" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
