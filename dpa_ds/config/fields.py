"""The fields of a recipe by their dotted keys: types in words, requirements, nearest names."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union

from dpa_ds.config.ranges import Requirement
from dpa_ds.config.schema import RunConfig
from dpa_ds.errors import ConfigError

RENAMED = {
    "cluster.silence_seconds": "cluster.heartbeat_timeout_seconds",
    "federation.upload": "federation.compression",
    "federation.weighting": "federation.aggregation_weights",
    "method.local_partner": "method.global_source",
}
"""Keys of earlier versions, refused with their new name."""

_ALL_RANKS_ARE_ALIKE = "an adapter has one rank and one scale in all layers: set lora.rank, lora.alpha and lora.scaling"
_NO_DORA = (
    "clients' adapters are averaged, and mixed for each instance, so they must add up; DoRA divides by the norm of "
    "weight and adapter together: set lora.scaling rslora, a higher lora.rank, or lora.target_modules all-linear"
)
_ONE_BASE = "only the adapters' A and B are trained, averaged and mixed, over one base that all clients share"
ABSENT = {
    "generation.do_sample": "a generation.temperature above 0 samples, and 0 does not: set that",
    "lora.alpha_pattern": _ALL_RANKS_ARE_ALIKE,
    "lora.bias": f"{_ONE_BASE}: leave it out",
    "lora.dora": _NO_DORA,
    "lora.init_lora_weights": (
        "A is drawn as by PEFT's default and B is 0, so that the first round starts from the base itself; PiSSA, OLoRA "
        "and the like change the base, which is frozen and shared: leave it out"
    ),
    "lora.lora_bias": f"{_ONE_BASE}: leave it out",
    "lora.modules_to_save": f"{_ONE_BASE}: leave it out, or name those linear layers in lora.target_modules",
    "lora.rank_pattern": _ALL_RANKS_ARE_ALIKE,
    "lora.use_dora": _NO_DORA,
    "lora.use_rslora": "write lora.scaling: rslora",
    "train.warmup_steps": "clients have different numbers of steps: write train.warmup_ratio, a share of them",
}
"""Keys that users of transformers and PEFT may expect -> why there is none, and what to do instead."""

_IN_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
}


@dataclass(frozen=True)
class _Key:
    """A field or a section, as schema.py declares it."""

    name: str
    """Dotted, such as `data.partition.kind`."""
    annotation: Any
    requirements: tuple[Requirement, ...]

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.annotation)


def _keys(kind: type[Any], prefix: str = "") -> Iterator[_Key]:
    """Every field and section, each section before its fields."""
    annotations = typing.get_type_hints(kind)
    for item in fields(kind):
        key = _Key(prefix + item.name, annotations[item.name], item.metadata.get("checks", ()))
        yield key
        if key.is_section:
            yield from _keys(key.annotation, f"{key.name}.")


SECTIONS = {key.name: key.annotation for key in _keys(RunConfig) if key.is_section}
FIELDS = {key.name: key.annotation for key in _keys(RunConfig) if not key.is_section}
REQUIREMENTS = {key.name: key.requirements for key in _keys(RunConfig) if key.requirements}


def check_key(key: str, given: str) -> None:
    """ConfigError that starts with `given` unless `key` is a field."""
    if key in FIELDS:
        return
    if key in SECTIONS:
        raise ConfigError(f"{given} is a section: give its fields, such as --{_fields_of(key)[0]} (see --help)")
    if key in RENAMED:
        raise ConfigError(f"{given} was renamed: write {RENAMED[key]} instead")
    if key in ABSENT:
        raise ConfigError(f"{given} is not a field of the recipe: {ABSENT[key]}")
    raise ConfigError(f"{given} is not a field of the recipe{_remedy_for(key)}")


def describe(annotation: Any) -> str:
    """What a field takes, in words."""
    if annotation in _IN_WORDS:
        return _IN_WORDS[annotation]
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        choices = ", ".join(arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin is list and arguments == (str,):
        return "a list of names such as [q_proj]"
    if origin is list and str in alternatives(arguments[0]):
        return "a list of whole numbers and names"
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    return " or ".join(map(describe, arguments))


def _plural(annotation: Any) -> str:
    return describe(annotation).removeprefix("a ") + "s"


def takes_scalar(annotation: Any, value: Any) -> bool:
    """False for what jsonargparse lets pass: null anywhere in a file, and text such as `1:30` as the number 90."""
    kinds = alternatives(annotation)
    if value is None:
        return NoneType in kinds
    if not isinstance(value, str):
        return True
    return str in kinds or any(value in typing.get_args(kind) for kind in kinds)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type there is."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def construct(kind: type[Any], tree: Mapping[str, Any]) -> Any:
    """Nested dataclasses of a nested dict whose values jsonargparse has checked."""
    annotations = typing.get_type_hints(kind)
    values = {}
    for name, annotation in annotations.items():
        value = tree[name]
        if is_dataclass(annotation):
            assert isinstance(annotation, type)
            value = construct(annotation, value)
        values[name] = value
    return kind(**values)


def nearest(key: str, candidates: Sequence[str]) -> str | None:
    """The candidate that a mistyped dotted key is most like, as a whole and in its last part; None if none is."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(key, candidate)
        last = _ratio(key.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(whole, last), whole + last

    # Both numbers choose: of fields with the same last part, the one in the section that was given wins.
    best = max(candidates, key=lambda candidate: sum(likeness(candidate)))
    return best if likeness(best)[0] >= 0.7 else None


def _remedy_for(key: str) -> str:
    """`: did you mean x?`, or what there is instead."""
    section = key.rpartition(".")[0]
    candidates = list(FIELDS)
    if not section:
        candidates += SECTIONS
    similar = nearest(key, candidates)
    if similar is not None:
        return f": did you mean {similar}?"
    if section in SECTIONS:
        names = [field.rpartition(".")[2] for field in _fields_of(section)]
        return f": {section} has {', '.join(names)}"
    return ": see --help for all fields"


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _fields_of(section: str) -> list[str]:
    """Dotted keys of its own fields, without those of sections inside."""
    return [key for key in FIELDS if key.rpartition(".")[0] == section]
