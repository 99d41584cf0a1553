"""The YAML of recipes: no anchors, dates or YAML 1.1 traps; what is written reads back equal."""

import re
from typing import Any

import yaml

_FLOAT = r"""[-+]?(?:
    [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?  # 1. and 1.5e-3
    |[0-9][0-9_]*[eE][-+]?[0-9]+               # 3e-4: text in YAML 1.1
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?        # .5
    |\.(?:inf|Inf|INF))
    |\.(?:nan|NaN|NAN)"""
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,17})", list("-+0123456789")),  # 010 is not 8, 1:30 is not 90
    ("float", _FLOAT, list("-+.0123456789")),
)


def load_yaml(text: str) -> Any:
    """yaml.YAMLError, ValueError (a number too long) or RecursionError if it is no recipe YAML."""
    return yaml.load(text, Loader=RecipeLoader)


def dump_yaml(tree: Any) -> str:
    """One line per value, several lines of text as a block, keys in their order."""
    return yaml.dump(tree, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=float("inf"))


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that refuses anchors and reads plain scalars by `_SCALARS` only."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse anchors and aliases, which a recipe does not need and a small file can grow by."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # aliases of aliases make a few lines fill the memory
            problem = "a recipe has no anchors or aliases (&, *): write the value out, or quote it if it is text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which YAML 1.1 or a recipe would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """An equal list used twice is written twice."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A template of several lines stays readable."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


RecipeLoader.yaml_implicit_resolvers = {}  # the dumper keeps those of YAML 1.1, so that other readers agree too
_RecipeDumper.add_representer(str, _RecipeDumper.represent_text)
for _tag, _pattern, _first in _SCALARS:
    for _kind in (RecipeLoader, _RecipeDumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?x:{_pattern})$"), _first)
