"""Makes (input, expected output) pairs of the demo's text: one function per task, from bytes to pairs."""

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
# Second paragraphs of docstrings that are lists of arguments, examples, directives or tables.
_NOT_PROSE = re.compile(
    r"(Args|Arguments|Parameters|Returns|Examples?|Note|Raises|\.\.|>>>|Attributes|Yields|See)|.*(---|>>>|::)"
)
Pair = tuple[str, str]
"""Input and expected output of one example."""


def sentiment_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Film snippets with a clear mean rating: lines of id, rating in [-4, 4], text, tab-separated."""
    for line in _lines(contents):
        columns = line.split("\t")
        if len(columns) < 3 or "\ufffd" in columns[2]:
            continue
        rating = float(columns[1])
        text = html.unescape(columns[2])
        if abs(rating) >= 1 and 4 <= len(text.split()) <= 60:
            yield text, "positive" if rating > 0 else "negative"


def sarcasm_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Headlines labelled 1 (sarcastic) or 0; the labels become yes and no."""
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
            option = re.sub(r"(,? or|[.;,?)]+)$", "", options[answer].strip())
            yield re.sub(r"\s*\n\s*", "\n", question), option


def entity_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Sentences of contracts with `[NAME - TYPE, ...]`; very long ones are left out."""
    num_without = 0
    for question, answer in _eval_samples(contents):
        if answer == NO_ENTITIES:
            num_without += 1
            # 58 % of the sentences have no entity: one in five of those is enough, or a constant answer scores well.
            if num_without % 5 != 0:
                continue
        if len(question) < 400:
            yield question, answer.strip("[]")


def likelihood_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Steps of a procedure, an event, and whether it becomes more, less or equally likely."""
    yield from _eval_samples(contents)


def translation_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """One-line messages of two words or more from compiled gettext catalogues; of plural forms, the singular."""
    for content in contents:
        # _catalog is private, and the only way the standard library lists a catalogue's messages.
        catalogue: Mapping[Any, str] = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
        for key, translation in catalogue.items():
            # The key is the message, or (message, number of the plural form), of which 0 is the singular.
            message, plural = (key, 0) if isinstance(key, str) else key
            if plural != 0:
                continue
            source = message.rpartition("\x04")[2]  # what stands before it is a context for the translator
            is_one_line = "\n" not in source and len(source) < 250
            if translation and source != translation and len(source.split()) >= 2 and is_one_line:
                yield source, translation


def summary_pairs(contents: Iterable[bytes]) -> Iterator[Pair]:
    """Docstrings of Python source: second paragraph as input, the one-sentence summary above it as output."""
    for content in contents:
        for docstring in _docstrings(content):
            paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", docstring)]
            if len(paragraphs) < 2:
                continue
            summary, description = paragraphs[:2]
            is_sentence = summary.endswith(".") and 5 <= len(summary.split()) <= 25
            is_prose = not _NOT_PROSE.match(description) and 20 <= len(description.split()) <= 120
            if is_sentence and is_prose:
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
            question = sample["input"][-1]["content"]
            ideal = sample["ideal"]
            # Where several answers are right, the first.
            answer = ideal if isinstance(ideal, str) else ideal[0]
            yield question, answer.strip()


def _docstrings(content: bytes) -> Iterator[str]:
    """Docstrings of the public functions and classes of one source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the packages' own files
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):  # templates, and files for other versions of Python
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield (ast.get_docstring(node) or "").strip()
