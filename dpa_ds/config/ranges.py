"""What a value of a recipe must satisfy: metadata of the dataclass fields in schema.py.

A demand has one text, for messages and documentation, and one test. The metadata holds all of them under "checks", as
`Requirement`s, and their texts in one line under "requirement".
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpa_ds.config.paths import is_expandable

YEAR_SECONDS = 365 * 24 * 3600
MILLION = 1_000_000
BILLION = 1_000_000_000
MAX_NAME_BYTES = 200  # a file system allows 255

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Requirement:
    """A demand on a value; null is not tested, because the type says whether it is allowed."""

    text: str
    """Goes between key and value in a message: `must be >= 1` in `lora.rank must be >= 1, got 0`."""
    holds: Callable[[Any], bool]


def must(text: str, holds: Callable[[Any], bool]) -> Metadata:
    """`holds(value)`, in words `text`, which starts with "must"."""
    return {"requirement": text, "checks": (Requirement(text, holds),)}


def all_of(*demands: Metadata) -> Metadata:
    """Several demands; the first that a value does not satisfy is the message."""
    texts = []
    checks: tuple[Requirement, ...] = ()
    for demand in demands:
        texts.append(demand["requirement"])
        checks += demand["checks"]
    return {"requirement": " and ".join(texts), "checks": checks}


def at_least(bound: float, *, up_to: float, note: str = "", or_null: str = "") -> Metadata:
    """Numbers of [bound, up_to]; `or_null` continues "or null ..."."""
    low = must(_with_remarks(f"must be >= {bound}", note, or_null), lambda value: value >= bound)
    return all_of(low, at_most(up_to))


def above(bound: float, *, up_to: float, or_null: str = "") -> Metadata:
    """Numbers of (bound, up_to]; `or_null` continues "or null ..."."""
    low = must(_with_remarks(f"must be > {bound}", "", or_null), lambda value: value > bound)
    return all_of(low, at_most(up_to))


def at_most(bound: float) -> Metadata:
    """Numbers up to `bound`, which is beyond all that makes sense: a mistyped one must not fill memory or hours."""
    return must(f"must be at most {bound}", lambda value: value <= bound)


def within(interval: str) -> Metadata:
    """Numbers of an interval such as `[0, 1)`: the text is parsed, so that message and test cannot differ."""
    return must(f"must be in {interval}", _test_of(interval))


def each_within(interval: str) -> Metadata:
    """Two numbers of an interval such as `[0, 1)`."""
    holds = _test_of(interval)
    return must(f"must both be in {interval}", lambda values: all(map(holds, values)))


def not_empty(note: str = "") -> Metadata:
    """Any text but the empty one."""
    return must(_with_remarks("must not be empty", note, ""), bool)


def required_path(note: str = "") -> Metadata:
    """Text that can be a path, and is given."""
    return all_of(PATH, not_empty(note))


def _with_remarks(text: str, note: str, or_null: str) -> str:
    if note:
        text += f" ({note})"
    if or_null:
        text += f", or null {or_null}"
    return text


def _test_of(interval: str) -> Callable[[float], bool]:
    low, high = map(float, interval[1:-1].split(","))
    includes_low = interval.startswith("[")
    includes_high = interval.endswith("]")

    def holds(value: float) -> bool:
        if value == low:
            return includes_low
        if value == high:
            return includes_high
        return low < value < high

    return holds


def _is_path(text: str) -> bool:
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return False
    # NAME_MAX and PATH_MAX of Linux: beyond them, and at a NUL, the file system's own error is a traceback.
    return "\0" not in text and len(text) < 4000 and max(map(len, names)) <= 255


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()


def _is_short_name(name: str) -> bool:
    return len(name.encode()) <= MAX_NAME_BYTES


def _are_clients(values: Sequence[int | str]) -> bool:
    return len(values) > 0 and all(value != "" if isinstance(value, str) else value >= 0 for value in values)


def _are_client_files(names: Sequence[str]) -> bool:
    are_plain = all(_is_plain_name(name) and _is_short_name(name) for name in names)
    return len(names) > 0 and are_plain and len(set(names)) == len(names)


def _are_names(names: Sequence[str]) -> bool:
    return len(names) > 0 and all(names)


def _are_layers(targets: Sequence[str]) -> bool:
    return isinstance(targets, str) or _are_names(targets)


def _has_known_braces(path: str) -> bool:
    without_variables = re.sub(r"\$\{\w*\}", "", path)
    return path.count("{group}") <= 1 and not re.search("[{}]", without_variables.replace("{group}", ""))


def _is_template(template: str) -> bool:
    return template in ("auto", "chat") or template.count("{instruction}") == 1


def _is_temperature(value: float) -> bool:
    return value == 0 or 0.001 <= value <= 1000  # divided by less, logits may overflow


def _are_group_sizes(ranks_per_group: int | list[int] | str) -> bool:
    if isinstance(ranks_per_group, list):
        return ranks_per_group != [] and min(ranks_per_group) >= 1
    return ranks_per_group == "auto" or (isinstance(ranks_per_group, int) and ranks_per_group >= 1)


# Libraries count these seconds in integers, which overflow.
SECONDS = above(0, up_to=YEAR_SECONDS)
ANY_PATH = must("must be a path (no NUL character, names of up to 255 bytes)", _is_path)
PATH = all_of(
    ANY_PATH,
    must("must name a home directory that exists (~) and variables that are set ($NAME)", is_expandable),
)
PRIVATE_DIR = all_of(
    ANY_PATH,
    not_empty(),
    must("must have no braces but those of {group}, at most once, and of ${VARIABLES}", _has_known_braces),
)
PLAIN_NAME = must("must be a plain folder name, not empty and without / or \\", _is_plain_name)
SHORT_NAME = must(f"must be a folder name of at most {MAX_NAME_BYTES} bytes", _is_short_name)
LINEAR_LAYERS = must("must name at least one linear layer, such as [q_proj]", _are_layers)
CLIENTS = must("must be ids or names of clients such as [0, 3]", _are_clients)
CLIENT_FILES = must("must be different names of files or folders such as [north, south]", _are_client_files)
TASK_NAMES = must("must be names of tasks such as [paraphrase]", _are_names)
TEMPLATE = must("must be auto, chat, or a text with {instruction} exactly once", _is_template)
TEMPERATURE = must("must be 0 (nothing is sampled) or in [0.001, 1000]", _is_temperature)
GROUP_SIZES = must("must be auto, a number >= 1 or a list of them such as [2, 2, 1]", _are_group_sizes)
