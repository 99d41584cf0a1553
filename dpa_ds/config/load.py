"""From the command line to a RunConfig: YAML recipe, dotted overrides, --help and --print_config."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonargparse
import yaml

from dpa_ds.config.fields import FIELDS, SECTIONS, alternatives, check_key, construct, describe, takes_scalar
from dpa_ds.config.paths import PATH_FIELDS, expand
from dpa_ds.config.recipe_yaml import RecipeLoader, dump_yaml, load_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.shipped import as_started_here, find_file, find_recipe
from dpa_ds.config.validate import check_utf8, flatten, read_text, show, validate
from dpa_ds.errors import ConfigError

_USAGE = "deepspeed launch/run.py --config RECIPE [--section.field VALUE ...]"
_INTRODUCTION = """\
Federated fine-tuning of two LoRA adapters per client (one shared, one private) over one frozen LLM.

A recipe is a YAML file with the sections and fields below; launch/recipes/ holds several to start from. Any field can
be overridden on the command line. Each line is one way to start:

  deepspeed launch/run.py --config RECIPE                              all accelerators of this host (on CPU: a rank
                                                                       per NUMA node)
  deepspeed --hostfile hostfile launch/run.py --config RECIPE          several hosts
  torchrun --nproc-per-node 4 launch/run.py --config RECIPE            without the DeepSpeed launcher
  srun --ntasks-per-node 4 python launch/run.py --config RECIPE        under Slurm, one task per rank
  deepspeed launch/run.py --config RECIPE --train.learning_rate 1e-3 --lora.target_modules="[q_proj, k_proj]"
  deepspeed launch/run.py --config RECIPE --profile                    also a trace, and where a round's time went
  deepspeed --quiet launch/run.py --config RECIPE --quiet              warnings, errors and the result only
  python launch/run.py --config RECIPE --print_config > complete.yaml  every field as it would run; starts nothing
"""
_COMMAND_LINE = "command line"
_CONFIG_HELP = "YAML recipe; --recipe NAME: one of launch/recipes/, such as demo. Of several the later wins."
_RECIPES = "give a recipe such as those in launch/recipes/"


@dataclass(frozen=True)
class _Source:
    """A recipe file or the command line: the values that it gives, by dotted key."""

    origin: str
    """Path of the file, or `command line`."""
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Line of every field and section in a file, from 1; empty for the command line."""

    def place(self, key: str) -> str:
        """Where a message says that `key` is wrong."""
        if key in self.lines:
            return f"{self.origin}, line {self.lines[key]}"
        return self.origin


@dataclass(frozen=True)
class _CommandLine:
    recipes: list[str]
    overrides: list[tuple[str, str]]
    """Dotted keys, all known, and what was given for them."""
    flags: list[str]
    """-h, --help and --print_config."""


def load_config(argv: Sequence[str]) -> RunConfig:
    """Read `--config RECIPE` (several: the later wins) and `--section.field VALUE` overrides, which win over recipes.

    ConfigError: any mistake of the user. SystemExit(0): --help and --print_config, printed on stdout.
    """
    given = _split(argv)
    parser = _build_parser()
    if "-h" in given.flags or "--help" in given.flags:
        parser.parse_args(["--help"])
    if not given.recipes and not given.flags:
        raise ConfigError(
            "no recipe: give one with --config RECIPE.yaml, or --recipe NAME for one of launch/recipes/ (see --help)"
        )

    # Defaults, recipes, overrides, in this order: each step overwrites what the ones before it gave.
    namespace = parser.get_defaults()
    for path in given.recipes:
        namespace = _parse_recipe(parser, _read_recipe(path), namespace)
    namespace = _parse_command_line(parser, given, namespace)
    tree = namespace.as_dict()
    validate(construct(RunConfig, tree))
    _expand_paths(tree)
    config: RunConfig = construct(RunConfig, tree)
    return config


def with_overrides(argv: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """A command line with these fields set, whatever it said of them: no field may be given twice."""
    given = _split(argv)
    words = [f"--config={path}" for path in given.recipes]
    for key, text in given.overrides:
        if key not in values:
            words.append(f"--{key}={text}")
    for key, value in values.items():
        words.append(f"--{key}={value}")
    return [*words, *given.flags]


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


def _expand_paths(tree: dict[str, Any]) -> None:
    """Replace home directories and environment variables in the paths that every host shares."""
    for key in PATH_FIELDS:
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        if node[name] is not None:
            node[name] = _expand_path(node[name], key)


def _expand_path(text: str, key: str) -> str:
    """`text` itself where there is nothing to replace: a Path would drop `./` and the end of `a/`."""
    if "~" not in text and "$" not in text:
        return text
    return str(expand(text, key))


def _split(argv: Sequence[str]) -> _CommandLine:
    """The command line by kind of argument; ConfigError for what is no option, unknown or without its value."""
    given = _CommandLine([], [], [])
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        check_utf8(argument)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help") or (argument.startswith("--") and name == "print_config"):
            given.flags.append(argument)
            continue
        if argument == "--profile":
            _add_override(given, "tracking.profile", "true")
            continue
        if argument == "--quiet":
            _add_override(given, "tracking.quiet", "true")
            continue
        if not argument.startswith("--") or not name:
            raise ConfigError(
                f"unexpected argument {show(argument)}: options look like --section.field VALUE (see --help)"
            )
        # The DeepSpeed launcher adds --local_rank; the environment says the same, so it is dropped.
        of_launcher = name in ("local_rank", "local-rank")
        if name not in ("config", "recipe") and not of_launcher:
            check_key(name, f"{_COMMAND_LINE}: --{name}")
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE or --{name}=VALUE")
            value = rest.pop(0)
        if name == "config":
            if not value.strip():
                raise ConfigError(f"--config is empty: {_RECIPES}")
            given.recipes.append(value)
        elif name == "recipe":
            given.recipes.append(str(find_recipe(value)))
        elif not of_launcher:
            _add_override(given, name, value)
    return given


def _add_override(given: _CommandLine, key: str, value: str) -> None:
    for known, before in given.overrides:
        if known == key:
            raise ConfigError(
                f"{_COMMAND_LINE}: --{key} is given twice ({show(before, 30)} and {show(value, 30)}): keep one"
            )
    given.overrides.append((key, value))


def _read_recipe(path: str) -> _Source:
    """ConfigError for what cannot be read or is no plain YAML mapping of known keys."""
    given = expand(path, "--config")
    found = find_file(given, "--config", _RECIPES)
    path = path if found == given else str(found)
    text = read_text(found, "--config", _RECIPES)
    source = _Source(path)
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{path}: a recipe is a mapping of sections such as train:, got nothing")
        if not isinstance(root, yaml.MappingNode):
            got = show(loader.construct_document(root))
            raise ConfigError(f"{path}: a recipe is a mapping of sections such as train:, got {got}")
        _collect(source, loader, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}, line {mark.line + 1}" if mark else path
        reason = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{place}: not a YAML recipe: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a YAML recipe: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not a YAML recipe: {str(error).splitlines()[0]}") from error
    return source


def _collect(source: _Source, loader: RecipeLoader, node: yaml.MappingNode, prefix: str = "") -> None:
    """Put the fields below `node` into `source`; ConfigError for a key that is unknown or given twice."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        key = f"{prefix}{name}"
        if key in source.lines:
            raise ConfigError(
                f"{source.origin}, line {line}: {key} is given twice (first in line {source.lines[key]}): keep one"
            )
        source.lines[key] = line
        if key not in SECTIONS:
            check_key(key, f"{source.place(key)}: {key}")
            source.values[key] = loader.construct_object(value_node, deep=True)
        elif isinstance(value_node, yaml.MappingNode):
            _collect(source, loader, value_node, f"{key}.")
        elif value_node.tag != "tag:yaml.org,2002:null":  # a section whose fields are all commented out is no mistake
            raise ConfigError(f"{source.place(key)}: {key} is a section: write its fields below it, indented")


def _parse_recipe(
    parser: jsonargparse.ArgumentParser, recipe: _Source, namespace: jsonargparse.Namespace
) -> jsonargparse.Namespace:
    _check_scalars(recipe)  # before jsonargparse, which would convert what should be refused
    try:
        parsed: jsonargparse.Namespace = parser.parse_object(recipe.values, namespace=namespace)
    except argparse.ArgumentError as error:
        raise _in_one_line(error, recipe) from error
    return parsed


def _parse_command_line(
    parser: jsonargparse.ArgumentParser, given: _CommandLine, namespace: jsonargparse.Namespace
) -> jsonargparse.Namespace:
    source = _Source(_COMMAND_LINE)
    arguments = []
    for key, text in given.overrides:
        source.values[key] = _read_override(key, text)
        arguments.append(f"--{key}={text}")
    _check_scalars(source)
    try:
        return parser.parse_args([*arguments, *given.flags], namespace=namespace)
    except argparse.ArgumentError as error:
        raise _in_one_line(error, source) from error


def _read_override(key: str, text: str) -> Any:
    """Value as a recipe would read it, for checks and messages; what is no YAML is text."""
    if str in alternatives(FIELDS[key]):
        return text
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _check_scalars(source: _Source) -> None:
    for key, value in source.values.items():
        if not takes_scalar(FIELDS[key], value):
            raise _type_error(source, key)


def _in_one_line(error: argparse.ArgumentError, source: _Source) -> ConfigError:
    """jsonargparse's error as one line with place, key, what is allowed and what was given."""
    named = re.search(r'key "([^"]+)"', str(error))
    if named and named.group(1) in FIELDS:
        return _type_error(source, named.group(1))
    return ConfigError(f"{source.origin}: {' '.join(str(error).split())}")


def _type_error(source: _Source, key: str) -> ConfigError:
    value = source.values.get(key)
    allowed = describe(FIELDS[key])
    message = f"{source.place(key)}: {key} must be {allowed}, got {show(value)}"
    if allowed.startswith("text") and isinstance(value, bool | int | float):
        message += " (put it in quotes)"
    return ConfigError(message)


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
        usage=as_started_here(_USAGE),
        description=as_started_here(_INTRODUCTION),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        parser_mode="recipe",
        print_config="--print_config",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", metavar="RECIPE", help=_CONFIG_HELP)
    parser.add_class_arguments(RunConfig, None)
    for section, group in (parser.groups or {}).items():
        if section in SECTIONS:
            group.title = f"{section}: {group.title}"
        else:
            group.title = "run"
    return parser
