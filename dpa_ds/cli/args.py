"""The one parser of all programs: each declares its options once, as a dataclass; usage, help and checks follow.

    @dataclass(frozen=True, kw_only=True)
    class SearchOptions:
        '''What the program does. An indented list after a line `examples` ends the help.'''

        text: str = option("TEXT", missing="nothing to look for: give it with --text TEXT")
        '''The docstring of a field is its help.'''
        limit: int = option("N", 10, must_be="a whole number >= 1", test=at_least_one)

Words that are not options of the program are handed back: overrides of the recipe, `--section.field VALUE`, have a
loader of their own (config/load.py), which knows all fields.
"""

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar

import docstring_parser

from dpa_ds.config.fields import alternatives, describe
from dpa_ds.config.shipped import as_started_here
from dpa_ds.config.validate import check_utf8
from dpa_ds.errors import ConfigError

Options = TypeVar("Options")
_EXAMPLES = "\n\nexamples\n"


def option(
    metavar: str,
    default: Any = MISSING,
    *,
    missing: str = "",
    must_be: str = "",
    test: Callable[[Any], bool] | None = None,
    sets: str = "",
) -> Any:
    """A field of a program's options. A trailing `_` of its name is not part of the option: `lambda_` is --lambda.

    Args:
        metavar: what usage and help show as its value.
        missing: the message where a field without a default is not given.
        must_be: what a value must be, in words, where the type alone does not say it.
        test: whether a value of the right type is allowed.
        sets: the field of the recipe that the option stands for.
    """
    metadata = {"metavar": metavar, "missing": missing, "must_be": must_be, "test": test, "sets": sets}
    return dataclasses.field(default=default, metadata=metadata)


def at_least_zero(value: float) -> bool:
    """A test for `option`."""
    return value >= 0


def at_least_one(value: float) -> bool:
    """A test for `option`."""
    return value >= 1


def positive_and_finite(value: float) -> bool:
    """A test for `option`; False for NaN."""
    return 0 < value < float("inf")


def parse(argv: Sequence[str] | None, options: type[Options], start: str) -> tuple[Options, list[str]]:
    """The options of `argv`, `--name VALUE` or `--name=VALUE`, and all other words in order.

    Args:
        argv: None: the words after the program's name.
        options: a frozen dataclass, every field of which is an `option`.
        start: how the program is started, such as `deepspeed launch/evaluate.py`.

    Raises:
        ConfigError: an option without a value, with a wrong one, given twice, or one that is missing; a word that is
            not UTF-8.
        SystemExit: status 0 after --help, which prints to stdout.
    """
    words = command_line(argv)
    for word in words:
        check_utf8(word)
    try:
        namespace, others = _build_parser(options, start).parse_known_args(words)
    except argparse.ArgumentError as error:
        name = error.argument_name
        raise ConfigError(f"{name} needs a value: {name} VALUE (see --help)") from error
    kinds = typing.get_type_hints(options)
    values = {}
    for field in fields_of(options):
        text = getattr(namespace, field.name)
        if text is not None:
            values[field.name] = _read(field, kinds[field.name], text)
        elif field.default is MISSING:
            raise ConfigError(field.metadata["missing"])
    return options(**values), others


def command_line(argv: Sequence[str] | None) -> list[str]:
    """`argv`, or where a console command was called, the words after its name."""
    return list(sys.argv[1:] if argv is None else argv)


def refuse_unknown(words: Sequence[str], options: type[Any], also: Sequence[str] = ()) -> None:
    """Refuse every word that `parse` handed back, for a program that has no use for others.

    Args:
        also: further names that the message offers.

    Raises:
        ConfigError: a word that is no option, or an option that the program lacks.
    """
    known = [name_of(field) for field in fields_of(options)]
    offered = ", ".join(f"--{name}" for name in [*known, *also])
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: options look like --name VALUE (see --help)")
        name = word.removeprefix("--").partition("=")[0]
        if name not in ("local_rank", "local-rank"):  # launchers add it; the environment says the same
            raise ConfigError(f"--{name} is not an option; options are {offered}")


def fields_of(options: type[Any]) -> Sequence[dataclasses.Field[Any]]:
    """The declared options, those of base classes first."""
    return dataclasses.fields(options)


def name_of(field: dataclasses.Field[Any]) -> str:
    """The option's name, without dashes."""
    return field.name.rstrip("_")


class _Once(argparse.Action):
    """Stores the value, and refuses a second one: argparse would drop the first without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Raise ConfigError where the option was given before."""
        before = getattr(namespace, self.dest)
        if before is not None:
            raise ConfigError(f"{option_string} is given twice ({before!r} and {values!r}): keep one")
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit with a status of its own."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _build_parser(options: type[Any], start: str) -> _Parser:
    description, _, examples = inspect.cleandoc(options.__doc__ or "").partition(_EXAMPLES)
    usage = [as_started_here(start)]
    for field in fields_of(options):
        if field.default is MISSING:
            usage.append(f"--{name_of(field)} {field.metadata['metavar']}")
    parser = _Parser(
        usage=" ".join([*usage, "[--option VALUE ...]"]),
        description=as_started_here(description),
        # Under the options: the last thing on the screen is what can be copied.
        epilog=as_started_here(f"examples\n{examples}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the recipe's --seed is no short form of --seeds
        exit_on_error=False,
    )
    helps = _field_docstrings(options)
    for field in fields_of(options):
        text = as_started_here(helps[field.name]).replace("%", "%%")  # argparse fills in %(default)s and the like
        flag: dict[str, Any] = {}
        if field.default is False:
            flag = {"nargs": "?", "const": "true"}
        elif field.default not in (MISSING, None):
            text = f"{text.removesuffix('.')} (default: {field.default})."
        parser.add_argument(
            f"--{name_of(field)}", action=_Once, dest=field.name, metavar=field.metadata["metavar"], help=text, **flag
        )
    return parser


def _field_docstrings(options: type[Any]) -> dict[str, str]:
    """Field -> the docstring below it, of the class and of its bases."""
    found = {}
    for kind in reversed(options.__mro__[:-1]):
        for documented in docstring_parser.parse_from_object(kind).params:
            found[documented.arg_name] = documented.description or ""
    return found


def _read(field: dataclasses.Field[Any], annotation: Any, text: str) -> Any:
    """`text` as the declared type, and tested.

    Raises:
        ConfigError: it is of another type, or not allowed.
    """
    kind = next(one for one in alternatives(annotation) if one is not NoneType)
    name, test = name_of(field), field.metadata["test"]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise ConfigError(f"--{name} is {' or '.join(choices)}, got {text!r}")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"--{name} is a flag: --{name}, or --{name}=false, got {text!r}")
        return text == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(text.removeprefix("[").removesuffix("]").split(","))
    try:
        value = kind(text)
        allowed = test is None or test(value)
    except ValueError:
        allowed = False
    if not allowed:
        raise ConfigError(f"--{name} must be {field.metadata['must_be'] or describe(kind)}, got {text!r}")
    return value
