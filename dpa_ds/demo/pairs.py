"""How the demo's text becomes (input, expected output) pairs: one function per task, from bytes to pairs."""

import ast
import gettext
import html
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NO_ENTITIES = "No entities found"
Pair = tuple[str, str]
"""(input, expected output) of one example."""


def sentiment_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Film snippets with a clear mean rating: lines of id, rating in [-4, 4], text, tab-separated."""
    for line in _lines(contents):
        columns = line.split("\t")
        if len(columns) < 3 or "\ufffd" in columns[2]:
            continue
        rating, text = float(columns[1]), html.unescape(columns[2])
        if abs(rating) >= 1 and 4 <= len(text.split()) <= 60:
            yield text, "positive" if rating > 0 else "negative"


def sarcasm_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Headlines labelled 1 (sarcastic) or 0."""
    for question, answer in _eval_samples(contents):
        yield question, "yes" if answer == "1" else "no"


def social_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Situation, question and options on one line, `A: ...; B: ...; C: ....`; the answer becomes the option's text."""
    for question, answer in _eval_samples(contents):
        options = dict(re.findall(r"\b([ABC]): (.*?)(?=; [ABC]: |$)", question))
        # A few options are whole web pages, cut short with dots.
        if answer in options and len(question) < 400 and "..." not in question:
            yield question, options[answer].rstrip(".")


def science_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Question, then one option per line, `A: ...`; the answer becomes the option's text."""
    for question, answer in _eval_samples(contents):
        options = dict(re.findall(r"^\s*([AB]): (.*)$", question, flags=re.MULTILINE))
        if answer in options:
            # Some options keep the punctuation, or the "or", of the sentence that they were cut from.
            yield re.sub(r"\s*\n\s*", "\n", question), re.sub(r"(,? or|[.;,?)]+)$", "", options[answer].strip())


def entity_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Sentences of contracts with `[NAME - TYPE, ...]`; very long ones are left out."""
    num_without = 0
    for question, answer in _eval_samples(contents):
        num_without += answer == NO_ENTITIES
        # 58 % of the sentences have no entity: one in five of those, or a constant answer scores well.
        if len(question) < 400 and (answer != NO_ENTITIES or num_without % 5 == 0):
            yield question, answer.strip("[]")


def likelihood_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Steps of a procedure and an event: more, less or equally likely."""
    yield from _eval_samples(contents)


def translation_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """One-line messages of two words or more from compiled gettext catalogues; of plural forms, the singular."""
    for content in contents:
        # _catalog is private, and the only way the standard library lists a catalogue's messages.
        catalogue: Mapping[Any, str] = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
        for key, translation in catalogue.items():
            message, plural = (key, 0) if isinstance(key, str) else key
            source = message.rpartition("\x04")[2] if plural == 0 else ""
            one_line = "\n" not in source and len(source) < 250
            if translation and source != translation and len(source.split()) >= 2 and one_line:
                yield source, translation


def summary_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Docstrings of Python source: second paragraph as input, the one-sentence summary above it as output."""
    not_prose = re.compile(
        r"(Args|Arguments|Parameters|Returns|Examples?|Note|Raises|\.\.|>>>|Attributes|Yields|See)|.*(---|>>>|::)"
    )
    for content in contents:
        for docstring in _docstrings(content):
            summary, description, *_ = [*(" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)), ""]
            if not summary.endswith(".") or not 5 <= len(summary.split()) <= 25 or not_prose.match(description):
                continue
            if 20 <= len(description.split()) <= 120:
                yield description, summary


def _lines(contents: Iterable[bytes]) -> Iterator[str]:
    for content in contents:
        # Not splitlines: it also splits at form feeds and the like, which stand inside the texts.
        yield from content.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")


def _eval_samples(contents: Iterable[bytes]) -> Iterator[Pair]:
    """(last message, ideal answer) of every line of an evals sample file."""
    for line in _lines(contents):
        if line.strip():
            sample = json.loads(line)
            ideal = sample["ideal"]
            yield sample["input"][-1]["content"], (ideal if isinstance(ideal, str) else ideal[0]).strip()


def _docstrings(content: bytes) -> Iterator[str]:
    """Docstrings of the public functions and classes of one source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Invalid escapes in the packages' own files.
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # Templates and files for other versions of Python.
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield (ast.get_docstring(node) or "").strip()
