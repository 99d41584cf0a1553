"""Turns examples into tokens, once: template, end token, and where the prompt ends (the label mask).

An example is tokens(prompt) + tokens(answer) + [eos]. Prompt and answer are tokenised apart, so that the border is
exact and the prompt's tokens at inference are those seen in training.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from dpa_ds.config.paths import expand
from dpa_ds.config.schema import DataConfig
from dpa_ds.data.sources import Example
from dpa_ds.errors import ConfigError, DataError

# Part of the cache key: raise it whenever the layout of an example or of the file changes.
_LAYOUT_VERSION = 3

# Texts handed to the tokenizer in one call: enough for its threads, small enough not to show in memory.
_TEXTS_PER_CALL = 1024

_logger = logging.getLogger("dpa_ds")


@dataclass(frozen=True, eq=False)
class TokenizedExamples:
    """Tokens of n examples in one flat array: four bytes a token, however many examples there are."""

    tokens: npt.NDArray[np.int32]
    """Shape (total tokens,): all examples, one after the other."""
    offsets: npt.NDArray[np.int64]
    """Shape (n + 1,): example i is tokens[offsets[i] : offsets[i + 1]]."""
    prompt_lengths: npt.NDArray[np.int64]
    """Shape (n,): number of tokens of each prompt; the answer and the end token follow it."""
    num_dropped: int
    """Number of examples that were left out because they are longer than data.max_length."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompt_lengths)

    def length(self, index: int) -> int:
        """Number of tokens of example `index`, end token included."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def input_ids(self, index: int) -> npt.NDArray[np.int32]:
        """Tokens of example `index`, shape (length,): a view, not a copy."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def num_label_tokens(self, index: int) -> int:
        """Number of tokens of example `index` that are predicted: answer and end token.

        The first token of a sequence is never predicted, even where the prompt is empty.
        """
        return self.length(index) - max(1, int(self.prompt_lengths[index]))


def render_prompt(template: str, instruction: str) -> str:
    """The prompt as text."""
    # Not str.format: other braces in the template, and all in the instruction, are text.
    return template.replace("{instruction}", instruction)


def warn_of_template(template: str) -> None:
    """Warn of a template in which a line break was meant, and two characters were written."""
    if r"\n" in template:
        _logger.warning(
            r"data.template has a backslash and the letter n, not a line break: where one is meant, write \n between "
            "double quotes in YAML, or the template in several lines after |"
        )


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, owner: str
) -> TokenizedExamples:
    """Tokenize the examples, in order, without those longer than `max_length`; `owner` names the client in messages.

    Raises DataError where the tokenizer has no end token or no example fits.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{owner}: the tokenizer has no end token: set eos_token in the model's tokenizer_config.json")
    eos = int(tokenizer.eos_token_id)
    prompts = tokenize_prompts([example.instruction for example in examples], tokenizer, template)
    answers = _tokenize([example.output for example in examples], tokenizer, special_tokens=False, split_special=True)
    kept: list[npt.NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    longest = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        num_tokens = len(prompt) + len(answer) + 1
        longest = max(longest, num_tokens)
        if num_tokens <= max_length:
            kept.append(np.array([*prompt, *answer, eos], dtype=np.int32))
            prompt_lengths.append(len(prompt))
    if not kept:
        raise DataError(
            f"{owner}: none of {len(examples)} examples fits into data.max_length {max_length}: "
            f"raise it (the longest example has {longest} tokens)"
        )
    return TokenizedExamples(
        tokens=np.concatenate(kept),
        offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int64),
        num_dropped=len(examples) - len(kept),
    )


def tokenize_prompts(instructions: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """Tokens of each instruction in the template: the same in training and at inference.

    Special tokens that the template spells are such; what an instruction spells is text.
    """
    texts = [render_prompt(template, instruction) for instruction in instructions]
    # Without what the tokenizer adds: an end token, which some add, would make the model stop before the answer.
    prompts = _tokenize(texts, tokenizer, special_tokens=False)
    begin = _begin_tokens(tokenizer)
    special_texts = _special_texts(tokenizer)
    for i, instruction in enumerate(instructions):
        if any(text in instruction for text in special_texts):
            prompts[i] = _tokenize_apart(template, instruction, tokenizer)
        if prompts[i][: len(begin)] != begin:  # else the template spells it
            prompts[i] = [*begin, *prompts[i]]
    return prompts


def _begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, such as BOS."""
    text = "a"
    (bare,) = _tokenize([text], tokenizer, special_tokens=False)
    (whole,) = _tokenize([text], tokenizer, special_tokens=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """All texts that the tokenizer reads as special tokens, also those that have no role of their own."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return texts | set(tokenizer.all_special_tokens)


def _tokenize_apart(template: str, instruction: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The template's parts, and between them the instruction, in which nothing is special."""
    (inside,) = _tokenize([instruction], tokenizer, special_tokens=False, split_special=True)
    first, *others = _tokenize(template.split("{instruction}"), tokenizer, special_tokens=False)
    prompt = list(first)
    for part in others:
        prompt += [*inside, *part]
    return prompt


def load_or_tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, owner: str
) -> TokenizedExamples:
    """Tokenize the examples, or read their tokens from a cache in <cache_dir>/tokens, safe to share among processes.

    A damaged file is rebuilt and an unusable cache folder only warned about. Raises DataError where the tokenizer has
    no end token or no example fits.
    """
    file_name = _cache_key(examples, tokenizer, config) + ".safetensors"
    try:
        path = expand(config.cache_dir, "data.cache_dir") / "tokens" / file_name
        cached = _read_cache(path)
    except (OSError, ConfigError) as error:  # ConfigError: "~" where the user has no home folder
        # The cache only saves time, so a job does not end for want of it.
        _logger.warning("data.cache_dir %s cannot be read (%s): tokenising again", config.cache_dir, error)
        return tokenize_examples(examples, tokenizer, config.template, config.max_length, owner)
    if cached is not None:
        return cached
    tokenized = tokenize_examples(examples, tokenizer, config.template, config.max_length, owner)
    try:
        _write_cache(path, tokenized)
    except OSError as error:
        _logger.warning("data.cache_dir %s cannot be written (%s): tokens are not kept", config.cache_dir, error)
    return tokenized


def _tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool, split_special: bool = False
) -> list[list[int]]:
    """Tokens of each text.

    Args:
        special_tokens: add the tokenizer's own, such as BOS.
        split_special: special tokens that a text spells are text.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = list(texts[start : start + _TEXTS_PER_CALL])
        encoded = tokenizer(
            chunk,
            add_special_tokens=special_tokens,
            split_special_tokens=split_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no "longer than the model's maximum" lines: max_length decides here
        )
        ids.extend(encoded["input_ids"])
    return ids


def _cache_key(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Checksum of all that the tokens depend on, and of nothing else: a tokenizer that was moved keeps its cache."""
    identity = [type(tokenizer).__name__, _rules(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    texts = [[example.instruction, example.output] for example in examples]
    content = json.dumps([_LAYOUT_VERSION, identity, config.template, config.max_length, texts])
    return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=1)
def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as text. That is megabytes, so it is written once for all clients."""
    # Any call without padding resets the padding and truncation that an earlier call left in the fast tokenizer,
    # which otherwise would be part of its text form and change the key.
    tokenizer("")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python, without the library's fast one behind it
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return str(backend.to_str())


def _to_arrays(tokenized: TokenizedExamples) -> dict[str, npt.NDArray[np.generic]]:
    """The fields as arrays, and their checksum under `sha256`."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "tokens": tokenized.tokens,
        "offsets": tokenized.offsets,
        "prompt_lengths": tokenized.prompt_lengths,
        "num_dropped": np.array([tokenized.num_dropped]),
    }
    # safetensors has no checksum of its own: a flipped bit would train on a wrong token, unseen.
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return {**arrays, "sha256": np.frombuffer(digest.digest(), dtype=np.uint8)}


def _read_cache(path: Path) -> TokenizedExamples | None:
    """Tokens that `_write_cache` wrote; None where there is no file, or a damaged one."""
    try:
        stored = safetensors.numpy.load(path.read_bytes())
        num_dropped = int(stored["num_dropped"][0])
        cached = TokenizedExamples(stored["tokens"], stored["offsets"], stored["prompt_lengths"], num_dropped)
        if np.array_equal(_to_arrays(cached)["sha256"], stored["sha256"]):
            return cached
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, KeyError, IndexError, ValueError, TypeError):
        pass  # damaged, as a wrong checksum
    _logger.warning("%s is damaged: tokenising again", path)
    return None


def _write_cache(path: Path, tokenized: TokenizedExamples) -> None:
    """Write under another name, then rename: a reader sees all or nothing, whoever else writes or dies.

    Tokens are as good as the texts: only their owner may read them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(0o600)
        temporary.write_bytes(safetensors.numpy.save(_to_arrays(tokenized)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
