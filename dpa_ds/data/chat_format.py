"""Conversations as tokens, by the chat template of the model's tokenizer.

A conversation is rendered once as a text, the text is cut where answers begin and end, and the parts are tokenised:
borders are exact, and the tokens before an answer are those of the prompt at inference.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from dpa_ds.data.conversations import ASSISTANT, USER, Conversation, Message, Question
from dpa_ds.data.sources import Example
from dpa_ds.data.tokens import Encoded, end_token, special_texts, tokenize
from dpa_ds.errors import DataError, ModelError

_TODAY = datetime.date(2024, 7, 26)
"""The date that templates get who write one into every prompt: tokens must not change from day to day. It is the one
that Llama 3's own template has where no clock is to be had."""
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around the number of a text in which nothing is special: characters without a meaning of their own."""


class Part(NamedTuple):
    """Some of the rendered text, tokenised by itself."""

    text: str
    is_answer: bool
    is_literal: bool
    """It spells a special token, but is text."""

    @property
    def context(self) -> str:
        """What the next part is tokenised behind: no special token."""
        return self.text[-1] if self.is_literal else self.text


class ChatFormat:
    """Conversations in the chat template of a tokenizer; an instruction is a conversation of one question.

    Raises:
        ModelError: the template cannot render the simplest conversation, or ends no answer with a special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: Literal["all", "last"]) -> None:
        self.tokenizer = tokenizer
        self._train_on = train_on
        special = sorted(special_texts(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._literal = re.compile(f"{self._special.pattern}|[{_OPEN}{_CLOSE}]")
        self._anchor = str(tokenizer.convert_ids_to_tokens(end_token(tokenizer)))
        self.end_ids: tuple[int, ...] = (end_token(tokenizer), *self._end_of_turn())
        templates = [self._template(has_tools) for has_tools in (False, True)]
        self.identity: tuple[Any, ...] = ("chat", train_on, *templates)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """As `ExampleFormat.encode`."""
        divided = []
        for example in examples:
            conversation = example.conversation
            if conversation is None:
                conversation = example.question.as_conversation().continued(ASSISTANT, example.output)
            divided.append(list(self._divide(conversation, example.place, is_prompt=False)))
        return self._encode(divided)

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """As `ExampleFormat.prompts`."""
        divided = []
        for question in questions:
            divided.append(list(self._divide(question.as_conversation(), question.place, is_prompt=True)))
        return [encoded.tokens for encoded in self._encode(divided)]

    # ---- from turns to parts of a text ------------------------------------------------------------------------

    def _divide(self, conversation: Conversation, place: str, is_prompt: bool) -> Iterator[Part]:
        """The rendered text in parts: what stands before an answer, the answer, and so on.

        Args:
            is_prompt: the model's turn follows; else the last turn is an answer, and nothing after it is kept.
        """
        rendering = _Rendering(self, conversation, place)
        whole = rendering.text(len(conversation.messages), is_prompt)
        done = 0
        for number, message in enumerate(conversation.messages):
            is_last = number == len(conversation.messages) - 1
            if message.role == ASSISTANT and (self._train_on == "all" or (is_last and not is_prompt)):
                start, stop = self._find_answer(rendering, whole, number, is_last and not is_prompt)
                yield from rendering.parts(whole[done:start], is_answer=False)
                yield from rendering.parts(whole[start:stop], is_answer=True)
                done = stop
        if is_prompt:
            yield from rendering.parts(whole[done:], is_answer=False)

    def _find_answer(self, rendering: "_Rendering", whole: str, number: int, is_last: bool) -> tuple[int, int]:
        """Where the answer in turn `number` begins and ends in the text, the token that ends the turn included."""
        before = rendering.text(number, is_prompt=True)
        if not whole.startswith(before):
            raise DataError(
                f"{rendering.place}: the tokenizer's chat template writes what stands before turn {number + 1} in "
                "another way once that turn is answered, so that the prompt would not be what was trained: set "
                "data.train_on last if it is not the last turn, or put another chat_template.jinja beside the tokenizer"
            )
        start = len(before)
        answer = rendering.contents[number].strip()
        through = whole if is_last else rendering.text(number + 1, is_prompt=False)
        if whole.startswith(through):
            content_stop = start + len(self._without_tail(through[start:]))
        else:  # a template that treats the last turn in its own way, as with a further end token
            lead = len(whole[start:]) - len(whole[start:].lstrip())
            content_stop = start + lead + len(answer)
        if not whole[start:content_stop].rstrip().endswith(answer):
            raise DataError(
                f"{rendering.place}: the tokenizer's chat template does not write the answer of turn {number + 1} as "
                "it is: put another chat_template.jinja beside the tokenizer, or remove the row"
            )
        end = re.compile(rf"\s*(?:{self._special.pattern})").match(whole, content_stop)
        if end is None:
            raise DataError(
                f"{rendering.place}: the tokenizer's chat template ends turn {number + 1} with no special token, so "
                "that a model would not learn where to stop: put another chat_template.jinja beside the tokenizer"
            )
        return start, end.end()

    def _without_tail(self, text: str) -> str:
        """The text without the special tokens and white space at its end."""
        while True:
            shorter = text.rstrip()
            for special in self._special.finditer(shorter):
                if special.end() == len(shorter):
                    shorter = shorter[: special.start()]
            if shorter == text:
                return text
            text = shorter

    def _end_of_turn(self) -> tuple[int, ...]:
        """The token that ends an answer, where it is not the end token."""
        question = Conversation((Message(USER, "a"),))
        try:
            *_, answer = self._divide(question.continued(ASSISTANT, "b"), "data.template chat", is_prompt=False)
        except DataError as error:
            raise ModelError(str(error)) from error
        (ids,) = tokenize([answer.text], self.tokenizer)
        return () if ids[-1] == end_token(self.tokenizer) else (ids[-1],)

    def _template(self, has_tools: bool) -> str:
        """The template's text, in which the date does not change."""
        template = self.tokenizer.get_chat_template(tools=[{}] if has_tools else None)

        def write_date(found: re.Match[str]) -> str:
            return repr(_TODAY.strftime(found[2]))

        return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", write_date, template)

    def render(self, messages: list[dict[str, Any]], tools: Any, is_prompt: bool, place: str) -> str:
        """The text of these turns.

        Raises:
            DataError: the template refuses them.
        """
        if not messages and not is_prompt:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self._template(bool(tools)),
                    add_generation_prompt=is_prompt,
                    tokenize=False,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            words = " ".join(str(error).split())
            raise DataError(
                f"{place}: the tokenizer's chat template refuses the conversation ({words}): give its turns as the "
                "template expects them, or put another chat_template.jinja beside the tokenizer"
            ) from error

    def split_literals(self, text: str, literals: list[str]) -> str:
        """`text` with a mark for each special token that it spells; what was spelled is appended to `literals`."""

        def mark(found: re.Match[str]) -> str:
            literals.append(found[0])
            return f"{_OPEN}{len(literals) - 1}{_CLOSE}"

        return self._literal.sub(mark, text)

    # ---- from parts to tokens ---------------------------------------------------------------------------------

    def _encode(self, divided: Sequence[Sequence[Part]]) -> list[Encoded]:
        """Tokens and label spans of each list of parts."""
        plain: set[str] = {self._anchor}
        literal: set[str] = {"\n"}
        for parts in divided:
            before = ""
            for part in parts:
                if part.is_literal:
                    literal |= {part.text, f"\n{part.text}"}
                else:
                    plain |= {part.text, before, before + part.text, self._anchor + part.text}
                before = part.context
        tokens = _Tokens(self.tokenizer, plain, literal, self._anchor)
        return [_join(parts, tokens) for parts in divided]


class _Rendering:
    """The texts of one conversation's beginnings, with marks where its turns spell special tokens."""

    def __init__(self, chat: ChatFormat, conversation: Conversation, place: str) -> None:
        self.place = place
        self._chat = chat
        self._literals: list[str] = []
        self._tools = conversation.tools_for_template()
        self.contents: list[str] = []
        """Of each turn, with marks."""
        self._messages: list[dict[str, Any]] = []
        for message in conversation.messages:
            content = chat.split_literals(message.content, self._literals)
            self.contents.append(content)
            self._messages.append(message.to_template(content))

    def text(self, num_turns: int, is_prompt: bool) -> str:
        """The first turns, with the beginning of the model's own where it is to answer."""
        return self._chat.render(self._messages[:num_turns], self._tools, is_prompt, self.place)

    def parts(self, text: str, is_answer: bool) -> Iterator[Part]:
        """`text` in parts, in which the marks are replaced by what they stand for."""
        for k, found in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
            is_literal = k % 2 == 1
            if is_literal:
                found = self._literals[int(found)]
            if found:
                yield Part(found, is_answer, is_literal)


class _Tokens:
    """Tokens of many texts, each computed once; a text's tokens after another text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, plain: set[str], literal: set[str], anchor: str) -> None:
        plain_texts, literal_texts = sorted(plain), sorted(literal)
        self._plain = dict(zip(plain_texts, tokenize(plain_texts, tokenizer), strict=True))
        literal_ids = tokenize(literal_texts, tokenizer, split_special=True)
        self._literal = dict(zip(literal_texts, literal_ids, strict=True))
        self._anchor = anchor

    def after(self, before: Part | None, part: Part) -> list[int]:
        """The tokens of `part` behind `before`, as if they were tokenised together.

        A tokenizer may begin a text as it begins no part of one, such as by a space. Where both together would give
        tokens that cross the border, `part` follows a special token, which it cannot merge with.
        """
        if part.is_literal:
            return _rest(self._literal["\n"], self._literal["\n" + part.text]) or self._literal[part.text]
        if before is None:
            return self._plain[part.text]
        rest = _rest(self._plain[before.context], self._plain[before.context + part.text])
        if rest is not None:
            return rest
        behind_anchor = _rest(self._plain[self._anchor], self._plain[self._anchor + part.text])
        return self._plain[part.text] if behind_anchor is None else behind_anchor


def _rest(beginning: list[int], whole: list[int]) -> list[int] | None:
    """What follows `beginning` in `whole`; None where it does not begin so."""
    return whole[len(beginning) :] if whole[: len(beginning)] == beginning else None


def _join(parts: Sequence[Part], tokens: _Tokens) -> Encoded:
    """The tokens of all parts; neighbouring parts of an answer are one span."""
    joined: list[int] = []
    spans: list[tuple[int, int]] = []
    before = None
    for part in parts:
        start = len(joined)
        joined += tokens.after(before, part)
        if part.is_answer:
            if before is not None and before.is_answer:
                start = spans.pop()[0]
            spans.append((max(1, start), len(joined)))
        before = part
    return Encoded(joined, spans)
