"""Turns examples into tokens, once, by an `ExampleFormat`, and keeps them in a cache."""

import hashlib
import json
import logging
import os
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from dpa_ds.config.paths import expand
from dpa_ds.config.schema import DataConfig
from dpa_ds.data.formats import ExampleFormat
from dpa_ds.data.sources import Example, digests_of
from dpa_ds.data.tokens import Encoded, encode_plain_texts
from dpa_ds.errors import ConfigError, DataError

# Part of the cache key: raise it whenever the layout of an example or of the file changes.
_LAYOUT_VERSION = 6

# Examples that are tokenised at once: enough for the tokenizer's threads, small enough not to show in memory.
_EXAMPLES_AT_A_TIME = 1024

_DTYPES = {"int32": "I32", "int64": "I64", "uint8": "U8"}
"""numpy's name of a type -> that of safetensors."""

_logger = logging.getLogger("dpa_ds")


@dataclass(frozen=True, eq=False)
class TokenizedExamples:
    """Tokens of n examples in one flat array: four bytes a token, however many examples there are."""

    tokens: npt.NDArray[np.int32]
    """Shape (total tokens,): all examples, one after the other."""
    offsets: npt.NDArray[np.int64]
    """Shape (n + 1,): example i is tokens[offsets[i] : offsets[i + 1]]."""
    spans: npt.NDArray[np.int32]
    """Shape (number of spans, 2): [start, stop) of the tokens to be predicted, counted from the start of their example;
    ascending. That of a plain text begins at 0."""
    span_offsets: npt.NDArray[np.int64]
    """Shape (n + 1,): example i has spans[span_offsets[i] : span_offsets[i + 1]], one for each answer."""
    num_dropped: int
    """Number of examples that were left out because they are longer than data.max_length."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    def length(self, index: int) -> int:
        """Number of tokens of example `index`, end token included."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def input_ids(self, index: int) -> npt.NDArray[np.int32]:
        """Tokens of example `index`, shape (length,): a view, not a copy."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def label_spans(self, index: int) -> npt.NDArray[np.int32]:
        """Spans of example `index`, shape (number of them, 2), without the first token, before which nothing stands."""
        spans = self.spans[self.span_offsets[index] : self.span_offsets[index + 1]]
        return np.maximum(spans, 1)

    def num_label_tokens(self, index: int) -> int:
        """Number of tokens of example `index` that are predicted: answers with their end tokens."""
        spans = self.label_spans(index)
        return int((spans[:, 1] - spans[:, 0]).sum())

    def first_label(self, index: int) -> int:
        """Position of the first token of example `index` that is predicted."""
        return int(self.label_spans(index)[0, 0])

    def prompt(self, index: int) -> npt.NDArray[np.int32]:
        """The tokens before the last answer of example `index`; all tokens of a plain text, which has no prompt."""
        start = int(self.spans[self.span_offsets[index + 1] - 1, 0])
        return self.input_ids(index)[:start] if start > 0 else self.input_ids(index)


def warn_of_template(template: str) -> None:
    """Warn of a template in which a line break was meant, and two characters were written."""
    if r"\n" in template:
        _logger.warning(
            r"data.template has a backslash and the letter n, not a line break: where one is meant, write \n between "
            "double quotes in YAML, or the template in several lines after |"
        )


def tokenize_examples(
    examples: Sequence[Example], example_format: ExampleFormat, max_length: int, owner: str
) -> TokenizedExamples:
    """Tokenize the examples, in order, without those longer than `max_length`; `owner` names the client in messages.

    Of a plain text that is longer several examples are made, and none is left out.

    Raises:
        DataError: an example does not fit the format, or none fits `max_length`.
    """
    # Arrays that grow where they are: four bytes a token, and no second copy at the end.
    tokens = array("i")
    lengths = array("q")
    spans = array("i")
    num_spans = array("q")
    num_dropped = 0
    longest = 0
    for encoded in _encode_chunks(examples, example_format, max_length):
        for one in encoded:
            longest = max(longest, len(one.tokens))
            if len(one.tokens) > max_length:
                num_dropped += 1
                continue
            tokens.extend(one.tokens)
            lengths.append(len(one.tokens))
            for span in one.spans:
                spans.extend(span)
            num_spans.append(len(one.spans))
    if not lengths:
        raise DataError(
            f"{owner}: none of {len(examples)} examples fits into data.max_length {max_length}: "
            f"raise it (the longest example has {longest} tokens)"
        )
    return TokenizedExamples(
        tokens=np.frombuffer(tokens, dtype=np.int32),
        offsets=_starts_of(lengths),
        spans=np.frombuffer(spans, dtype=np.int32).reshape(-1, 2),
        span_offsets=_starts_of(num_spans),
        num_dropped=num_dropped,
    )


def _starts_of(lengths: "array[int]") -> npt.NDArray[np.int64]:
    """Where each part of these lengths begins, and the end of the last."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.frombuffer(lengths, dtype=np.int64), out=starts[1:])
    return starts


def encode_example(example: Example, example_format: ExampleFormat, max_length: int) -> list[Encoded]:
    """The tokens of one example; a plain text that is longer than `max_length` becomes several.

    Raises:
        DataError: it does not fit the format.
    """
    (encoded,) = _encode_chunks([example], example_format, max_length)
    return encoded


def _encode_chunks(
    examples: Sequence[Example], example_format: ExampleFormat, max_length: int
) -> Iterator[list[Encoded]]:
    """The tokens of the examples in their order, some at a time."""
    for start in range(0, len(examples), _EXAMPLES_AT_A_TIME):
        chunk = examples[start : start + _EXAMPLES_AT_A_TIME]
        answered = iter(example_format.encode([example for example in chunk if not example.is_plain_text]))
        texts = [example.output for example in chunk if example.is_plain_text]
        plain = iter(encode_plain_texts(texts, example_format.tokenizer, max_length))
        encoded: list[Encoded] = []
        for example in chunk:
            if example.is_plain_text:
                encoded += next(plain)
            else:
                encoded.append(next(answered))
        yield encoded


def load_or_tokenize(
    examples: Sequence[Example], example_format: ExampleFormat, config: DataConfig, owner: str
) -> TokenizedExamples:
    """Tokenize the examples, or read their tokens from a cache in <cache_dir>/tokens, safe to share among processes.

    A damaged file is rebuilt and an unusable cache folder only warned about. Raises DataError as `tokenize_examples`.
    """
    file_name = _cache_key(examples, example_format, config.max_length) + ".safetensors"
    try:
        path = expand(config.cache_dir, "data.cache_dir") / "tokens" / file_name
        cached = _read_cache(path)
    except (OSError, ConfigError) as error:  # ConfigError: "~" where the user has no home folder
        # The cache only saves time, so a job does not end for want of it.
        _logger.warning("data.cache_dir %s cannot be read (%s): tokenising again", config.cache_dir, error)
        return tokenize_examples(examples, example_format, config.max_length, owner)
    if cached is not None:
        return cached
    tokenized = tokenize_examples(examples, example_format, config.max_length, owner)
    try:
        _write_cache(path, tokenized)
    except OSError as error:
        _logger.warning("data.cache_dir %s cannot be written (%s): tokens are not kept", config.cache_dir, error)
    return tokenized


def _cache_key(examples: Sequence[Example], example_format: ExampleFormat, max_length: int) -> str:
    """Checksum of all that the tokens depend on, and of nothing else: a tokenizer that was moved keeps its cache."""
    tokenizer = example_format.tokenizer
    identity = [type(tokenizer).__name__, _rules(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps([_LAYOUT_VERSION, identity, example_format.identity, max_length]).encode())
    # Known since the rows were looked at: no further pass over a million of them.
    digest.update(digests_of(examples).data)
    return digest.hexdigest()


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
        "spans": tokenized.spans,
        "span_offsets": tokenized.span_offsets,
        "num_dropped": np.array([tokenized.num_dropped]),
    }
    # safetensors has no checksum of its own: a flipped bit would train on a wrong token, unseen.
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)  # no copy: it may be gigabytes
    return {**arrays, "sha256": np.frombuffer(digest.digest(), dtype=np.uint8)}


def _read_cache(path: Path) -> TokenizedExamples | None:
    """Tokens that `_write_cache` wrote; None where there is no file, or a damaged one."""
    try:
        stored = safetensors.numpy.load_file(path)
        num_dropped = int(stored["num_dropped"][0])
        cached = TokenizedExamples(
            stored["tokens"], stored["offsets"], stored["spans"], stored["span_offsets"], num_dropped
        )
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
        with temporary.open("wb") as file:
            _write_safetensors(file, _to_arrays(tokenized))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_safetensors(file: IO[bytes], arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """The format's header, then each array as it is in memory: the library makes two copies of all on the way."""
    header: dict[str, Any] = {}
    start = 0
    for name, values in arrays.items():
        stop = start + values.nbytes
        header[name] = {"dtype": _DTYPES[values.dtype.name], "shape": values.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    for values in arrays.values():
        file.write(np.ascontiguousarray(values).data)
