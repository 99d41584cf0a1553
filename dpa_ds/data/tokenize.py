"""Examples become tokens, once: template, end token, and where the prompt ends (the label mask).

An example is tokens(prompt) + tokens(answer) + [eos]. Prompt and answer are tokenised apart, so that the border is
exact and the prompt's tokens at inference are those seen in training.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from dpa_ds.config.schema import DataConfig
from dpa_ds.data.sources import Example
from dpa_ds.errors import DataError

# Part of the cache key: raise it whenever the layout of an example or of the file changes.
_LAYOUT_VERSION = 1

# Texts handed to the tokenizer in one call: enough for its threads, small enough not to show in memory.
_TEXTS_PER_CALL = 1024

_logger = logging.getLogger("dpa_ds")


@dataclass(frozen=True, eq=False)
class TokenizedExamples:
    """Tokens of n examples in one flat array; a few bytes per token whatever the number of examples."""

    tokens: npt.NDArray[np.int32]
    """(total tokens,) all examples, one after the other."""
    offsets: npt.NDArray[np.int64]
    """(n + 1,) example i is tokens[offsets[i] : offsets[i + 1]]."""
    prompt_lengths: npt.NDArray[np.int64]
    """(n,) tokens of the prompt; the rest of an example is the answer and the end token."""
    num_dropped: int
    """Examples longer than max_length, left out."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.prompt_lengths)

    def length(self, index: int) -> int:
        """Tokens of example `index`, end token included."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def input_ids(self, index: int) -> npt.NDArray[np.int32]:
        """(length,) tokens of example `index`, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def num_label_tokens(self, index: int) -> int:
        """Tokens of example `index` that are predicted: answer and end token, never the first of the sequence."""
        return self.length(index) - max(1, int(self.prompt_lengths[index]))


def render_prompt(template: str, instruction: str) -> str:
    """The prompt's text. Not str.format: braces in template and instruction are text."""
    return template.replace("{instruction}", instruction)


def tokenize_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, owner: str
) -> TokenizedExamples:
    """Tokens of all examples of at most `max_length` tokens, in order; `owner` names the client in messages.

    Raises DataError where the tokenizer has no end token or no example fits.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{owner}: the tokenizer has no end token: set eos_token in the model's tokenizer_config.json")
    eos = int(tokenizer.eos_token_id)
    prompts = tokenize_prompts([e.instruction for e in examples], tokenizer, template)
    answers = _tokenize([e.output for e in examples], tokenizer, special_tokens=False)
    kept: list[list[int]] = []
    prompt_lengths: list[int] = []
    longest = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = [*prompt, *answer, eos]
        longest = max(longest, len(sequence))
        if len(sequence) <= max_length:
            kept.append(sequence)
            prompt_lengths.append(len(prompt))
    if not kept:
        raise DataError(
            f"{owner}: none of {len(examples)} examples fits into data.max_length {max_length}: "
            f"raise it (the longest example has {longest} tokens)"
        )
    return TokenizedExamples(
        tokens=np.concatenate([np.array(sequence, dtype=np.int32) for sequence in kept]),
        offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int64),
        num_dropped=len(examples) - len(kept),
    )


def tokenize_prompts(instructions: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """Tokens of each instruction in the template: the same in training and at inference."""
    prompts = _tokenize([render_prompt(template, text) for text in instructions], tokenizer, special_tokens=True)
    # Some tokenizers end every text with eos; here it would tell the model to stop before the answer.
    return [prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt for prompt in prompts]


def load_or_tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig, owner: str
) -> TokenizedExamples:
    """`tokenize_examples` with a cache in <cache_dir>/tokens, safe to share among processes.

    A damaged file is rebuilt and an unusable cache folder only warned about. Raises DataError as
    `tokenize_examples` does.
    """
    key = _cache_key(examples, tokenizer, config)
    try:
        path = Path(config.cache_dir).expanduser() / "tokens" / f"{key}.safetensors"
        cached = _read_cache(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: "~" where the user has no home folder
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


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_PER_CALL]),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no "longer than the model's maximum" lines: max_length decides here
        )
        ids.extend(encoded["input_ids"])
    return ids


def _cache_key(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    identity = [type(tokenizer).__name__, _rules(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    texts = [[example.instruction, example.output] for example in examples]
    content = json.dumps([_LAYOUT_VERSION, identity, config.template, config.max_length, texts])
    return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=1)
def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as text: megabytes, so written once for all clients."""
    # Any call without padding resets the padding and truncation that an earlier call left in the fast tokenizer,
    # which otherwise would be part of its text form and change the key.
    tokenizer("")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _to_arrays(tokenized: TokenizedExamples) -> dict[str, npt.NDArray[np.generic]]:
    arrays = {f.name: np.atleast_1d(np.asarray(getattr(tokenized, f.name))) for f in fields(tokenized)}
    # safetensors has no checksum of its own: a flipped bit would train on a wrong token, unseen.
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).digest()
    return {**arrays, "sha256": np.frombuffer(digest, dtype=np.uint8)}


def _read_cache(path: Path) -> TokenizedExamples | None:
    """None where there is no file, or a damaged one."""
    try:
        stored = safetensors.numpy.load(path.read_bytes())
        cached = TokenizedExamples(
            stored["tokens"], stored["offsets"], stored["prompt_lengths"], int(stored["num_dropped"][0])
        )
        intact = bool(np.array_equal(_to_arrays(cached)["sha256"], stored["sha256"]))
    except FileNotFoundError:
        return None
    except (safetensors.SafetensorError, KeyError, IndexError, ValueError, TypeError):
        intact = False
    if not intact:
        _logger.warning("%s is damaged: tokenising again", path)
    return cached if intact else None


def _write_cache(path: Path, tokenized: TokenizedExamples) -> None:
    """A name of its own, then a rename: a reader sees all or nothing, whoever else writes or dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(safetensors.numpy.save(_to_arrays(tokenized)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
