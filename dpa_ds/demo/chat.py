"""The demo's federation once more, as chat data: a file of conversations for each client, and test questions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpa_ds.demo.archives import MANIFEST_NAME, verified_manifest, write_manifest, write_text

RECIPE_VERSION = 1
"""Version of the rendering. Raise it when the same rows are to become other conversations."""


def render_chat(federation: Path, out_dir: Path) -> Path:
    """Write <out_dir>/train/<task>.jsonl and <out_dir>/test.jsonl from what `build_federation` wrote, and a manifest.

    Returns at once where the manifest of a former call fits the federation and every file.
    """
    recipe = {"version": RECIPE_VERSION, "federation": json.loads((federation / MANIFEST_NAME).read_text())}
    facts = verified_manifest(out_dir)
    if facts is not None and facts.get("recipe") == recipe:
        return out_dir
    (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
    (out_dir / "train").mkdir(parents=True, exist_ok=True)
    for path in sorted(federation.glob("*/local_training_*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        _write_rows(out_dir / "train" / f"{rows[0]['task']}.jsonl", conversations(rows))
    tests = []
    for line in (federation / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tests.append({"messages": _turns(row["instruction"], row["output"]), "category": row["category"]})
    _write_rows(out_dir / "test.jsonl", tests)
    write_manifest(out_dir, {"recipe": recipe})
    return out_dir


def conversations(rows: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Two rows of one task as a conversation: the second question needs no instruction any more."""
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        _, _, text = second["instruction"].partition("\n")
        turns = _turns(first["instruction"], first["output"]) + _turns(text, second["output"])
        yield {"messages": turns, "category": first["category"]}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _write_rows(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
