"""From the command line to a RunConfig: YAML recipe, dotted overrides, --help and --print_config."""

import argparse
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import jsonargparse
import yaml

from dpa_ds.config import RunConfig
from dpa_ds.config_checks import (
    check_deepspeed_owner,
    diff_configs,
    fingerprint_sections,
    flatten,
    load_deepspeed_json,
    read_text,
    show,
    validate,
)
from dpa_ds.errors import ConfigError
from dpa_ds.recipe_yaml import RecipeLoader, dump_yaml, load_yaml

__all__ = [
    "check_deepspeed_owner",
    "diff_configs",
    "fingerprint_sections",
    "load_config",
    "load_deepspeed_json",
    "to_yaml",
    "validate",
]

_USAGE = "deepspeed launch/run.py --config RECIPE [--section.field VALUE ...]"
_INTRODUCTION = """\
Federated fine-tuning of two LoRA adapters per client (one shared, one private) over one frozen LLM.

A recipe is a YAML file with the sections and fields below; launch/recipes/ holds several to start from. Any field can
be overridden on the command line. Each line is one way to start:

  deepspeed launch/run.py --config RECIPE                                   all accelerators of this host
  deepspeed --hostfile hostfile launch/run.py --config RECIPE               several hosts
  torchrun --nproc-per-node 4 launch/run.py --config RECIPE                 without the DeepSpeed launcher
  srun --ntasks-per-node 4 python launch/run.py --config RECIPE             under Slurm, one task per rank
  deepspeed launch/run.py --config RECIPE --train.learning_rate 1e-3 --lora.target_modules="[q_proj, k_proj]"
  python launch/run.py --config RECIPE --print_config > complete.yaml       every field as it would run; starts nothing
"""
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Source:
    """Where values come from: flat dotted keys, and for a file the line of each."""

    origin: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        return f"{self.origin}, line {self.lines[key]}" if key in self.lines else self.origin


def load_config(argv: Sequence[str]) -> RunConfig:
    """Read `--config RECIPE` (several: the later wins) and `--section.field VALUE` overrides, which win over recipes.

    ConfigError: any mistake of the user. SystemExit(0): --help and --print_config, printed on stdout.
    """
    paths, overrides, flags = _split(argv)
    parser = _build_parser()
    if any(flag in ("-h", "--help") for flag in flags):
        parser.parse_args(["--help"])
    if not paths and not flags:
        raise ConfigError("no recipe: give one with --config RECIPE.yaml (recipes lie in launch/recipes/; see --help)")
    namespace = parser.get_defaults()
    for path in paths:
        recipe = _read_recipe(path)
        namespace = _parse(parser, recipe, namespace, [])
    command_line = _Source(_COMMAND_LINE, {key.rstrip("+"): value for key, value in overrides}, {})
    arguments = [f"--{key}={value}" for key, value in overrides]
    namespace = _parse(parser, command_line, namespace, [*arguments, *flags])
    config: RunConfig = _construct(RunConfig, namespace.as_dict())
    validate(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The complete recipe; `load_config` of it gives an equal RunConfig."""
    tree: dict[str, Any] = {}
    for key, value in flatten(config).items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return dump_yaml(tree)


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Paths of recipes, overrides with their checked keys, and the flags -h, --help, --print_config."""
    paths, overrides, flags = [], [], []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help") or (argument.startswith("--") and name == "print_config"):
            flags.append(argument)
            continue
        if not argument.startswith("--") or not name:
            raise ConfigError(
                f"unexpected argument {show(argument)}: options look like --section.field VALUE (see --help)"
            )
        if name not in ("config", "local_rank", "local-rank"):
            _check_key(name.removesuffix("+"), f"{_COMMAND_LINE}: --{name}")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE or --{name}=VALUE")
            value = rest.pop(0)
        if name == "config":
            paths.append(value)
        elif name not in ("local_rank", "local-rank"):  # the DeepSpeed launcher adds it; the environment says the same
            overrides.append((name, value))
    return paths, overrides, flags


def _read_recipe(path: str) -> _Source:
    """ConfigError for what cannot be read or is no plain YAML mapping of known keys."""
    text = read_text(Path(path).expanduser(), "--config")
    source = _Source(path, {}, {})
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            got = "nothing" if root is None else show(loader.construct_document(root))
            raise ConfigError(f"{path}: a recipe is a mapping of sections such as train:, got {got}")
        for key, line, value in _leaves(loader, root, source.lines, path):
            source.values[key] = value
            source.lines[key] = line
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}, line {mark.line + 1}" if mark else path
        raise ConfigError(f"{place}: not a YAML recipe: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(f"{path}: not a YAML recipe: {reason}") from error
    return source


def _leaves(
    loader: RecipeLoader, node: yaml.MappingNode, seen: dict[str, int], path: str, prefix: str = ""
) -> Iterator[tuple[str, int, Any]]:
    """Dotted key, line and value of every field; `seen` collects the lines of sections and refuses a key given twice."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = prefix + str(key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        if key in seen:
            raise ConfigError(f"{path}, line {line}: {key} is given twice (first in line {seen[key]}): keep one")
        if key not in _SECTIONS:
            _check_key(key, f"{path}, line {line}: {key}")
            yield key, line, loader.construct_object(value_node, deep=True)
            continue
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode):
            yield from _leaves(loader, value_node, seen, path, f"{key}.")
        elif value_node.tag != "tag:yaml.org,2002:null":  # a section whose fields are all commented out is no mistake
            raise ConfigError(f"{path}, line {line}: {key} is a section: write its fields below it, indented")


def _check_key(key: str, given: str) -> None:
    if key in _SECTIONS:
        raise ConfigError(f"{given} is a section: give its fields, such as --{_fields_of(key)[0]} (see --help)")
    if key not in _FIELDS:
        raise ConfigError(f"{given} is not a field of the recipe{_nearest(key)}")


def _nearest(key: str) -> str:
    """`: did you mean x?`, by likeness of the whole dotted key and of its last part."""

    def likeness(candidate: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return max(last, whole), last + whole

    best = max([*_FIELDS, *_SECTIONS], key=lambda candidate: sum(likeness(candidate)))
    return f": did you mean {best}?" if likeness(best)[0] >= 0.7 else ": see --help for all fields"


def _parse(
    parser: jsonargparse.ArgumentParser, source: _Source, namespace: jsonargparse.Namespace, arguments: list[str]
) -> jsonargparse.Namespace:
    """Types by jsonargparse; its error becomes one line with place, key, what is allowed and what was given."""
    try:
        if source.origin == _COMMAND_LINE:
            return parser.parse_args(arguments, namespace=namespace)
        return parser.parse_object(source.values, namespace=namespace)
    except (argparse.ArgumentError, OverflowError) as error:
        named = re.search(r'key "([^"]+)"', str(error))
        key = named.group(1) if named else ""
        if key not in _FIELDS:
            raise ConfigError(f"{source.origin}: {' '.join(str(error).split())}") from error
        value = source.values.get(key)
        quote = " (put it in quotes)" if "text" in _describe(_FIELDS[key]) and not isinstance(value, str | list) else ""
        raise ConfigError(
            f"{source.place(key)}: {key} must be {_describe(_FIELDS[key])}, got {show(value)}{quote}"
        ) from error


def _describe(annotation: Any) -> str:
    """What a field takes, in words."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(arguments)
    if origin is list:
        return f"a list of {_describe(arguments[0]).removeprefix('a ')}s".replace("texts", "names such as [q_proj]")
    if origin is tuple:
        return f"a list of {len(arguments)} {_describe(arguments[0]).removeprefix('a ')}s"
    return " or ".join(_describe(argument) for argument in arguments)


def _construct(kind: type[Any], tree: Mapping[str, Any]) -> Any:
    """Nested dataclasses of a nested dict whose values jsonargparse has checked."""
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            item.name: _construct(hints[item.name], tree[item.name])
            if is_dataclass(hints[item.name])
            else tree[item.name]
            for item in fields(kind)
        }
    )


def _keys(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of every field and section."""
    for name, annotation in typing.get_type_hints(kind).items():
        yield prefix + name, annotation
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from _keys(annotation, f"{prefix}{name}.")


_SECTIONS = {key: annotation for key, annotation in _keys(RunConfig) if is_dataclass(annotation)}
_FIELDS = {key: annotation for key, annotation in _keys(RunConfig) if not is_dataclass(annotation)}


def _fields_of(section: str) -> list[str]:
    return [key for key in _FIELDS if key.startswith(f"{section}.")]


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the introduction, and leaves out the options jsonargparse adds for whole sections."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest not in _SECTIONS:
            super().add_argument(action)


def _build_parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # A mode of our own: overrides are read by the same YAML as recipes, and --print_config writes what to_yaml writes.
    jsonargparse.set_loader("recipe", load_yaml, exceptions=(yaml.YAMLError, ValueError, RecursionError))
    jsonargparse.set_dumper("recipe", dump_yaml)
    parser = jsonargparse.ArgumentParser(
        usage=_USAGE,
        description=_INTRODUCTION,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        parser_mode="recipe",
        print_config="--print_config",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", metavar="RECIPE", help="YAML recipe; several: the later wins.")
    parser.add_class_arguments(RunConfig, None)
    return parser
