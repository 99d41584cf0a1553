"""Texts as tokens: what a tokenizer adds, what it reads as special, and how a text stays text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dpa_ds.errors import ModelError

# Texts handed to the tokenizer in one call: enough for its threads, small enough not to show in memory.
_TEXTS_PER_CALL = 1024


class Encoded(NamedTuple):
    """An example as tokens."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    """[start, stop) of the tokens to be predicted, ascending. A plain text's begins at 0, though its first token never
    is; all others begin behind a prompt."""


def encode_plain_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[Encoded]]:
    """All tokens of a text are predicted; one that is longer than `max_length` becomes several examples."""
    if not texts:
        return []
    begin, end = begin_tokens(tokenizer), end_token(tokenizer)
    encoded = []
    for inside in tokenize(texts, tokenizer, split_special=True):
        tokens = [*begin, *inside, end]
        parts = [tokens[start : start + max_length] for start in range(0, len(tokens), max_length)]
        # Of a single token nothing is predicted.
        encoded.append([Encoded(part, [(0, len(part))]) for part in parts if len(part) > 1])
    return encoded


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end token.

    Raises:
        ModelError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token: set eos_token in the model's tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, such as BOS."""
    text = "a"
    (bare,) = tokenize([text], tokenizer)
    whole = tokenizer(text, verbose=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All texts that the tokenizer reads as special tokens, also those that have no role of their own."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return texts | set(tokenizer.all_special_tokens)


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> str:
    """A regular expression of all special texts, the longest first; of none, one that matches nothing."""
    return "|".join(map(re.escape, sorted(special_texts(tokenizer), key=len, reverse=True))) or "(?!)"


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, split_special: bool = False) -> list[list[int]]:
    """Tokens of each text, without those that the tokenizer would add.

    Args:
        split_special: special tokens that a text spells are text.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_PER_CALL]),
            add_special_tokens=False,
            split_special_tokens=split_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no "longer than the model's maximum" lines: max_length decides here
        )
        ids.extend(encoded["input_ids"])
    if split_special:
        _spell_out_special(ids, texts, tokenizer)
    return ids


def _spell_out_special(ids: list[list[int]], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Put letters in the place of special tokens that are left in `ids`.

    A unigram model has them among its own words, and finds them again in the text.
    """
    specials = special_texts(tokenizer)
    special_ids = {tokenizer.convert_tokens_to_ids(text) for text in specials}
    pattern = re.compile(f"({special_pattern(tokenizer)})")
    for number, text in enumerate(texts):
        if special_ids.isdisjoint(ids[number]):
            continue
        spelled: list[int] = []
        for part in pattern.split(text):
            for unit in part if part in specials else [part]:
                spelled += tokenize_inside(unit, tokenizer, split_special=False)
        ids[number] = spelled


def tokenize_inside(text: str, tokenizer: PreTrainedTokenizerBase, split_special: bool = True) -> list[int]:
    """Tokens of a text in the middle of another one, where a tokenizer puts no space before it.

    Args:
        split_special: special tokens that it spells are text.
    """
    if not text:
        return []
    before, both, alone = tokenize(["\n", f"\n{text}", text], tokenizer, split_special)
    return both[len(before) :] if both[: len(before)] == before else alone
