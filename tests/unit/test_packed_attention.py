"""A row of several examples gives each the logits and gradients that it has alone."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpa_ds.data.batching import MicroBatch
from dpa_ds.engine import varlen_attention
from dpa_ds.engine.packed_attention import Kernel, PackedAttention, choose_kernel, takes_packed_rows

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MODELS = {
    "llama": lambda how: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=how)),
    "qwen2": lambda how: Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation=how)),
    "mistral, window 4": lambda how: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=4, attn_implementation=how)
    ),
    "gpt2": lambda how: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, attn_implementation=how)
    ),
}
SEGMENTS = ((3, 5), (1, 2), (2, 9))
"""Two rows of the last segment are 9 and 7 tokens long: the second is padded."""


def micro_batch(row: torch.Tensor, segments: tuple[tuple[int, int], ...], prefix: int = 0) -> MicroBatch:
    sizes = [length for rows, length in segments for _ in range(rows)]
    positions = [torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in sizes)]
    return MicroBatch(row, torch.cat(positions), row, segments, prefix)


def run(model: PreTrainedModel, batch: MicroBatch, kernel: Kernel | None = None) -> torch.Tensor:
    packing = PackedAttention(model, kernel)
    with packing:
        return model(
            input_ids=batch.input_ids[None],
            use_cache=False,
            **packing.arguments(batch, torch.device("cpu")),
        ).logits[0]


def build(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name](attention).eval()


def gradient(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_examples_in_a_row_do_not_see_one_another(name: str, attention: str) -> None:
    model = build(name, attention)
    lengths = [length for rows, length in SEGMENTS for _ in range(rows)]
    row = torch.randint(50, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    real = torch.ones(len(row), dtype=torch.bool)
    real[-2:] = False
    packed = run(model, micro_batch(row, SEGMENTS))[real]
    packed_gradient = gradient(model, packed)
    examples = [*row.split(lengths)[:-1], row[-9:-2]]
    alone = torch.cat([model(input_ids=one[None], use_cache=False).logits[0] for one in examples])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient(model, alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_is_before_every_example(name: str) -> None:
    """Logits of the examples, and gradients of all that they depend on; window 4 is shorter than the prefix."""
    model, prefix = build(name, "sdpa"), 6
    assert PackedAttention(model).supports_prefix
    lengths = [length for rows, length in SEGMENTS for _ in range(rows)]
    row = torch.randint(50, (prefix + sum(lengths),), generator=torch.Generator().manual_seed(2))
    together = run(model, micro_batch(row, SEGMENTS, prefix))[prefix:]
    gradient_together = gradient(model, together)
    examples = [torch.cat([row[:prefix], own]) for own in row[prefix:].split(lengths)]
    alone = torch.cat([model(input_ids=one[None], use_cache=False).logits[0, prefix:] for one in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient_together, gradient(model, alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_attention_takes_no_prefix(attention: str) -> None:
    model = build("llama", "eager")
    model.config._attn_implementation = attention  # flash_attention_2 cannot run here
    assert not PackedAttention(model).supports_prefix
    with pytest.raises(AssertionError):
        PackedAttention(model).arguments(micro_batch(torch.arange(41), SEGMENTS, 6), torch.device("cpu"))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 compiles again for other segments")
def test_compiled_layers_are_not_compiled_again_for_other_segments() -> None:
    model, plain = build("llama", "sdpa"), build("llama", "sdpa")
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    for segments, prefix in ((SEGMENTS, 0), (((2, 7),), 3), (((1, 4), (2, 6), (3, 5)), 2), (((4, 3),), 0)):
        row = torch.randint(50, (prefix + sum(rows * length for rows, length in segments),))
        batch = micro_batch(row, segments, prefix)
        with torch._dynamo.config.patch(error_on_recompile=segments != SEGMENTS):
            compiled = run(model, batch)
        torch.testing.assert_close(compiled, run(plain, batch), rtol=1e-4, atol=1e-5)


def emulated_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A stand-in for torch's kernel, which needs a GPU: what its documentation says, sequence by sequence."""
    outputs = []
    for k in range(len(cu_seq_q) - 1):
        queries = query[cu_seq_q[k] : cu_seq_q[k + 1]].transpose(0, 1)
        keys = key[cu_seq_k[k] : cu_seq_k[k + 1]].transpose(0, 1)
        values = value[cu_seq_k[k] : cu_seq_k[k + 1]].transpose(0, 1)
        assert queries.shape[1] <= max_q
        assert keys.shape[1] <= max_k
        # The mask is aligned with the last query and the last key.
        place = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1]
        distance = place - torch.arange(keys.shape[1])
        left, right = window_size
        mask = distance >= -right
        if left >= 0:
            mask &= distance <= left
        one = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(one.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("shares_key_heads", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("prefix", [0, 6])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, window 4"])
def test_one_call_computes_what_segments_do(
    name: str, prefix: int, shares_key_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", emulated_varlen_attn)
    monkeypatch.setattr(varlen_attention, "_SHARES_KEY_HEADS", shares_key_heads)
    model = build(name, "sdpa")
    num_tokens = prefix + sum(rows * length for rows, length in SEGMENTS)
    row = torch.randint(50, (num_tokens,), generator=torch.Generator().manual_seed(3))
    batch = micro_batch(row, SEGMENTS, prefix)
    in_segments = run(model, batch, "segments")
    gradient_in_segments = gradient(model, in_segments)
    at_once = run(model, batch, "varlen")
    torch.testing.assert_close(at_once, in_segments, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(model, at_once), gradient_in_segments, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_copied_prefix_is_that_of_plain_indexing() -> None:
    borders = varlen_attention.find_borders(micro_batch(torch.arange(41), SEGMENTS, 6), torch.device("cpu"))
    assert borders.copies is not None
    row = torch.randn(41, 2, 3, dtype=torch.float64, requires_grad=True)
    gathered = varlen_attention._copy_prefix(row, borders.copies)
    assert torch.equal(gathered, row[borders.copies.source])
    weights = torch.randn_like(gathered)
    (ours,) = torch.autograd.grad((gathered * weights).sum(), row)
    (plain,) = torch.autograd.grad((row[borders.copies.source] * weights).sum(), row)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "changes", "kernel"),
    [
        ("cuda", torch.bfloat16, (9, 0), {}, "varlen"),
        ("cuda", torch.float16, (8, 0), {}, "varlen"),
        ("cuda", torch.float32, (9, 0), {}, "segments"),
        ("cuda", torch.bfloat16, (7, 5), {}, "segments"),
        ("cuda", torch.bfloat16, (9, 0), {"head_dim": 12}, "segments"),
        ("cpu", torch.bfloat16, (9, 0), {}, "segments"),
    ],
)
def test_the_kernel_fits_the_device(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    changes: dict[str, float],
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is a stand-in: there is no GPU here."""
    model = build("llama", "sdpa").to(dtype)
    for name, value in changes.items():
        setattr(model.config, name, value)
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_kernel(model) == kernel
    batching = PackedAttention(model).batching(64, pad_id=0)
    assert batching.prefix_sharing
    assert batching.segment_overhead == (0 if kernel == "varlen" else 8)


def test_outside_the_context_the_model_answers_as_before() -> None:
    model = build("llama", "sdpa")
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    before = model(input_ids=ids, attention_mask=mask).logits
    with pytest.raises(ZeroDivisionError), PackedAttention(model):
        _ = 1 / 0
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_flash_attention_gets_the_borders_of_rows() -> None:
    model = build("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"  # it cannot run here
    given = PackedAttention(model).arguments(micro_batch(torch.arange(35), SEGMENTS), torch.device("cpu"))
    assert given["cu_seq_lens_q"].tolist() == [0, 5, 10, 15, 17, 26, 35]
    assert (given["cu_seq_lens_k"].dtype, given["max_length_q"]) == (torch.int32, 9)


def test_a_model_with_attention_of_its_own_keeps_it() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50))
    assert not takes_packed_rows(model)
    with PackedAttention(model):
        assert model.config._attn_implementation == "eager"
