"""The chunked loss against torch's: values, gradients, memory, and heads of several kinds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from dpa_ds.data.batching import IGNORE_INDEX
from dpa_ds.engine import label_loss
from dpa_ds.engine.label_loss import cross_entropy_sum
from dpa_ds.planning import memory

LABELS, VOCAB = 37, 113


def plain(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def some_targets(num_labels: int = LABELS) -> torch.Tensor:
    targets = torch.randint(VOCAB, (num_labels,), generator=torch.Generator().manual_seed(1))
    targets[::5] = IGNORE_INDEX
    return targets


def some_logits(dtype: torch.dtype) -> torch.Tensor:
    logits = 4 * torch.randn(LABELS, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def loss_and_gradient(function: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # What is overwritten must not be the leaf, which the other function gets too.
    loss = function(logits.clone(), targets)
    (gradient,) = torch.autograd.grad(loss * 0.37, logits)
    return loss.detach(), gradient


@pytest.fixture(params=[1, 5, LABELS, 1000])
def rows_of_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_loss, "CHUNK_BYTES", request.param * VOCAB * 4)


@pytest.mark.usefixtures("rows_of_a_chunk")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # 16-bit gradients are the same fp32 numbers, rounded once: at most to the neighbouring number.
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
def test_loss_and_gradient_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    logits, targets = some_logits(dtype), some_targets()
    wanted_loss, wanted = loss_and_gradient(plain, logits, targets)
    loss, gradient = loss_and_gradient(cross_entropy_sum, logits, targets)
    assert gradient.dtype == dtype
    assert loss.dtype == wanted_loss.dtype
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=min(tolerance, 1e-8))
    assert not gradient[targets == IGNORE_INDEX].any()


def test_a_dummy_without_labels() -> None:
    logits = some_logits(torch.float32)
    loss, gradient = loss_and_gradient(cross_entropy_sum, logits, torch.full((LABELS,), IGNORE_INDEX))
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(("function", "least", "most"), [(cross_entropy_sum, 0.0, 0.1), (plain, 5.0, 7.0)])
def test_memory_beside_the_logits(function: Any, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most, in units of the 16-bit logits; torch's own takes 12 bytes where these have 2. As CUDA's allocator would
    see it, from the CPU's."""
    monkeypatch.setattr(label_loss, "CHUNK_BYTES", 8 * 4000 * 4)
    head = torch.randn(4000, 4).bfloat16()
    hidden = torch.randn(512, 4).bfloat16().requires_grad_()
    targets = torch.randint(4000, (512,))
    logits = F.linear(hidden, head)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(logits, targets).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    assert least <= highest / logits.nbytes <= most


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        LlamaConfig(**SIZES, tie_word_embeddings=False),
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
        GraniteConfig(**SIZES, logits_scaling=2.5),
        CohereConfig(**SIZES, logit_scale=0.3),
    ],
    ids=lambda config: f"{config.model_type}-{config.tie_word_embeddings}",
)
def test_heads_that_scale_or_cap_their_logits(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    input_ids, targets = torch.randint(VOCAB, (1, LABELS)), some_targets()
    found = []
    for function in (plain, cross_entropy_sum):
        model.zero_grad()
        function(model(input_ids).logits.flatten(0, 1), targets).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_logits_that_another_operation_keeps_are_an_error() -> None:
    """Else their gradient would be silently wrong: tanh keeps its own result for the backward pass."""
    logits = some_logits(torch.float32).tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy_sum(logits, some_targets()).backward()


def test_the_planner_counts_with_the_same_chunk() -> None:
    assert memory.LOSS_CHUNK_BYTES == label_loss.CHUNK_BYTES
