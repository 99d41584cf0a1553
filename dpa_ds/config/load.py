"""From the command line to a RunConfig: YAML recipe, dotted overrides, --help and --print_config."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from dpa_ds.config.deepspeed_json import check_deepspeed_owner, load_deepspeed_json
from dpa_ds.config.fields import FIELDS, SECTIONS, alternatives, check_key, construct, describe, takes_scalar
from dpa_ds.config.recipe_yaml import RecipeLoader, dump_yaml, load_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import diff_configs, fingerprint_sections, flatten, read_text, show, validate
from dpa_ds.errors import ConfigError

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

  deepspeed launch/run.py --config RECIPE                                   all accelerators of this host (on CPU: a rank per NUMA node)
  deepspeed --hostfile hostfile launch/run.py --config RECIPE               several hosts
  torchrun --nproc-per-node 4 launch/run.py --config RECIPE                 without the DeepSpeed launcher
  srun --ntasks-per-node 4 python launch/run.py --config RECIPE             under Slurm, one task per rank
  deepspeed launch/run.py --config RECIPE --train.learning_rate 1e-3 --lora.target_modules="[q_proj, k_proj]"
  deepspeed launch/run.py --config RECIPE --profile                         also a trace, and what a round's time went into
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
    command_line = _Source(_COMMAND_LINE, {key: _override(key, value) for key, value in overrides}, {})
    arguments = [f"--{key}={value}" for key, value in overrides]
    namespace = _parse(parser, command_line, namespace, [*arguments, *flags])
    config: RunConfig = construct(RunConfig, namespace.as_dict())
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
        if argument == "--profile":
            overrides.append(("tracking.profile", "true"))
            continue
        if not argument.startswith("--") or not name:
            raise ConfigError(
                f"unexpected argument {show(argument)}: options look like --section.field VALUE (see --help)"
            )
        if name not in ("config", "local_rank", "local-rank"):
            check_key(name, f"{_COMMAND_LINE}: --{name}")
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
    text = read_text(Path(path).expanduser(), "--config", "give a recipe such as those in launch/recipes/")
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
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: not a YAML recipe: {reason}") from error
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
        if key not in SECTIONS:
            check_key(key, f"{path}, line {line}: {key}")
            yield key, line, loader.construct_object(value_node, deep=True)
            continue
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode):
            yield from _leaves(loader, value_node, seen, path, f"{key}.")
        elif value_node.tag != "tag:yaml.org,2002:null":  # a section whose fields are all commented out is no mistake
            raise ConfigError(f"{path}, line {line}: {key} is a section: write its fields below it, indented")


def _parse(
    parser: jsonargparse.ArgumentParser, source: _Source, namespace: jsonargparse.Namespace, arguments: list[str]
) -> jsonargparse.Namespace:
    """Types by jsonargparse; its error becomes one line with place, key, what is allowed and what was given."""
    for key, value in source.values.items():
        if not takes_scalar(FIELDS[key], value):
            raise _type_error(source, key)
    try:
        if source.origin == _COMMAND_LINE:
            namespace = parser.parse_args(arguments, namespace=namespace)
        else:
            namespace = parser.parse_object(source.values, namespace=namespace)
    except argparse.ArgumentError as error:
        named = re.search(r'key "([^"]+)"', str(error))
        if named and named.group(1) in FIELDS:
            raise _type_error(source, named.group(1)) from error
        raise ConfigError(f"{source.origin}: {' '.join(str(error).split())}") from error
    return namespace


def _type_error(source: _Source, key: str) -> ConfigError:
    value = source.values.get(key)
    allowed = describe(FIELDS[key])
    quote = " (put it in quotes)" if allowed.startswith("text") and isinstance(value, bool | int | float) else ""
    return ConfigError(f"{source.place(key)}: {key} must be {allowed}, got {show(value)}{quote}")


def _override(key: str, text: str) -> Any:
    """Value as a recipe would read it, for checks and messages; what is no YAML is text."""
    if str in alternatives(FIELDS[key]):
        return text
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the introduction, and leaves out what jsonargparse adds: options for sections, and --list+."""

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest not in SECTIONS:
            action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
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
    for section, group in (parser.groups or {}).items():
        group.title = f"{section}: {group.title}" if section in SECTIONS else "run"
    return parser
