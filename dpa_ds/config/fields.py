"""The fields of a recipe as the dataclasses of config.py declare them: dotted keys, types in words, nearest names."""

import difflib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from dpa_ds.config.schema import RunConfig
from dpa_ds.errors import ConfigError


def _keys(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of every field and section."""
    for name, annotation in typing.get_type_hints(kind).items():
        yield prefix + name, annotation
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            yield from _keys(annotation, f"{prefix}{name}.")


SECTIONS = {key: annotation for key, annotation in _keys(RunConfig) if is_dataclass(annotation)}
FIELDS = {key: annotation for key, annotation in _keys(RunConfig) if not is_dataclass(annotation)}


def check_key(key: str, given: str) -> None:
    """ConfigError that starts with `given` unless `key` is a field."""
    if key in SECTIONS:
        raise ConfigError(f"{given} is a section: give its fields, such as --{_fields_of(key)[0]} (see --help)")
    if key not in FIELDS:
        raise ConfigError(f"{given} is not a field of the recipe{_nearest(key)}")


def describe(annotation: Any) -> str:
    """What a field takes, in words."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(arguments)
    if origin is list:
        return f"a list of {describe(arguments[0]).removeprefix('a ')}s".replace("texts", "names such as [q_proj]")
    if origin is tuple:
        return f"a list of {len(arguments)} {describe(arguments[0]).removeprefix('a ')}s"
    return " or ".join(describe(argument) for argument in arguments)


def takes_scalar(annotation: Any, value: Any) -> bool:
    """False for what jsonargparse lets pass: null anywhere in a file, and text such as `1:30` as the number 90."""
    kinds = alternatives(annotation)
    if value is None:
        return NoneType in kinds
    return not isinstance(value, str) or any(kind is str or value in typing.get_args(kind) for kind in kinds)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type there is."""
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, UnionType) else (annotation,)


def construct(kind: type[Any], tree: Mapping[str, Any]) -> Any:
    """Nested dataclasses of a nested dict whose values jsonargparse has checked."""
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            item.name: construct(hints[item.name], tree[item.name])
            if is_dataclass(hints[item.name])
            else tree[item.name]
            for item in fields(kind)
        }
    )


def _nearest(key: str) -> str:
    """`: did you mean x?`, by likeness of the whole dotted key and of its last part."""

    def likeness(candidate: str) -> tuple[float, float]:
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        return max(last, whole), last + whole

    section = key.rpartition(".")[0]
    best = max([*FIELDS, *([] if section else SECTIONS)], key=lambda candidate: sum(likeness(candidate)))
    if likeness(best)[0] >= 0.7:
        return f": did you mean {best}?"
    names = [field.rpartition(".")[2] for field in _fields_of(section)] if section in SECTIONS else []
    return f": {section} has {', '.join(names)}" if names else ": see --help for all fields"


def _fields_of(section: str) -> list[str]:
    """Dotted keys of its own fields, without those of sections inside."""
    return [key for key in FIELDS if key.rpartition(".")[0] == section]
