"""Rules of the house that a linter cannot see: who may use which library, what nobody uses, and which words
are gone."""

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpa_ds.config.schema import FederationConfig

PACKAGE = Path(__file__).parents[2] / "dpa_ds"

OWNERS = {
    "torch.distributed": ("distributed/",),
    "deepspeed": ("engine/", "model/base.py", "distributed/world.py"),
    "tensorboard": ("runs/curves.py",),
    "torch.utils.tensorboard": ("runs/curves.py",),
    "wandb": ("runs/trackers.py",),
    "mlflow": ("runs/trackers.py",),
    "mpi4py": ("distributed/launchers.py",),
    # Loading runs code from the file: weights are safetensors, state is JSON.
    "pickle": (),
    "torch.load": (),
    "torch.save": (),
}
"""Dotted names, with all below them, and the only files and folders of dpa_ds that may use them."""

LAST_RESORT = ("cli/bootstrap.py", "model/directory.py", "runs/trackers.py")
"""Files that may catch everything: a rank that fails, whatever the reason, has to tell the others; at a damaged file
tokenizers raises bare Exception; and a service that fails, in a way of its own, must not end a training."""


ADAPTER_NAMES = ("adapters/methods.py", "config/schema.py", "planning/scenario.py")
"""The only files that spell "global" and "local"; the others use the constants of adapters/methods.py, which
the planner cannot import (it needs no torch and no adapters)."""


def used_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import and of every attribute of an imported name, aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for name in names:
                    root = name.name.split(".")[0]
                    aliases[name.asname or root] = name.name if name.asname else root
                    yield node.lineno, name.name
            case ast.ImportFrom(module=str(module), names=names):
                for name in names:
                    aliases[name.asname or name.name] = f"{module}.{name.name}"
                    yield node.lineno, f"{module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in aliases:
                yield node.lineno, f"{aliases[root]}.{rest}"


def faults(source: str, file: str) -> list[str]:
    """`file:line: fault` of every breach, `file` being a path below dpa_ds."""
    tree = ast.parse(source)
    found = {
        f"{file}:{line}: {library}"
        for line, name in used_names(tree)
        for library, owners in OWNERS.items()
        if f"{name}.".startswith(f"{library}.") and not file.startswith(owners)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                found.add(f"{file}:{node.lineno}: print")
            case ast.ExceptHandler(type=kind) if file not in LAST_RESORT:
                kinds = {"BaseException"} if kind is None else {ast.unparse(part) for part in ast.walk(kind)}
                if kinds & {"Exception", "BaseException"}:
                    found.add(f"{file}:{node.lineno}: blanket except")
    return sorted(found)


def test_the_package_keeps_the_rules() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [fault for path in files for fault in faults(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert found == []


def trusting_loads(source: str) -> list[str]:
    """`line: call` of every load by transformers that does not say `trust_remote_code=False`.

    Without it transformers asks on the terminal whether it may run a file from the model's directory.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if re.fullmatch(r"(\w+\.)*Auto\w+\.from_(pretrained|config)", called):
            said = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "trust_remote_code"]
            if said != ["False"]:
                found.append(f"{node.lineno}: {called}")
    return found


def test_no_code_comes_with_a_model() -> None:
    sources = [path for folder in (PACKAGE, PACKAGE.parent / "benchmarks") for path in sorted(folder.rglob("*.py"))]
    found = {str(path): trusting_loads(path.read_text()) for path in sources}
    assert {path: calls for path, calls in found.items() if calls} == {}
    assert trusting_loads("AutoConfig.from_pretrained(d)") == ["1: AutoConfig.from_pretrained"]
    assert trusting_loads("t.AutoTokenizer.from_pretrained(d, trust_remote_code=yes)")
    assert trusting_loads("AutoModelForCausalLM.from_config(c)")
    assert trusting_loads("AutoConfig.from_pretrained(d, trust_remote_code=False)") == []


def spells_adapter_names(source: str) -> bool:
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "global" in constants or "local" in constants


def test_names_of_adapters_are_spelled_in_one_place() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {name for name, source in files.items() if spells_adapter_names(source)}
    assert found == set(ADAPTER_NAMES)
    assert spells_adapter_names('state["local"]')
    assert not spells_adapter_names('"""The local adapter."""\nf"local/{client}"')


@pytest.mark.parametrize(
    ("source", "file", "fault"),
    [
        ("import torch.distributed as dist", "federation/loop.py", "torch.distributed"),
        ("from torch import distributed", "cli/train.py", "torch.distributed"),
        ("import torch; torch.distributed.barrier()", "engine/engine.py", "torch.distributed"),
        (
            "from deepspeed.accelerator import get_accelerator",
            "distributed/topology.py",
            "deepspeed",
        ),
        ("def f():\n import deepspeed", "cli/train.py", "deepspeed"),
        (
            "from torch.utils.tensorboard import SummaryWriter",
            "cli/train.py",
            "torch.utils.tensorboard",
        ),
        ("import pickle", "runs/tracking.py", "pickle"),
        ("import torch as t\nt.load(p)", "runs/folder.py", "torch.load"),
        ("print(1)", "runs/tracking.py", "print"),
        ("try: f()\nexcept: g()", "cli/train.py", "blanket except"),
        ("try: f()\nexcept BaseException: g()", "cli/train.py", "blanket except"),
        ("try: f()\nexcept (OSError, Exception): g()", "cli/train.py", "blanket except"),
    ],
)
def test_breaches_are_found(source: str, file: str, fault: str) -> None:
    assert [text.rpartition(": ")[2] for text in faults(source, file)] == [fault]


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("import torch.distributed as dist\ndist.barrier()", "distributed/world.py"),
        ("import deepspeed", "engine/engine.py"),
        ("import json\njson.load(f)", "runs/folder.py"),
        ("try: f()\nexcept (OSError, ValueError): g()", "cli/train.py"),
        ("try: f()\nexcept BaseException: g()", "cli/bootstrap.py"),
        ("import torch.nn.functional as F\nF.relu(x)", "cli/train.py"),
    ],
)
def test_owners_may(source: str, file: str) -> None:
    assert faults(source, file) == []


# ---- words ----------------------------------------------------------------------------------------------------------

WORDS_FOLDERS = ("benchmarks", "docs", "dpa_ds", "ds_configs", "launch", "tests")
WORDS_SUFFIXES = {".json", ".md", ".py", ".sbatch", ".sh", ".yaml"}

OLD_NAMES = {
    "Helm|_?helm": "PreemptionSync",
    "at_boundary": "PreemptionSync.check",
    "is_main|is_first": "is_coordinator",
    "FixedGroup": "StaticGroup",
    "FederationGroup": "LeaderGroup",
    "join_federation": "join_leaders",
    r"world\.federation": "world.leaders",
    "Answerer|answerer|build_answerer": "Predictor",
    "load_personality": "load_client_model",
    "plan_pieces|answer_piece": "plan_work_items, answer_work_item",
    "takes_prefix": "supports_prefix",
    "share_prefix": "prefix_sharing",
    "attend_to_pieces": "packed_attention",
    "PIECE_OVERHEAD_TOKENS": "SEGMENT_OVERHEAD_TOKENS",
    "open_rows": "unfinished sequences",
    "spread_over_beams": "expand_for_beams",
    "encode_references": "embed_references",
    "states_weight": "reference_weight",
    "counts_states|counts_references": "references_counted",
    r"(?<=\.)trains|trains(?==)": "trainable",
    "before_aggregation": "local_update",
    "tokens_taken_up": "restored_tokens",
    "took_part": "participated",
    r"(?<!benchmarks/)hosting\.py": "clients.py",
    r"records\.py": "metrics.py",
    r"(?<!_)packing\.py": "packed_attention.py",
    r"ask\.py": "generate.py",
    "run_arguments": "args",
}
"""Classes, functions and modules, also with an underscore before them -> what is written instead."""

OLD_TYPES = {
    "Agreement": "SyncState",
    "Batching": "BatchingConfig",
    "Job": "JobStore",
    "Order": "Action",
    "Packing": "PackedAttention",
    "Piece": "WorkItem",
    "Questions": "EvaluationSet",
    "Shared": "ServerState",
    "Watch": "Watchdog",
}
"""Classes whose names are English words as well: found only where code, or prose in backticks, means the class."""

OLD_PROSE = {
    "told": "reported",
    "anew": "from scratch, again",
    r"(?:set|sets|setting)[\s_-]+aside": "quarantined",
    r"(?:go|goes|going|gone|went)[\s_]+on": "resumes, continues",
    "laid|laying": "packed, placed, stacked",
    r"(?:lie|lies|lay|row|rows|examples)[\s_]+end[\s_]+to[\s_]+end": "are packed",
    r"(?:take|takes|taking|taken|took)[\s_]+up": "restores",
    r"main[\s_]+leader": "coordinator",
    "personality|personalities": "client model",
    "piece|pieces": "segment, work item",
    r"mean[\s_]+states?": "reference mean",
}
"""English words in any case, also in names in snake case."""

RENAMED_KEYS = {
    "silence_seconds": "heartbeat_timeout_seconds",
    "local_partner": "global_source",
    r"federation(?:\.|__)upload|upload: ?(?:int16|fp32)": "federation.compression",
    r"federation(?:\.|__)weighting": "federation.aggregation_weights",
}
"""Keys of recipes. The table that refuses them with their new name has to spell them, and so has its test."""
RENAMED_KEYS_FILES = ("dpa_ds/config/fields.py", "tests/unit/test_config.py")


def any_of(table: dict[str, str]) -> str:
    """One group for each pattern, named after its position in the table."""
    return "|".join(f"(?P<at{position}>{pattern})" for position, pattern in enumerate(table))


# One expression a table, its boundaries first: they fail at once at most characters of a file.
NAME = re.compile(rf"(?<![A-Za-z0-9])(?:{any_of(OLD_NAMES)})(?![A-Za-z0-9_])")
PROSE = re.compile(rf"(?<![A-Za-z])(?:{any_of(OLD_PROSE)})(?![A-Za-z])", re.IGNORECASE)
KEY = re.compile(rf"(?<![A-Za-z0-9])(?:{any_of(RENAMED_KEYS)})(?![A-Za-z0-9_])")
# After what stands before a type (group `code`), punctuation that may also end a word of prose is enough.
TYPE = re.compile(
    rf"(?:(?P<code>\bclass |\bimport |, |-> |: |\[)|(?<![A-Za-z]))(?:{any_of(OLD_TYPES)})"
    r"(?(code)(?=[\[\](),:\"]| =| \||$)|(?=[\[\](\"`]|\.[a-z]| =| \|))",
    re.MULTILINE,
)


def old_words(text: str, file: str) -> list[str]:
    """`file:line: 'old word', write new word` of every old word in the text of `file`, a path below the repository."""
    tables = [(NAME, OLD_NAMES), (TYPE, OLD_TYPES), (PROSE, OLD_PROSE)]
    if file not in RENAMED_KEYS_FILES:
        tables.append((KEY, RENAMED_KEYS))
    found = []
    for expression, table in tables:
        replacements = list(table.values())
        for match in expression.finditer(text):
            assert match.lastgroup is not None
            replacement = replacements[int(match.lastgroup.removeprefix("at"))]
            line = text.count("\n", 0, match.start()) + 1
            found.append((line, f"{file}:{line}: {match[match.lastgroup]!r}, write {replacement}"))
    return [message for _, message in sorted(found)]


def texts() -> dict[str, str]:
    """Every text of the project but this one, by its path below the repository."""
    repository = PACKAGE.parent
    files = [repository / "README.md"]
    for folder in WORDS_FOLDERS:
        files += sorted((repository / folder).rglob("*"))
    found = {}
    for file in files:
        if file.suffix in WORDS_SUFFIXES and file != Path(__file__):
            found[file.relative_to(repository).as_posix()] = file.read_text()
    return found


def test_old_words_are_gone() -> None:
    files = texts()
    assert len(files) > 200
    offenders = []
    for file, text in files.items():
        offenders += old_words(text, file)
    assert not offenders, "\n".join(["old words:", *sorted(offenders)])


@pytest.mark.parametrize(
    "line",
    [
        "from dpa_ds.distributed.preemption import Helm",
        "action = helm.at_boundary(step)",
        "def watch(self) -> Watch:",
        "def join(watch: Watch, seconds: float) -> None:",
        "the `Watch` of a rank",
        "if self._is_main:",
        "class Personality:",
        "state = Shared(adapter)",
        'def unflatten(self) -> "Shared":',
        "from dpa_ds.federation.aggregation.mean import ClientUpdate, Shared",
        "if phase.trains == GLOBAL:",
        "upload: int16",
        "--federation.weighting num_examples",
        "silence_seconds: 60",
        "# Told once.",
        "def test_the_user_is_told_once() -> None:",
        "The round begins anew.",
        "the same command goes\n    on",
        "A damaged round is set aside.",
        "the same command goes on from there",
        "examples are laid in one row",
        "rows lie end to end",
        "The main leader writes it.",
        "pieces of nearly equal length",
    ],
)
def test_an_old_word_is_found(line: str) -> None:
    assert old_words(f"\n{line}\n", "docs/x.md")[0].startswith("docs/x.md:2: ")


@pytest.mark.parametrize(
    "line",
    [
        "is_main_thread = threading.current_thread() is threading.main_thread()",
        "Watch the log. Shared files are read once. Packing saves padding.",
        "class Watchdog:",
        "federation.aggregation_weights, weighting.kind and self.weighting",
        "the uploads of a round, and the upload to the registry",
        "an end-to-end test",
        "the model has to go once the trainer says so",
        "delayed, overlaid and toldering are other words",
        "taking part; he took apart what a user may set",
        "trains the global adapter",
        "a bookmark, 12 records, a state",
    ],
)
def test_other_words_may_stay(line: str) -> None:
    assert old_words(line, "docs/x.md") == []


def test_renamed_keys_may_stand_in_their_table_only() -> None:
    line = '"federation.upload": "federation.compression",  # told'
    assert len(old_words(line, "dpa_ds/config/schema.py")) == 2
    assert len(old_words(line, "dpa_ds/config/fields.py")) == 1


# ---- the layout, and how it reads ------------------------------------------------------------------------------


def test_the_top_of_the_package_holds_packages_only() -> None:
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__.py", "errors.py"}
    loose = [path.name for path in PACKAGE.iterdir() if path.is_dir() and not (path / "__init__.py").exists()]
    assert set(loose) <= {"__pycache__"}


def test_programs_are_shims() -> None:
    """launch/ holds no logic: a package that is installed has the same programs."""
    programs = sorted((PACKAGE.parent / "launch").glob("*.py"))
    assert len(programs) >= 9
    for program in programs:
        statements = ast.parse(program.read_text()).body
        assert len(statements) <= 4, program.name
        assert "dpa_ds.cli" in program.read_text(), program.name


AGGREGATION = PACKAGE / "federation" / "aggregation"
CHOICES = {
    "reductions": "compression",
    "rules": "aggregation",
    "server_optimizers": "server_optimizer",
}
"""Folder of the parts of aggregation -> field of the recipe's section `federation` whose Literal names its files."""


@pytest.mark.parametrize("kind", CHOICES)
def test_a_part_of_aggregation_is_one_file_and_one_literal(kind: str) -> None:
    """The next one is added in two places of the package: nothing else mentions one by its name."""
    names = set(typing.get_args(typing.get_type_hints(FederationConfig)[CHOICES[kind]]))
    assert {path.stem for path in (AGGREGATION / kind).glob("*.py")} - {"__init__"} == names
    for name in names:
        module = f"aggregation.{kind}.{name}"
        mentions = []
        for path in PACKAGE.rglob("*.py"):
            source = path.read_text()
            imports_it = any(module in used for _, used in used_names(ast.parse(source)))
            if imports_it or re.search(rf"federation.*[\"']{name}[\"']", source):
                mentions.append(path.relative_to(PACKAGE).as_posix())
        assert set(mentions) <= {"config/schema.py"}, f"{name} is known to {mentions}"


def function_lines(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def takes_whole_recipe(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.args, *node.args.kwonlyargs]
    return any(a.annotation is not None and ast.unparse(a.annotation) == "RunConfig" for a in arguments)


def num_loops(node: ast.expr) -> int:
    """Loops of a comprehension, those nested in it included."""
    return sum(len(inner.generators) for inner in ast.walk(node) if isinstance(inner, COMPREHENSIONS))


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
EXPRESSIONS = (*COMPREHENSIONS, ast.Lambda, ast.IfExp)
MAX_FUNCTION_LINES = 60
MAX_WHOLE_RECIPES = 15
MAX_EXPRESSIONS_PER_100_LINES = 4.0


def test_the_code_reads_aloud() -> None:
    """Long functions, nested comprehensions and builders that take the whole recipe are found before a reader is."""
    long_functions, nested, whole_recipes = [], [], []
    num_lines = num_expressions = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        place = path.relative_to(PACKAGE).as_posix()
        num_lines += sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))
        for node in ast.walk(ast.parse(source)):
            num_expressions += isinstance(node, EXPRESSIONS)
            if isinstance(node, COMPREHENSIONS) and num_loops(node) > 2:
                nested.append(f"{place}:{node.lineno}")
            if isinstance(node, ast.FunctionDef):
                if function_lines(node) > MAX_FUNCTION_LINES:
                    long_functions.append(f"{place}:{node.name}")
                if takes_whole_recipe(node):
                    whole_recipes.append(f"{place}:{node.name}")
    assert not long_functions
    assert not nested
    assert len(whole_recipes) <= MAX_WHOLE_RECIPES, whole_recipes
    assert 100 * num_expressions / num_lines <= MAX_EXPRESSIONS_PER_100_LINES
