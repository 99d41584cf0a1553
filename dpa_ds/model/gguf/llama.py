"""Converts LLaMA files with a known GPT-2-type tokenizer to a Hugging Face directory without transformers' reader.

Loading such a file with transformers gives the same weights, but (transformers 5.17) the wrong end token, no pad
token, and a tokenizer that keeps numbers together.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpa_ds.errors import ModelError
from dpa_ds.model.gguf.file import GgufFile, special_ids

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
"""Pre-tokenizers that are read directly (`tokenizer.ggml.pre`), and whether every digit is a token of its own before
GPT-2's regular expression."""


def is_readable(file: GgufFile) -> bool:
    """Whether `write_llama` can read the file: known architecture and tokenizer, plain rotary embeddings."""
    if file.require("general.architecture") != "llama":
        return False
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or _pre_tokenizer_name(file) not in SPLITS_DIGITS:
        return False
    # Scaled rotary embeddings (Llama 3.1 onwards) come as a tensor of their own or as rope.scaling keys.
    has_scale_tensor = any(tensor.name == "rope_freqs.weight" for tensor in file.tensors)
    has_scale_key = any(key.startswith("llama.rope.scaling.") for key in file.metadata)
    return not has_scale_tensor and not has_scale_key


def write_llama(file: GgufFile, out_dir: Path, dtype: torch.dtype) -> None:
    """Fill the empty `out_dir` with config, tokenizer and weights in `dtype`. Raises ModelError for other files."""
    config = _llama_config(file, dtype)
    _check_complete(file, config)
    config.save_pretrained(out_dir)
    generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    generation_config.save_pretrained(out_dir)
    _gpt2_tokenizer(file).save_pretrained(out_dir)
    _write_weights(file, config, out_dir, dtype)


def _check_complete(file: GgufFile, config: LlamaConfig) -> None:
    """Raise ModelError if the file lacks a tensor of the model that its metadata describe."""
    with torch.device("meta"):  # names without memory
        expected = dict(LlamaForCausalLM(config).named_parameters())  # those that are tied once
    there = {_hf_name(file, tensor.name) for tensor in file.tensors}
    for name in expected:
        if name not in there:
            raise ModelError(f"{file.path}: has no tensor for {name!r}: it is incomplete; download it again")


def _llama_config(file: GgufFile, dtype: torch.dtype) -> LlamaConfig:
    """Config of a `llama` file; where the metadata name no vocabulary size, it is the number of tokens."""
    num_heads = file.require("llama.attention.head_count")
    hidden_size = file.require("llama.embedding_length")
    ids = special_ids(file)
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
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )


def _shortest_float(value: float) -> float:
    """The decimal number that a float32 was written from: 9.999999747378752e-06 becomes 1e-05."""
    return float(str(np.float32(value)))


def _gpt2_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the file's own tokens and merges."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    ids = special_ids(file)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(file)))
    tokenizer.pre_tokenizer = _pre_tokenizer(file)
    tokenizer.decoder = decoders.ByteLevel()
    if ids.bos is not None and file.metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = tokens[ids.bos]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids.bos)])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _add_tokens(tokenizer, file)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=None if ids.unknown is None else tokens[ids.unknown],
        bos_token=None if ids.bos is None else tokens[ids.bos],
        eos_token=tokens[ids.eos],
        pad_token=tokens[ids.pad],
        model_max_length=file.require("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    return fast


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = []
    for pair in file.require("tokenizer.ggml.merges"):
        left, right = pair.split(" ", 1)
        merges.append((left, right))
    return merges


def _pre_tokenizer_name(file: GgufFile) -> str:
    return str(file.metadata.get("tokenizer.ggml.pre", "default"))


def _pre_tokenizer(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if not SPLITS_DIGITS[_pre_tokenizer_name(file)]:
        return byte_level
    # First the digits: GPT-2's regular expression keeps a whole number together.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _add_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    """Tokens that are never split: control tokens, left out of decoded text, and then the user's own."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.metadata.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    control = []
    user_defined = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == gguf.TokenType.CONTROL:
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == gguf.TokenType.USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)


def _write_weights(file: GgufFile, config: LlamaConfig, out_dir: Path, dtype: torch.dtype) -> None:
    """De-quantise and write shard by shard, so that memory holds one; with an index if there are several."""
    shards = list(_shards(file.tensors, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        shard_name = WEIGHTS_NAME
        if len(shards) > 1:
            shard_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for tensor in tensors:
            weights[_hf_name(file, tensor.name)] = _weight(tensor, config).to(dtype)
        save_file(weights, out_dir / shard_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, shard_name))
    if len(shards) > 1:
        num_elements = sum(int(tensor.n_elements) for tensor in file.tensors)
        total_size = num_elements * dtype.itemsize
        index_text = json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2)
        (out_dir / WEIGHTS_INDEX_NAME).write_text(index_text + "\n", encoding="utf-8")


def _shards(tensors: Sequence[gguf.ReaderTensor], bytes_per_element: int) -> Iterator[list[gguf.ReaderTensor]]:
    """Runs of tensors of at most MAX_SHARD_BYTES once de-quantised; a larger tensor is a shard of its own."""
    shard: list[gguf.ReaderTensor] = []
    shard_bytes = 0
    for tensor in tensors:
        num_bytes = int(tensor.n_elements) * bytes_per_element
        if shard and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard = []
            shard_bytes = 0
        shard.append(tensor)
        shard_bytes += num_bytes
    yield shard


def _hf_name(file: GgufFile, name: str) -> str:
    """The name in transformers: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
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

    `weight` has shape (num_heads * head_dim, in_features), and so has the result.
    """
    num_pairs = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, num_pairs, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)
