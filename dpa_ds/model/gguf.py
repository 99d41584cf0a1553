"""GGUF files as plain Hugging Face directories: de-quantised weights, config and tokenizer, without a hub.

LLaMA files with a known GPT-2-type tokenizer are read directly. Loading one with transformers gives the same
weights, but (transformers 5.17) the wrong end token, no pad token, and a tokenizer that keeps numbers together.
Every other file goes through transformers, with the special tokens set from the file's own metadata.
"""

import json
import logging
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from dpa_ds.errors import ModelError

logger = logging.getLogger(__name__)

GGUF_MAGIC = b"GGUF"
MAX_SHARD_BYTES = 4 * 1024**3
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}
"""Pre-tokenizers read directly (`tokenizer.ggml.pre`): is every digit a token of its own before GPT-2's regex?"""


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key, and tensors as stored (quantised), memory-mapped."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[gguf.ReaderTensor]

    def require(self, key: str) -> Any:
        """Value of `key`. Raises ModelError if the file lacks it."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: the GGUF metadata lack {key}: convert the model to GGUF again")
        return self.metadata[key]


def convert_gguf(gguf_path: Path, out_dir: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write `gguf_path` as a Hugging Face directory that AutoModelForCausalLM and AutoTokenizer read.

    float32 holds the de-quantised weights exactly; a narrower `dtype` rounds them once more. A complete `out_dir`
    is returned as it is. The directory appears whole or not at all, so several processes may convert at once.

    Raises ModelError for a file that is missing, damaged, or of an architecture that cannot be converted, and where
    `out_dir` holds something else.
    """
    if is_model_dir(out_dir):
        return out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists but is not a complete model directory: remove it, or name another")
    file = read_gguf(gguf_path)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_model_dir(file, partial_dir, dtype)
        _share(partial_dir)
        _rename_dir(partial_dir, out_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    logger.info("converted %s to %s", gguf_path, out_dir)
    return out_dir


def is_model_dir(path: Path) -> bool:
    """Whether `path` holds a config, weights and a tokenizer."""
    has_weights = (path / WEIGHTS_NAME).is_file() or (path / WEIGHTS_INDEX_NAME).is_file()
    return has_weights and (path / "config.json").is_file() and (path / "tokenizer.json").is_file()


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file. Raises ModelError if it is missing, truncated, or not a GGUF file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file: model.path must name a GGUF file that is there")
    with path.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(f"{path}: not a GGUF file (it does not begin with 'GGUF'): download it again")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: reader_field.contents() for key, reader_field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError, struct.error) as error:
        num_bytes = path.stat().st_size
        raise ModelError(
            f"{path}: truncated or damaged GGUF ({num_bytes:,} bytes; {error}): download it again"
        ) from error
    return GgufFile(path, metadata, reader.tensors)


def _write_model_dir(file: GgufFile, out_dir: Path, dtype: torch.dtype) -> None:
    """Fill the empty `out_dir`, directly where the file is one of those described above, else by transformers."""
    tokenizer_kind = (file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre", "default"))
    readable = tokenizer_kind[0] == "gpt2" and tokenizer_kind[1] in SPLITS_DIGITS
    # Scaled rotary embeddings (Llama 3.1 onwards) come as a tensor of their own or as rope.scaling keys.
    scaled = any(tensor.name == "rope_freqs.weight" for tensor in file.tensors) or any(
        key.startswith("llama.rope.scaling.") for key in file.metadata
    )
    if file.require("general.architecture") != "llama" or not readable or scaled:
        _write_by_transformers(file, out_dir, dtype)
        return
    config = _llama_config(file, dtype)
    config.save_pretrained(out_dir)
    GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(out_dir)
    _gpt2_tokenizer(file).save_pretrained(out_dir)
    _write_weights(file, config, out_dir, dtype)


def _llama_config(file: GgufFile, dtype: torch.dtype) -> LlamaConfig:
    """Config of a `llama` file; the vocabulary is the one of the tokens where the metadata do not say."""
    num_heads = file.require("llama.attention.head_count")
    hidden_size = file.require("llama.embedding_length")
    _, bos, eos, pad = _special_ids(file)
    return LlamaConfig(
        vocab_size=file.metadata.get("llama.vocab_size", len(file.require("tokenizer.ggml.tokens"))),
        hidden_size=hidden_size,
        intermediate_size=file.require("llama.feed_forward_length"),
        num_hidden_layers=file.require("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=file.metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=file.metadata.get("llama.rope.dimension_count", hidden_size // num_heads),
        max_position_embeddings=file.require("llama.context_length"),
        rms_norm_eps=_shortest_float(file.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest_float(file.metadata.get("llama.rope.freq_base", 10000.0)),
        },
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in file.tensors),
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )


def _shortest_float(value: float) -> float:
    """The decimal number a float32 was written from: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _special_ids(file: GgufFile) -> tuple[int | None, int | None, int, int]:
    """(unknown, begin, end, pad) token ids; the end token pads where the file names no pad token."""
    unknown, bos, eos, pad = (
        file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("unknown", "bos", "eos", "padding")
    )
    if eos is None:
        raise ModelError(f"{file.path}: the GGUF metadata name no end token (tokenizer.ggml.eos_token_id)")
    return unknown, bos, eos, eos if pad is None else pad


def _gpt2_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the file's own tokens and merges."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.metadata.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    merges = [(left, right) for left, right in (pair.split(" ", 1) for pair in file.require("tokenizer.ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if SPLITS_DIGITS[file.metadata.get("tokenizer.ggml.pre", "default")]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    unknown, bos, eos, pad = _special_ids(file)
    tokenizer.post_processor = (
        processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
        if bos is not None and file.metadata.get("tokenizer.ggml.add_bos_token", False)
        else processors.ByteLevel(trim_offsets=True)
    )
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token=None if unknown is None else tokens[unknown],
        bos_token=None if bos is None else tokens[bos],
        eos_token=tokens[eos],
        pad_token=tokens[pad],
        model_max_length=file.require("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    return fast


def _write_weights(file: GgufFile, config: LlamaConfig, out_dir: Path, dtype: torch.dtype) -> None:
    """De-quantise and write shard by shard, so that memory holds one; an index if there are several."""
    shards = list(_shards(file.tensors, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, start=1):
        shard_name = WEIGHTS_NAME if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weights = {_hf_name(file, tensor.name): _weight(tensor, config).to(dtype) for tensor in tensors}
        save_file(weights, out_dir / shard_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, shard_name))
    if len(shards) > 1:
        num_bytes = sum(int(tensor.n_elements) for tensor in file.tensors) * dtype.itemsize
        index_text = json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": weight_map}, indent=2)
        (out_dir / WEIGHTS_INDEX_NAME).write_text(index_text + "\n", encoding="utf-8")


def _shards(tensors: Sequence[gguf.ReaderTensor], bytes_per_element: int) -> Iterator[list[gguf.ReaderTensor]]:
    """Runs of tensors of at most MAX_SHARD_BYTES once de-quantised; a larger tensor is a shard of its own."""
    shard: list[gguf.ReaderTensor] = []
    shard_bytes = 0
    for tensor in tensors:
        num_bytes = int(tensor.n_elements) * bytes_per_element
        if shard and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, shard_bytes = [], 0
        shard.append(tensor)
        shard_bytes += num_bytes
    yield shard


def _hf_name(file: GgufFile, name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    raise ModelError(f"{file.path}: unexpected tensor {name} in a llama file: give a Hugging Face directory instead")


def _weight(tensor: gguf.ReaderTensor, config: LlamaConfig) -> torch.Tensor:
    """De-quantised float32 weight, (out_features, in_features) as in nn.Linear."""
    weight: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        weight = _unpermute(weight, config.num_attention_heads)
    elif tensor.name.endswith("attn_k.weight"):
        weight = _unpermute(weight, config.num_key_value_heads or config.num_attention_heads)
    return torch.from_numpy(np.array(weight, dtype=np.float32))


def _unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of rotary pairs: per head, (pair, half) rows become transformers' (half, pair).

    `weight`: (num_heads * head_dim, in_features), and so is the result.
    """
    num_pairs = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, num_pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_by_transformers(file: GgufFile, out_dir: Path, dtype: torch.dtype) -> None:
    """Load with transformers' own GGUF reader, de-quantised so that the model can be saved and trained."""
    folder, name = file.path.parent, file.path.name
    tokens = file.require("tokenizer.ggml.tokens")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{file.path}: architecture {file.require('general.architecture')!r} with tokenizer "
            f"{file.require('tokenizer.ggml.model')!r} cannot be converted ({error}): use a llama file with a gpt2 "
            "tokenizer, one that this version of transformers reads, or a Hugging Face directory"
        ) from error
    _, bos, eos, pad = _special_ids(file)
    tokenizer.eos_token, tokenizer.pad_token = tokens[eos], tokens[pad]
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = bos, eos, pad
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _share(directory: Path) -> None:
    """Let other users read what mkdtemp and safetensors make private: the cache may serve a whole cluster."""
    file_mode = (directory / "config.json").stat().st_mode
    for path in directory.iterdir():
        path.chmod(file_mode)
    directory.chmod(0o755)


def _rename_dir(source: Path, target: Path) -> None:
    """Rename a finished directory; keep `target` if another process has finished it meanwhile."""
    try:
        source.rename(target)
    except OSError as error:
        if not is_model_dir(target):
            raise ModelError(f"cannot write {target}: {error}") from error
