"""What the model can read, asked before anything is trained or answered: its positions, and the tokens that it knows.

Every program asks here, so that none of them finds out hours later what another one knew at its start.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.sources import Example
from dpa_ds.data.tokenize import TokenizedExamples, tokenize_examples, tokenize_prompts
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
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    limits: ModelLimits,
) -> None:
    """Refuse examples of which the model cannot read one; those above data.max_length are left out anyway.

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
        alone = tokenize_examples([example], tokenizer, config.template, sys.maxsize, example.place)
        if alone.length(0) <= config.max_length:
            limits.check_example(alone.tokens.tolist(), example.place)


def check_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    limits: ModelLimits,
    max_new_tokens: int,
) -> None:
    """Refuse examples of which the model cannot answer one.

    Raises:
        DataError: so it is; the message names file and row.
    """
    prompts = tokenize_prompts([example.instruction for example in examples], tokenizer, template)
    for example, prompt in zip(examples, prompts, strict=True):
        limits.check_prompt(prompt, max_new_tokens, example.place)
