"""How examples and questions become tokens: a text template around an instruction, or the model's chat template.

An `ExampleFormat` is made once and used by every program, so that the tokens of a prompt are those that were trained.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from dpa_ds.config.schema import PAPER_TEMPLATE, DataConfig
from dpa_ds.data.conversations import USER, Question
from dpa_ds.data.sources import Example
from dpa_ds.errors import DataError, ModelError

# Texts handed to the tokenizer in one call: enough for its threads, small enough not to show in memory.
_TEXTS_PER_CALL = 1024


class Encoded(NamedTuple):
    """An example as tokens."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    """[start, stop) of the tokens that are predicted, ascending; the first token of a sequence never is."""


class ExampleFormat(Protocol):
    """A way in which examples and questions become tokens."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    """Tokens with which the model ends an answer; the tokenizer's end token is the first."""
    identity: tuple[Any, ...]
    """Beside the tokenizer, all that the tokens depend on, as JSON can write it."""

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The tokens of each example, none of which is a plain text.

        Raises:
            DataError: one does not fit the format.
        """
        ...

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """The tokens that the model continues to answer each question.

        Raises:
            DataError: one does not fit the format.
        """
        ...


def build_format(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ExampleFormat:
    """The format that `data.template` names.

    Raises:
        ModelError: it asks for a chat template, and the tokenizer has none, or one that cannot be used.
    """
    from dpa_ds.data.chat_format import ChatFormat  # it is made of what is below

    if data.template == "auto" and not tokenizer.chat_template:
        return TextFormat(tokenizer, PAPER_TEMPLATE)
    if data.template not in ("auto", "chat"):
        return TextFormat(tokenizer, data.template)
    if not tokenizer.chat_template:
        raise ModelError(
            "data.template chat: the model's tokenizer has no chat template: take an instruct model, put a "
            "chat_template.jinja beside its tokenizer.json, or give data.template a text with {instruction}"
        )
    return ChatFormat(tokenizer, data.train_on)


class TextFormat:
    """tokens(prompt) + tokens(answer) + [eos], where the prompt is an instruction in a text template.

    Prompt and answer are tokenised apart, so that the border is exact.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.end_ids: tuple[int, ...] = (end_token(tokenizer),)
        self.identity: tuple[Any, ...] = ("text", template)
        self._template = template
        self._special_texts = special_texts(tokenizer)
        self._begin = begin_tokens(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """As `ExampleFormat.encode`."""
        prompts = self.prompts([example.question for example in examples])
        answers = tokenize([example.output for example in examples], self.tokenizer, split_special=True)
        encoded = []
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = [*prompt, *answer, self.end_ids[0]]
            encoded.append(Encoded(tokens, [(max(1, len(prompt)), len(tokens))]))
        return encoded

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """As `ExampleFormat.prompts`. Special tokens that the template spells are such; an instruction's are text."""
        instructions = [_single_instruction(question) for question in questions]
        texts = [render_prompt(self._template, instruction) for instruction in instructions]
        # Without what the tokenizer adds: an end token, which some add, would make the model stop before the answer.
        prompts = tokenize(texts, self.tokenizer)
        for i, instruction in enumerate(instructions):
            if any(text in instruction for text in self._special_texts):
                prompts[i] = self._tokenize_apart(instruction)
            if prompts[i][: len(self._begin)] != self._begin:  # else the template spells it
                prompts[i] = [*self._begin, *prompts[i]]
        return prompts

    def _tokenize_apart(self, instruction: str) -> list[int]:
        """The template's parts, and between them the instruction, in which nothing is special."""
        (inside,) = tokenize([instruction], self.tokenizer, split_special=True)
        first, *others = tokenize(self._template.split("{instruction}"), self.tokenizer)
        prompt = list(first)
        for part in others:
            prompt += [*inside, *part]
        return prompt


def encode_plain_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """All tokens of a text are predicted; one that is longer than `max_length` becomes several examples."""
    (inside,) = tokenize([text], tokenizer, split_special=True)
    tokens = [*begin_tokens(tokenizer), *inside, end_token(tokenizer)]
    encoded = []
    for start in range(0, len(tokens), max_length):
        part = tokens[start : start + max_length]
        if len(part) > 1:  # of a single token nothing is predicted
            encoded.append(Encoded(part, [(1, len(part))]))
    return encoded


def render_prompt(template: str, instruction: str) -> str:
    """The prompt as text."""
    # Not str.format: other braces in the template, and all in the instruction, are text.
    return template.replace("{instruction}", instruction)


def format_digest(example_format: ExampleFormat) -> str:
    """Hex digits that tell formats apart."""
    return hashlib.sha256(repr(example_format.identity).encode()).hexdigest()[:16]


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
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    for number, text in enumerate(texts):
        if special_ids.isdisjoint(ids[number]):
            continue
        spelled: list[int] = []
        for part in pattern.split(text):
            for unit in part if part in specials else [part]:
                spelled += _tokenize_inside(unit, tokenizer)
        ids[number] = spelled


def _tokenize_inside(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text in the middle of another one, where a tokenizer may put no space before it."""
    if not text:
        return []
    before, both, alone = tokenize(["\n", f"\n{text}", text], tokenizer)
    return both[len(before) :] if both[: len(before)] == before else alone


def _single_instruction(question: Question) -> str:
    """The instruction that a text template takes.

    Raises:
        DataError: the question is a conversation of more than one turn.
    """
    if question.conversation is None:
        return question.instruction
    messages = question.conversation.messages
    if len(messages) == 1 and messages[0].role == USER:
        return messages[0].content
    raise DataError(
        f"{question.place}: a conversation of several turns does not fit a text template: set data.template chat, for "
        "which the model's tokenizer needs a chat template, or leave one question and its answer"
    )
