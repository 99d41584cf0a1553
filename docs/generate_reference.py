"""Write docs/reference.md, the reference of the recipe, from the docstrings, types and defaults of its fields.

python docs/generate_reference.py            write the page
python docs/generate_reference.py --check    write nothing; exit status 1 where the page is not current
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dpa_ds.config import schema
from dpa_ds.config.fields import FIELDS, SECTIONS, describe
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.validate import fingerprint_sections

PAGE = Path(__file__).with_name("reference.md")
RUN = "run"
"""Heading of the fields that belong to no section."""
INTRODUCTION = """\
# Reference of the recipe

<!-- Written by docs/generate_reference.py from the docstrings of the fields: change those, and run it again. -->

A recipe is a YAML file with the sections below. Only `model.path` and `data.path` have no usable default. On the command line a field is `--section.field VALUE`, which overrides the recipe: `--train.learning_rate 1e-3 --lora.target_modules="[q_proj, k_proj]"`. Of several recipes (`--config A --config B`) the later one wins.

`python launch/run.py --help` prints the same list. `python launch/run.py --config RECIPE --print_config` prints the complete recipe as it would run, and starts nothing.

*Fixed for the run* marks the fields that decide the result of training: a run resumes only where all of them agree with its `config.yaml`. All other fields may change between two starts of the same run.
"""


def attribute_docstrings(source: str) -> dict[str, dict[str, str]]:
    """Class -> attribute -> the string literal that follows its declaration, on one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for declaration, text in zip(node.body, node.body[1:], strict=False):
                if not isinstance(declaration, ast.AnnAssign) or not isinstance(declaration.target, ast.Name):
                    continue
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[node.name][declaration.target.id] = " ".join(str(text.value.value).split())
    return found


def render() -> str:
    """The whole page."""
    docstrings = attribute_docstrings(inspect.getsource(schema))
    defaults = asdict(RunConfig())
    fixed = set(fingerprint_sections(RunConfig()))
    sections: dict[str, type[Any]] = {"": RunConfig, **SECTIONS}
    parts = [INTRODUCTION, _contents(list(sections))]
    for section, kind in sections.items():
        parts.append(f"## {section or RUN}\n\n{_as_text(inspect.getdoc(kind) or '')}\n")
        for item in fields(kind):
            key = f"{section}.{item.name}" if section else item.name
            if key in FIELDS:
                facts = [describe(FIELDS[key]), f"default `{_value(defaults, key)}`"]
                if requirement := item.metadata.get("requirement"):
                    facts.append(str(requirement))
                if key in fixed:
                    facts.append("*fixed for the run*")
                text = docstrings[kind.__name__][item.name]
                parts.append(f"### {key}\n\n{_as_text(text)}\n\nTakes {_as_text('; '.join(facts))}.\n")
    return "\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 1 where `--check` finds that the page is not current."""
    text = render()
    if "--check" not in argv:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not current: run python docs/generate_reference.py", file=sys.stderr)
    return 1


def _contents(sections: list[str]) -> str:
    links = [f"[{section or RUN}](#{(section or RUN).replace('.', '')})" for section in sections]
    return f"Sections: {', '.join(links)}.\n"


def _value(tree: Any, key: str) -> str:
    """The default of a field as a recipe would write it."""
    for name in key.split("."):
        tree = tree[name]
    return json.dumps(tree, ensure_ascii=False)


def _as_text(text: str) -> str:
    """Angle brackets outside code as text: Markdown takes <path> for a tag."""
    return re.sub(r"`[^`]*`|<", lambda found: "&lt;" if found.group() == "<" else found.group(), text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
