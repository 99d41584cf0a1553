"""The planner's numbers: parameters against the real models on the meta device, memory against measured peaks."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_ds.errors import ModelError
from dpa_ds.planning.memory import Layout, step_bytes
from dpa_ds.planning.shapes import PRESETS, Shape, read_shape


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("llama")])
def test_parameters_are_those_of_the_model(name: str) -> None:
    shape = PRESETS[name]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_lora_parameters() -> None:
    assert PRESETS["llama-7b"].lora_parameters(8, ["q_proj", "v_proj"]) == 32 * 2 * 8 * (4096 + 4096)
    with pytest.raises(ModelError, match="c_attn"):
        PRESETS["llama-7b"].lora_parameters(8, ["c_attn"])


# Bytes of `measure` of benchmarks/memory.py on 2 ranks, dropout 0, the JSONs of ds_configs/ at 5265d4e.
MEASURED = [
    (0, "fp32", False, 83180980),
    (1, "fp32", False, 267890500),
    (2, "fp32", False, 467861828),
    (3, "fp32", False, 314332501),
    (0, "bf16", False, 51807252),
    (1, "bf16", False, 51635040),
    (2, "bf16", False, 237634884),
    (3, "bf16", False, 161915241),
    (0, "fp32", True, 42328132),
    (3, "fp32", True, 268985125),
]


@pytest.mark.parametrize(("stage", "precision", "checkpointing", "measured"), MEASURED)
def test_measured_peaks(stage: int, precision: str, checkpointing: bool, measured: int) -> None:
    shape = Shape(256, 6, 8, 4, 688, 4000, 32)
    layout = Layout(stage, 2, precision, 512, 256, checkpointing, 50_000_000, overlap=stage == 2)
    trained = shape.lora_parameters(8, ["q_proj", "v_proj"])
    assert sum(step_bytes(shape, trained, layout).values()) == pytest.approx(measured, rel=0.1)


def test_an_unknown_model_is_one_error() -> None:
    with pytest.raises(ModelError, match="llama-7b"):
        read_shape("nowhere", None)
    with pytest.raises(ModelError, match="no such preset"):
        read_shape("nowhere", "gpt-5")
