"""GGUF conversion, on a tiny LLaMA written by the test with llama.cpp's own layout."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpa_ds.config.schema import ModelConfig
from dpa_ds.errors import ModelError
from dpa_ds.model.base import resolve_model
from dpa_ds.model.gguf import llama
from dpa_ds.model.gguf.convert import convert_gguf
from dpa_ds.model.gguf.file import read_gguf

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTE_TOKENS = sorted(ByteLevel.alphabet())
MERGES = ["a b", "1 2", "Ġ ab"]
TOKENS = [*CONTROL_TOKENS, *BYTE_TOKENS, "ab", "12", "Ġab"]
NUM_HEADS, NUM_KV_HEADS = 4, 2
ROPE_THETA = 5000.0

HF_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=3e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def permute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """llama.cpp's convert_hf_to_gguf: (half, pair) rows of every head become (pair, half)."""
    head_dim = weight.shape[0] // num_heads
    return weight.reshape(num_heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    top_level = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in top_level:
        return f"{top_level[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{HF_TO_GGUF[part]}.weight"


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    arch: str = "llama",
    pre: str = "smollm",
    pad: int | None = 0,
    tensors_per_file: int = 0,
) -> None:
    """Write `model`; its v_proj weights as Q8_0 (and put the rounded values into `model`), all else as F32.

    With `tensors_per_file` in parts, named as llama.cpp's gguf-split names them.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_file)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL if token in CONTROL_TOKENS else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy().copy()
        if "q_proj" in name or "k_proj" in name:
            weight = permute(weight, NUM_HEADS if "q_proj" in name else NUM_KV_HEADS)
        if "v_proj" in name:
            quantised = gguf.quants.quantize(weight, q8_0)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(quantised, q8_0))
            writer.add_tensor(gguf_name(name), quantised, raw_dtype=q8_0)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def header(num_tensors: int, num_values: int, *rest: bytes) -> bytes:
    """Of a GGUF file of version 3."""
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + b"".join(rest)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def array(kind: int, num_elements: int) -> bytes:
    """A value of the metadata under the key `k`: an array that claims `num_elements` of type `kind`."""
    return text(b"k") + struct.pack("<IIQ", 9, kind, num_elements)


UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
CLAIMS = [
    ("numbers", header(0, 1, array(UINT32, 1 << 60)), "an array claims 1,152,921,504,606,846,976 elements"),
    (
        "fewer numbers",
        header(0, 1, array(UINT32, 1 << 20)),
        "an array of 1,048,576 elements claims 4,194,304 bytes where 0",
    ),
    ("texts", header(0, 1, array(STRING, 1 << 28)), "an array claims 268,435,456 elements, more than any model has"),
    ("fewer texts", header(0, 1, array(STRING, 1 << 20)), "a number claims 8 bytes where 0 are left"),
    ("arrays", header(0, 1, array(ARRAY, 1 << 20)), "an array has elements of the type 9"),
    (
        "a text",
        header(0, 1, text(b"k"), struct.pack("<IQ", STRING, 1 << 62)),
        "a text claims 4,611,686,018,427,387,904",
    ),
    ("a key", header(0, 1, struct.pack("<Q", 1 << 62)), "a key claims"),
    ("values", header(0, 1 << 60), "a number claims 8 bytes where 0 are left"),
    ("tensors", header(1 << 60, 0), "a number claims 8 bytes where 0 are left"),
    ("dimensions", header(1, 0, text(b"t"), struct.pack("<I", 1 << 31)), "a tensor claims 2147483648 dimensions"),
    ("an unknown type", header(0, 1, text(b"k"), struct.pack("<I", 99)), "a value has the unknown type 99"),
    (
        "bytes in the other order",
        b"GGUF" + struct.pack(">IQQ", 3, 1 << 60, 0),
        "a number claims 8 bytes where 0 are left",
    ),
]


@pytest.mark.parametrize(("claims", "content", "fault"), CLAIMS, ids=[claim[0] for claim in CLAIMS])
def test_counts_are_compared_with_the_size_of_the_file(claims: str, content: bytes, fault: str, tmp_path: Path) -> None:
    """Before memory is taken for what the header claims: the gguf package reads on past the end."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=rf"m.gguf: truncated or damaged GGUF \({len(content)} bytes; {fault}"
    ) as caught:
        read_gguf(path)
    assert str(caught.value).endswith(": download it again")


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    out_dir = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(out_dir)
    input_ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(converted(input_ids).logits, model(input_ids).logits)
    assert converted.config.rms_norm_eps == 3e-6
    assert converted.config.tie_word_embeddings is tied
    assert converted.dtype == torch.float32
    assert (converted.config.bos_token_id, converted.config.eos_token_id, converted.config.pad_token_id) == (1, 2, 0)
    assert converted.generation_config.eos_token_id == 2


def test_several_shards_hold_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.setattr(llama, "MAX_SHARD_BYTES", 20_000)
    out_dir = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", torch.bfloat16)
    assert len(list(out_dir.glob("model-*.safetensors"))) > 1
    converted = AutoModelForCausalLM.from_pretrained(out_dir)
    expected = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    weights = converted.state_dict()
    assert converted.dtype == torch.bfloat16
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("smollm", ["ab", "Ġab", "1", "2", "<|im_end|>"]), ("gpt-2", ["ab", "Ġab", "12", "<|im_end|>"])],
)
def test_tokenizer_round_trip(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre=pre, pad=None)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out"))
    assert tokenizer("ab ab12<|im_end|>").tokens() == tokens
    text = "ab, été\n\t 日本 2024 don't ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.decode(tokenizer("ab<|im_end|>").input_ids, skip_special_tokens=True) == "ab"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"


def test_an_unknown_pre_tokenizer_goes_through_transformers(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "tiny.gguf", model, pre="llama-bpe")
    out_dir = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    converted, tokenizer = AutoModelForCausalLM.from_pretrained(out_dir), AutoTokenizer.from_pretrained(out_dir)
    input_ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert converted.config.eos_token_id == 2


def test_a_complete_directory_is_kept_and_a_foreign_one_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    out_dir = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "models" / "out")
    (out_dir / "config.json").write_text(json.dumps({"mine": True}))
    assert convert_gguf(tmp_path / "tiny.gguf", out_dir) == out_dir
    assert json.loads((out_dir / "config.json").read_text()) == {"mine": True}
    assert [path.name for path in out_dir.parent.iterdir()] == ["out"]
    with pytest.raises(ModelError, match="remove it"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.parametrize("kept_bytes", [4, 100, 5_000, -1_000])
def test_a_truncated_file_is_named(tmp_path: Path, kept_bytes: int) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:kept_bytes])
    with pytest.raises(ModelError, match=r"cut\.gguf: truncated or damaged .*: download it again"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(ModelError, match=r"page\.gguf: not a GGUF file"):
        convert_gguf(tmp_path / "page.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match=r"none\.gguf: no such file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), arch="perceptron")
    with pytest.raises(ModelError, match=r"architecture 'perceptron' .* use a llama file"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.gguf"]


# ---- a model in several files ----------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> tuple[LlamaForCausalLM, list[Path]]:
    """A model in three files."""
    model = tiny_llama(tied=False)
    write_gguf(tmp_path / "tiny.gguf", model, tensors_per_file=8)
    found = sorted(tmp_path.glob("tiny-*.gguf"))
    assert [path.name for path in found] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return model, found


@pytest.mark.parametrize("named", [0, 1, 2])
def test_all_parts_of_a_split_file_are_read(
    parts: tuple[LlamaForCausalLM, list[Path]], tmp_path: Path, named: int
) -> None:
    """Whichever of them model.path names."""
    model, paths = parts
    directory = resolve_model(ModelConfig(path=str(paths[named])), str(tmp_path / "cache"))
    converted = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in converted.state_dict().items())
    assert resolve_model(ModelConfig(path=str(paths[0])), str(tmp_path / "cache")) == directory


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named_and_nothing_is_left(
    parts: tuple[LlamaForCausalLM, list[Path]], tmp_path: Path, missing: int
) -> None:
    _, paths = parts
    there = paths[0] if missing else paths[1]
    paths[missing].unlink()
    with pytest.raises(ModelError, match=rf"part . of 3 of a model, and .*/{paths[missing].name} is missing: put it"):
        resolve_model(ModelConfig(path=str(there)), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_parts_that_were_renamed_or_mixed_up(parts: tuple[LlamaForCausalLM, list[Path]], tmp_path: Path) -> None:
    _, (first, second, third) = parts
    renamed = first.with_name("model.gguf")
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"model.gguf: is part 1 of 3 of a model: name it NAME-00001-of-00003.gguf"):
        convert_gguf(renamed, tmp_path / "out")
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelError, match=r"tiny-00002-of-00003.gguf: is not part 2 of 3: download it again"):
        convert_gguf(first, tmp_path / "out")
    third.write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_a_split_file_that_transformers_would_read_in_part_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre="llama-bpe", tensors_per_file=10)
    with pytest.raises(ModelError, match=r"takes one file only: merge the parts with llama.cpp's gguf-split --merge"):
        convert_gguf(tmp_path / "tiny-00001-of-00002.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm"])
def test_a_file_that_lacks_a_tensor_is_incomplete(tmp_path: Path, pre: str) -> None:
    """transformers, which reads the first of them, warns, and draws it at random."""
    model = tiny_llama(tied=True)
    del model.model.layers[1].mlp.up_proj
    write_gguf(tmp_path / "tiny.gguf", model, pre=pre)
    with pytest.raises(ModelError, match=r"tiny.gguf: has no tensor for 'model.layers.1.mlp.up_proj.weight'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
