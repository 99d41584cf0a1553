"""How examples and questions become tokens: a text template around an instruction, or the model's chat template.

An `ExampleFormat` is made once and used by every program, so that the tokens of a prompt are those that were trained.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from dpa_ds.config.schema import PAPER_TEMPLATE, DataConfig
from dpa_ds.data.chat_format import ChatFormat
from dpa_ds.data.conversations import USER, Question
from dpa_ds.data.sources import Example
from dpa_ds.data.tokens import Encoded, begin_tokens, end_token, special_texts, tokenize
from dpa_ds.errors import DataError, ModelError


class ExampleFormat(Protocol):
    """A way in which examples and questions become tokens."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    """Tokens with which the model ends an answer; the tokenizer's end token is the first."""
    answer_prefix: str
    """What the model is trained to write before each answer, such as the tags of an empty thought; "" for nothing."""
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
        self.answer_prefix = ""
        self._template = template
        self._special_texts = special_texts(tokenizer)
        self._begin = begin_tokens(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """As `ExampleFormat.encode`."""
        prompts = self.prompts([example.question for example in examples])
        for example in examples:
            if example.conversation is not None and example.conversation.messages[-1].further:
                raise DataError(
                    f"{example.place}: an answer with more than its text, such as calls of tools, does not fit a text "
                    "template: set data.template chat"
                )
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


def render_prompt(template: str, instruction: str) -> str:
    """The prompt as text."""
    # Not str.format: other braces in the template, and all in the instruction, are text.
    return template.replace("{instruction}", instruction)


def _single_instruction(question: Question) -> str:
    """The instruction that a text template takes.

    Raises:
        DataError: the question is a conversation of more than one turn.
    """
    if question.conversation is None:
        return question.instruction
    messages = question.conversation.messages
    if len(messages) == 1 and messages[0].role == USER and not question.conversation.tools:
        return messages[0].content
    raise DataError(
        f"{question.place}: a conversation of several turns does not fit a text template: set data.template chat, for "
        "which the model's tokenizer needs a chat template, or leave one question and its answer"
    )
