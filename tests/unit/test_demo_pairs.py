"""From the bytes of each source to the demo's pairs, on invented text."""

import json
import struct

from dpa_ds.demo import pairs as demo_pairs
from dpa_ds.demo.pairs import Pair


def samples(*pairs: Pair) -> list[bytes]:
    """An evals sample file."""
    lines = [
        json.dumps({"input": [{"role": "system", "content": "-"}, {"role": "user", "content": text}], "ideal": answer})
        for text, answer in pairs
    ]
    return ["\n".join([*lines, ""]).encode()]


def compiled_catalogue(messages: dict[str, str]) -> bytes:
    """A gettext .mo file: header, table of sources, table of translations, the strings."""
    entries = [(key.encode() + b"\0", value.encode() + b"\0") for key, value in sorted(messages.items())]
    offset = 28 + 16 * len(entries)
    tables, strings = b"", b""
    for column in (0, 1):
        for entry in entries:
            tables += struct.pack("<II", len(entry[column]) - 1, offset + len(strings))
            strings += entry[column]
    header = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    return header + tables + strings


def test_sentiment_pairs_leave_out_unclear_short_and_broken_snippets() -> None:
    lines = [
        "1\t2.5\ta fine &amp; happy film",
        "2\t-1\ta dull film at length",
        "3\t0.9\tneither good nor bad it is",
        "4\t3\ttoo short",
        "5\t3\ta broken \ufffd letter is here",
        "6\t3",
    ]
    pairs = list(demo_pairs.sentiment_pairs(["\r\n".join(lines).encode()]))
    assert pairs == [("a fine & happy film", "positive"), ("a dull film at length", "negative")]


def test_sarcasm_pairs_name_the_labels() -> None:
    assert list(demo_pairs.sarcasm_pairs(samples(("a", "1"), ("b", "0")))) == [("a", "yes"), ("b", "no")]


def test_social_pairs_answer_with_the_option() -> None:
    question = "Jo ran. Why? A: to win: at last; B: to rest; C: for fun."
    contents = samples((question, "A"), (question, "C"), (question, "D"), (f"Look ... {question}", "A"))
    assert list(demo_pairs.social_pairs(contents)) == [(question, "to win: at last"), (question, "for fun")]


def test_science_pairs_answer_with_the_option() -> None:
    contents = samples(("Ice is\n\n A: colder or\n B: warmer.", "A"), ("Ice is\n\n A: cold\n B: hot.", "B"))
    expected = [("Ice is\nA: colder or\nB: warmer.", "colder"), ("Ice is\nA: cold\nB: hot.", "hot")]
    assert list(demo_pairs.science_pairs(contents)) == expected


def test_entity_pairs_thin_out_sentences_without_entities() -> None:
    without = [(f"clause {index}", demo_pairs.NO_ENTITIES) for index in range(10)]
    contents = samples(*without, ("Ann pays", "[Ann - PERSON]"), ("x" * 400, "[x - PERSON]"))
    pairs = list(demo_pairs.entity_pairs(contents))
    assert pairs[-1] == ("Ann pays", "Ann - PERSON")
    assert [answer for _, answer in pairs[:-1]] == [demo_pairs.NO_ENTITIES] * 2


def test_translation_pairs_take_singulars_and_drop_contexts() -> None:
    catalogue = compiled_catalogue(
        {
            "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n != 1;\n",
            "Save it now": "Enregistrer maintenant",
            "menu\x04Open the file": "Ouvrir le fichier",
            "%d red dot\0%d red dots": "%d point rouge\0%d points rouges",
            "Save": "Enregistrer",
            "Two\nlines here": "Deux\nlignes",
            "same as before": "same as before",
        }
    )
    assert dict(demo_pairs.translation_pairs([catalogue])) == {
        "Save it now": "Enregistrer maintenant",
        "Open the file": "Ouvrir le fichier",
        "%d red dot": "%d point rouge",
    }


def test_summary_pairs_take_prose_of_public_functions() -> None:
    prose = "It continues and on about what " + "the function does " * 6 + "in the end."
    source = f'''
def kept():
    """Do one thing and do
    it well.

    {prose}

    Args: none.
    """
def _private():
    """Do one thing and do it well.

    {prose}
    """
class Listed:
    """Do one thing and do it well.

    Args: {prose}
    """
def unfinished():
    """Do one thing and do it well

    {prose}
    """
'''
    assert list(demo_pairs.summary_pairs([source.encode(), b"not ( python"])) == [
        (prose, "Do one thing and do it well.")
    ]
