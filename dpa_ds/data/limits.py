"""What the model can read, asked before anything is trained or answered: its positions, and the tokens that it knows.

Every program asks here, so that none of them finds out hours later what another one knew at its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpa_ds.data.conversations import Question
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.sources import Example
from dpa_ds.data.tokenize import TokenizedExamples, encode_example
from dpa_ds.errors import DataError


@dataclass(frozen=True)
class ModelLimits:
    """What the config of a model says about its input."""

    num_positions: int | None
    """Tokens of the longest sequence; None: there is no bound."""
    vocab_size: int
    """Token ids are below this."""

    def check_prompt(self, tokens: Sequence[int], max_new_tokens: int, place: str) -> None:
        """Refuse a prompt that the model cannot read, or cannot answer within its positions.

        Args:
            place: where the prompt comes from, for the message.

        Raises:
            DataError: so it is.
        """
        if self.num_positions is not None and len(tokens) + max_new_tokens > self.num_positions:
            raise DataError(
                f"{place} has {len(tokens)} tokens: with generation.max_new_tokens {max_new_tokens} that is more than "
                f"the model's context of {self.num_positions}: lower generation.max_new_tokens, or shorten or remove it"
            )
        self._check_ids(tokens, place)

    def check_example(self, tokens: Sequence[int], place: str) -> None:
        """Refuse a training or held-out example, end token included, that the model cannot read.

        Raises:
            DataError: so it is.
        """
        if self.num_positions is not None and len(tokens) > self.num_positions:
            raise DataError(
                f"{place} has {len(tokens)} tokens with its answer, more than the model's context of "
                f"{self.num_positions}: lower data.max_length to {self.num_positions}, which leaves such rows out, or "
                "shorten it"
            )
        self._check_ids(tokens, place)

    def _check_ids(self, tokens: Sequence[int], place: str) -> None:
        highest = max(tokens, default=0)
        if highest >= self.vocab_size:
            raise DataError(
                f"{place} becomes the token id {highest}, but the model knows {self.vocab_size} tokens (vocab_size of "
                "config.json): take that text out, or put the model's own tokenizer there"
            )


def check_examples(
    tokenized: TokenizedExamples,
    examples: Sequence[Example],
    example_format: ExampleFormat,
    max_length: int,
    limits: ModelLimits,
) -> None:
    """Refuse examples of which the model cannot read one; those above `max_length` are left out anyway.

    Args:
        tokenized: what became of `examples`.

    Raises:
        DataError: so it is; the message names file and row.
    """
    longest = int(np.diff(tokenized.offsets).max())
    is_short = limits.num_positions is None or longest <= limits.num_positions
    if is_short and int(tokenized.tokens.max()) < limits.vocab_size:
        return
    # Tokens do not know their rows: one by one, the row is found.
    for example in examples:
        for encoded in encode_example(example, example_format, max_length):
            if len(encoded.tokens) <= max_length:
                limits.check_example(encoded.tokens, example.place)


def check_prompts(
    questions: Sequence[Question], example_format: ExampleFormat, limits: ModelLimits, max_new_tokens: int
) -> list[list[int]]:
    """The tokens of all questions, of which the model can answer each.

    Raises:
        DataError: it cannot answer one; the message names its place.
    """
    prompts = example_format.prompts(questions)
    for question, prompt in zip(questions, prompts, strict=True):
        limits.check_prompt(prompt, max_new_tokens, question.place)
    return prompts
