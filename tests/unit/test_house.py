"""Rules of the house that a linter cannot see: who may use which library, and what nobody uses."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dpa_ds"

OWNERS = {
    "torch.distributed": ("distributed/",),
    "deepspeed": ("engine/", "model/base.py", "distributed/world.py"),
    "tensorboard": ("runs/tracking.py",),
    "torch.utils.tensorboard": ("runs/tracking.py",),
    "mpi4py": ("distributed/launchers.py",),
    # Loading runs code from the file: weights are safetensors, state is JSON.
    "pickle": (),
    "torch.load": (),
    "torch.save": (),
}
"""Dotted names, with all below them, and the only files and folders of dpa_ds that may use them."""

LAST_RESORT = ("cli/bootstrap.py", "model/directory.py")
"""Files that may catch everything: a rank that fails, whatever the reason, has to tell the others; and at a damaged file
tokenizers raises bare Exception."""


ADAPTER_NAMES = ("adapters/methods.py", "config/schema.py", "planning/plan.py")
"""The only files that spell "global" and "local"; the others use the constants of adapters/methods.py, which the planner
cannot import (it needs no torch and no adapters)."""
STILL_SPELLED = ("federation/clients.py", "federation/loop.py", "federation/trainer.py")
"""Until they take the constants."""


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


def spells_adapter_names(source: str) -> bool:
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "global" in constants or "local" in constants


def test_names_of_adapters_are_spelled_in_one_place() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {name for name, source in files.items() if spells_adapter_names(source)}
    assert found == {*ADAPTER_NAMES, *STILL_SPELLED}
    assert spells_adapter_names('state["local"]')
    assert not spells_adapter_names('"""The local adapter."""\nf"local/{client}"')


@pytest.mark.parametrize(
    ("source", "file", "fault"),
    [
        ("import torch.distributed as dist", "federation/loop.py", "torch.distributed"),
        ("from torch import distributed", "cli/train.py", "torch.distributed"),
        ("import torch; torch.distributed.barrier()", "engine/engine.py", "torch.distributed"),
        ("from deepspeed.accelerator import get_accelerator", "distributed/topology.py", "deepspeed"),
        ("def f():\n import deepspeed", "cli/train.py", "deepspeed"),
        ("from torch.utils.tensorboard import SummaryWriter", "cli/train.py", "torch.utils.tensorboard"),
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
