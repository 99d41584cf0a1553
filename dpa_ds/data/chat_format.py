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
from dpa_ds.data.tokens import Encoded, end_token, special_pattern, tokenize, tokenize_inside
from dpa_ds.errors import DataError, ModelError

_TODAY = datetime.date(2024, 7, 26)
"""The date that templates get who write one into every prompt: tokens must not change from day to day. It is the one
that Llama 3's own template has where no clock is to be had."""
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around the number of a text in which nothing is special: characters without a meaning of their own."""
_PROBE = "xyzzy"
"""An answer that no template spells itself."""


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
        ModelError: the template cannot render the simplest conversation, ends no answer with a special token, or has a
            date that changes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: Literal["all", "last"]) -> None:
        self.tokenizer = tokenizer
        self._train_on = train_on
        self._special = re.compile(special_pattern(tokenizer))
        self._literal = re.compile(f"{self._special.pattern}|[{_OPEN}{_CLOSE}]")
        self._anchor = str(tokenizer.convert_ids_to_tokens(end_token(tokenizer)))
        self._templates = [self._template(has_tools) for has_tools in (False, True)]
        self.identity: tuple[Any, ...] = ("chat", train_on, *self._templates)
        self._last_end, self._inner_end, self.answer_prefix = "", "", ""
        self._probe()
        (ids,) = tokenize([self._last_end], tokenizer)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([end_token(tokenizer), ids[-1]]))

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
            is_last = not is_prompt and number == len(conversation.messages) - 1
            if message.role != ASSISTANT or message.is_empty or not (self._train_on == "all" or is_last):
                continue
            if not is_last and (number == 0 or not message.is_trained):
                continue  # to the first turn there is no question
            try:
                start, stop = self._find_answer(rendering, whole, number, is_last)
            except DataError:
                if is_prompt:  # it is cut where training cuts it, and no training has this row
                    continue
                raise
            yield from rendering.parts(whole[done:start], is_answer=False)
            yield from rendering.parts(whole[start:stop], is_answer=True)
            done = stop
        if is_prompt:
            yield from rendering.parts(whole[done:], is_answer=False)

    def _find_answer(self, rendering: "_Rendering", whole: str, number: int, is_last: bool) -> tuple[int, int]:
        """Where the answer in turn `number` begins and ends in the text, what ends the turn included."""
        before = rendering.text(number, is_prompt=True)
        remedy = "put another chat_template.jinja beside the tokenizer, or remove the row"
        if not is_last:
            remedy = f"set data.train_on: last, {remedy}"
        if not whole.startswith(before):
            raise DataError(
                f"{rendering.place}: the tokenizer's chat template writes what stands before turn {number + 1} in "
                f"another way once that turn is answered, so that the prompt would not be what was trained: {remedy}"
            )
        # No turn can spell what ends it: in its texts special tokens are marked.
        end = self._last_end if is_last else self._inner_end
        start, content_stop = len(before), whole.find(end, len(before))
        written = whole[start:content_stop].strip()
        answer = rendering.contents[number].strip()
        is_whole = written.endswith(answer)
        if rendering.has_further(number):  # such as calls of tools, which stand behind the answer
            is_whole = answer in written
        if content_stop < 0 or not written or not is_whole:
            raise DataError(
                f"{rendering.place}: the tokenizer's chat template does not write the answer of turn {number + 1} as "
                f"it is: {remedy}"
            )
        return start, content_stop + len(end)

    def _probe(self) -> None:
        """Find out what ends an answer, and what the template writes before one, with the simplest conversation.

        Raises:
            ModelError: it cannot be rendered, or nothing ends its answer.
        """
        place = "data.template chat"
        asked = Conversation((Message(USER, "a"),))
        answered = asked.continued(ASSISTANT, _PROBE)
        try:
            before = _Rendering(self, asked, place).text(1, is_prompt=True)
            whole = _Rendering(self, answered, place).text(2, is_prompt=False)
            longer = _Rendering(self, answered.continued(USER, "a"), place).text(3, is_prompt=False)
        except DataError as error:
            raise ModelError(str(error)) from error
        remedy = "put another chat_template.jinja beside the tokenizer, or give data.template a text"
        lead, found, last_tail = whole[len(before) :].rpartition(_PROBE)
        _, _, inner_tail = longer[len(before) :].partition(_PROBE)
        if not whole.startswith(before) or not longer.startswith(before) or not found:
            raise ModelError(
                "data.template chat: the tokenizer's chat template does not write the prompt, and after it the answer, "
                f"as they are: {remedy}"
            )
        # Some templates write more behind the last answer, such as the end token, or end it in another way.
        in_both = self._special_run(_common_beginning(last_tail, inner_tail))
        self._last_end = in_both or self._special_run(last_tail, most=1)
        self._inner_end = in_both or self._special_run(inner_tail, most=1)
        if not self._last_end or not self._inner_end:
            raise ModelError(
                "data.template chat: the tokenizer's chat template ends an answer with no special token, so that a "
                f"model would not learn where to stop: {remedy}"
            )
        self.answer_prefix = lead.strip()

    def _special_run(self, text: str, most: int = 0) -> str:
        """The special tokens that `text` begins with, white space before the first one included; `most` of them."""
        count = f"{{1,{most}}}" if most else "+"
        match = re.match(rf"\s*(?:{self._special.pattern}){count}", text)
        return match[0] if match else ""

    def _template(self, has_tools: bool) -> str:
        """The template's text, in which the date does not change."""
        template = self.tokenizer.get_chat_template(tools=[{}] if has_tools else None)

        def write_date(found: re.Match[str]) -> str:
            return repr(_TODAY.strftime(found[2]))

        template = re.sub(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)", write_date, template)
        if re.search(r"strftime_now(?!\s+is\s)", template):
            raise ModelError(
                "data.template chat: the tokenizer's chat template writes today's date in a way that cannot be made "
                "constant, so that tokens would change from day to day: write a date into chat_template.jinja"
            )
        return template

    def render(self, messages: list[dict[str, Any]], tools: Any, is_prompt: bool, place: str) -> str:
        """The text of these turns.

        Raises:
            DataError: the template refuses them.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self._templates[bool(tools)],
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

    def mark_literals(self, value: Any, literals: list[str]) -> Any:
        """`value` with a mark for each special token that its texts spell; these are appended to `literals`.

        Args:
            value: as JSON has it.
        """

        def mark(found: re.Match[str]) -> str:
            literals.append(found[0])
            return f"{_OPEN}{len(literals) - 1}{_CLOSE}"

        if isinstance(value, str):
            return self._literal.sub(mark, value)
        if isinstance(value, list):
            return [self.mark_literals(item, literals) for item in value]
        if isinstance(value, dict):
            return {key: self.mark_literals(item, literals) for key, item in value.items()}
        return value

    # ---- from parts to tokens ---------------------------------------------------------------------------------

    def _encode(self, divided: Sequence[Sequence[Part]]) -> list[Encoded]:
        """Tokens and label spans of each list of parts."""
        plain: set[str] = set()
        for parts in divided:
            before = ""
            for part in parts:
                if not part.is_literal:
                    plain |= {before, before + part.text}
                before = part.context
        tokens = _Tokens(self.tokenizer, plain - {""}, self._anchor)
        return [_join(parts, tokens) for parts in divided]


class _Rendering:
    """The texts of one conversation's beginnings, with marks where its turns spell special tokens."""

    def __init__(self, chat: ChatFormat, conversation: Conversation, place: str) -> None:
        self.place = place
        self._chat = chat
        self._literals: list[str] = []
        self._tools = chat.mark_literals(conversation.tools_for_template(), self._literals)
        self._messages = []
        for message in conversation.messages:
            self._messages.append(chat.mark_literals(message.to_template(), self._literals))
        self.contents = [message["content"] for message in self._messages]
        """Of each turn, with marks."""

    def has_further(self, number: int) -> bool:
        """Whether the turn has more than its content, such as calls of tools."""
        return len(self._messages[number]) > 2

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
    """Tokens of many texts, computed at once; a text's tokens after another text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: set[str], anchor: str) -> None:
        ordered = sorted(texts)
        self._tokenizer = tokenizer
        self._known = dict(zip(ordered, tokenize(ordered, tokenizer), strict=True))
        self._anchor = anchor

    def after(self, before: Part | None, part: Part) -> list[int]:
        """The tokens of `part` behind `before`, as if they were tokenised together.

        A tokenizer may begin a text as it begins no part of one, such as by a space. Where both together would give
        tokens that cross the border, `part` follows a special token, which it cannot merge with.
        """
        if part.is_literal:
            return tokenize_inside(part.text, self._tokenizer)
        if before is None:
            return self._known[part.text]
        rest = _rest(self._known[before.context], self._known[before.context + part.text])
        if rest is None:
            rest = _rest(*tokenize([self._anchor, self._anchor + part.text], self._tokenizer))
        if rest is None:
            (rest,) = tokenize([part.text], self._tokenizer)
        return rest


def _common_beginning(one: str, other: str) -> str:
    """What both texts begin with."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


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
