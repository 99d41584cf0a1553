"""Conversations: turns of chat data, in the columns that tools for chat models write.

Read are `messages` (role, content), `conversations` (from, value), and `prompt` beside `completion`, as texts or as
lists of messages. A `tools` column goes with them to the model's chat template.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpa_ds.data.tables import Row
from dpa_ds.errors import DataError

USER, ASSISTANT = "user", "assistant"
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Who may speak, under the names that are in use, -> the name that chat templates know."""
_CALLS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
_FURTHER = ("name", "tool_call_id", *_CALLS)
"""Fields of a turn that chat templates read; others, such as dates and scores, are not the model's to see."""
_MESSAGE_COLUMNS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str
    further: str = ""
    """JSON of its other fields, such as `tool_calls`, which a chat template may use; "" where there are none."""
    is_trained: bool = True
    """Of an answer: it is one to learn."""

    @property
    def is_empty(self) -> bool:
        """It says nothing, and calls nothing."""
        further = json.loads(self.further) if self.further else {}
        return not self.content.strip() and not any(further.get(name) for name in _CALLS)

    def to_template(self) -> dict[str, Any]:
        """As a chat template takes it."""
        fields = json.loads(self.further) if self.further else {}
        return {"role": self.role, "content": self.content, **fields}


@dataclass(frozen=True)
class Conversation:
    """Turns in their order."""

    messages: tuple[Message, ...]
    tools: str = ""
    """JSON of the tools that the model may call, as schemas; "" where there are none."""

    @property
    def last_question(self) -> str:
        """What the user said last; "" where only others speak."""
        for message in reversed(self.messages):
            if message.role == USER:
                return message.content
        return ""

    def tools_for_template(self) -> Any:
        """The tools as a chat template takes them; None where there are none."""
        return json.loads(self.tools) if self.tools else None

    def until(self, stop: int) -> "Conversation":
        """Its first `stop` turns."""
        return Conversation(self.messages[:stop], self.tools)

    def continued(self, role: str, content: str) -> "Conversation":
        """With one more turn."""
        return Conversation((*self.messages, Message(role, content)), self.tools)


@dataclass(frozen=True)
class Question:
    """What a model is asked: an instruction, or a conversation that it continues."""

    instruction: str
    """Of a conversation, what the user said last."""
    conversation: Conversation | None = None
    """Turns up to the one that is answered; None: the instruction alone."""
    place: str = field(default="", compare=False)
    """Where it comes from, for messages."""

    def as_conversation(self) -> Conversation:
        """The turns; an instruction is one of the user."""
        return self.conversation or Conversation((Message(USER, self.instruction),))


def has_conversation(row: Row) -> bool:
    """Whether the row has one of the columns in which conversations are kept."""
    has_parts = row.values.get("prompt") is not None and row.values.get("completion") is not None
    return has_parts or _message_column(row) is not None


def read_conversation(row: Row) -> Conversation:
    """All turns of a row; the last one need not be an answer.

    Raises:
        DataError: there is no turn, or one that is not text of a known speaker.
    """
    column = _message_column(row)
    if column is not None:
        messages = _read_messages(row, column)
    else:
        messages = _read_part(row, "prompt", USER)
        if row.values.get("completion") is not None:
            messages += _read_part(row, "completion", ASSISTANT)
    system = row.values.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    if not messages:
        raise DataError(f"{row.place}: a conversation without turns: fill it in, or remove the row")
    return Conversation(tuple(messages), _read_tools(row))


def read_answered(row: Row) -> Conversation:
    """The turns of a row up to its last answer, which is not empty; those after it, to which there is none, are cut.

    Raises:
        DataError: as `read_conversation`, or there is no such answer.
    """
    conversation = read_conversation(row)
    answers = [k for k, message in enumerate(conversation.messages) if message.role == ASSISTANT]
    if not answers:
        raise DataError(f"{row.place}: a conversation in which no assistant answers: add the answer, or remove the row")
    last = conversation.messages[answers[-1]]
    if last.is_empty:
        raise DataError(f"{row.place}: the last answer is empty: fill it in, or remove the row")
    if not last.is_trained:
        raise DataError(
            f"{row.place}: the last answer has the weight 0, but it is what a prompt is compared with and scored by: "
            "take it out of the conversation, or give it a weight"
        )
    return conversation.until(answers[-1] + 1)


def _message_column(row: Row) -> str | None:
    for column in _MESSAGE_COLUMNS:
        if row.values.get(column) is not None:  # in a table of several kinds of rows the other columns are null
            return column
    if not any(row.values.get(column) is not None for column in ("prompt", "text")):
        for column in _MESSAGE_COLUMNS:
            if column in row.values:  # whoever reads it reports that nothing is there
                return column
    return None


def _read_part(row: Row, column: str, role: str) -> list[Message]:
    """`prompt` or `completion`: text of `role`, or messages."""
    if isinstance(row.values[column], Sequence) and not isinstance(row.values[column], str):
        return _read_messages(row, column)
    text = row.text(column)
    if not text.strip():
        raise DataError(f"{row.place}: column {column!r} is empty: fill it in, or remove the row")
    return [Message(role, text)]


def _read_messages(row: Row, column: str) -> list[Message]:
    value = row.values[column]
    if isinstance(value, str):  # as it stands in a CSV file
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(
            f"{row.place}: column {column!r} must be a list of turns such as "
            f'{{"role": "user", "content": "..."}}, got {type(value).__name__}'
        )
    return [_read_message(turn, f"{row.place}: turn {k} of {column!r}") for k, turn in enumerate(value, start=1)]


def _read_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'{place} must be an object such as {{"role": "user", "content": "..."}}')
    # Arrow gives every turn all fields that some turn has: those that are null are not there.
    fields = {name: value for name, value in turn.items() if value is not None}
    speaker = fields.pop("role", None) or fields.pop("from", None)
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{place} is spoken by {speaker!r}: the role (or `from`) must be one of {', '.join(_ROLES)}")
    further = {name: _without_nulls(fields[name]) for name in _FURTHER if fields.get(name)}
    content = fields.get("content", fields.get("value"))
    if content is None and not further:
        raise DataError(f"{place} has no content: fill it in, or remove the turn")
    text = _text_of("" if content is None else content, place)
    is_trained = fields.get("weight", 1) != 0 and fields.get("train", True) is not False
    return Message(role, text, _to_json(further, place) if further else "", is_trained)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object all keys that some object has: those that are null are not there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(item) for item in value]
    return value


def _to_json(value: Any, place: str) -> str:
    try:
        return json.dumps(value)
    except TypeError as error:
        raise DataError(f"{place} has a value that JSON has not ({error}): write it as text") from error


def _text_of(content: Any, place: str) -> str:
    """A turn's text, which may be written as a list of parts."""
    if isinstance(content, str):
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place} has half a surrogate pair: remove the \\ud8xx") from error
        return content
    if isinstance(content, Sequence):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise DataError(f"{place} has a part that is not text: images and sounds cannot be trained on")
            texts.append(part["text"])
        return "".join(texts)
    raise DataError(f"{place}: its content must be text, got {type(content).__name__}")


def _read_tools(row: Row) -> str:
    """The `tools` column as JSON: a list of schemas, or such a list as text."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{row.place}: column 'tools' is not JSON ({error}): write a list of schemas") from error
    if not tools:
        return ""
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{row.place}: column 'tools' must be a list of schemas, which are objects")
    return _to_json(_without_nulls(list(tools)), f"{row.place}: column 'tools'")
