"""The planner's numbers: parameters against the real models on the meta device, memory against measured peaks."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import LlamaConfig, LlamaForCausalLM

from dpa_ds.errors import ModelError
from dpa_ds.planning.memory import Layout, model_bytes, step_bytes
from dpa_ds.planning.shapes import PRESETS, Shape, read_shape

main = runpy.run_path("launch/plan.py")["main"]


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


@pytest.mark.parametrize("ranks", [1, 8])
def test_frozen_weights_are_what_deepspeed_estimates(ranks: int) -> None:
    """Its estimators with the optimizer offloaded leave the 16-bit weights, and for stage 3 the largest layer with gradients."""
    shape = PRESETS["llama-13b"]
    largest = shape.vocab * shape.hidden
    _, whole = estimate_zero2_model_states_mem_needs(
        shape.parameters, ranks, 1, cpu_offload=True, additional_buffer_factor=1.0
    )
    assert model_bytes(shape, Layout(2, ranks))["base"] == whole
    _, divided, layer = estimate_zero3_model_states_mem_needs(
        shape.parameters,
        largest,
        ranks,
        1,
        cpu_offload=True,
        cpu_offload_params=False,
        zero_init=True,
        additional_buffer_factor=1.0,
    )
    planned = model_bytes(shape, Layout(3, ranks, reuse_distance=0, persistence=0))
    assert planned["base"] == pytest.approx(divided - layer, abs=8)
    assert planned["gathered"] == max(largest, shape.layer_parameters) * 2


ARGUMENTS = ["--config", "launch/recipes/paper.yaml", "--cluster", "nodes=1,gpus=8,gpu=h100-80g,net=400Gb"]


def test_the_command_ranks_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70B does not fit on one GPU, 7B does; then all clients train at once."""
    seven, seventy = (tmp_path / name for name in ("7b.json", "70b.json"))
    assert main([*ARGUMENTS, "--model", "llama-7b", "--json", str(seven)]) == 0
    assert (
        "the base fits on a GPU, and this is the fastest that fits: all clients train at once"
        in capsys.readouterr().out
    )
    assert main([*ARGUMENTS, "--model", "llama-70b", "--json", str(seventy)]) == 0
    assert "the base must be divided" in capsys.readouterr().out
    first = json.loads(seven.read_text())["ranked"][0]
    # 300 examples / 64 -> 5 steps an epoch, 10 epochs, 2 phases; 64 x 70 tokens x 4 N FLOPs, at 40 % of 989 TFLOP/s
    step = 64 * 70 * 4 * PRESETS["llama-7b"].parameters / (0.4 * 989e12)
    assert first["layout"]["ranks"] == 1
    assert first["round_seconds"] == pytest.approx(2 * 50 * step, rel=1e-6)
    first = json.loads(seventy.read_text())["ranked"][0]
    assert (first["layout"]["stage"], first["layout"]["ranks"]) == (3, 4)
    assert first["gather_bytes"] == pytest.approx(3 * 2 * PRESETS["llama-70b"].parameters * 3 / 4)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--cluster": "gpus=8,gpu=h100"}, "unknown gpu h100"),
        ({"--cluster": "nodes=0"}, "every number must be > 0"),
        ({"--cluster": "nodes=two"}, "write it like"),
        ({"--cluster": "cpus=2"}, "unknown key cpus"),
        ({"--json": "/dev/null/plan.json"}, "choose another file with --json"),
        ({"--cluster.ranks_per_group": "16"}, "--cluster has 8 GPUs"),
        ({"--model": "gpt-5"}, "no such preset"),
        ({"--config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"--lora.target_modules": "[c_attn]"}, "c_attn"),
    ],
)
def test_bad_arguments_are_one_line(changed: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {**dict(zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True)), "--model": "llama-7b", **changed}
    assert main([word for pair in arguments.items() for word in pair]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.parametrize(("precision", "measured"), [("fp32", 96.8e6), ("bf16", 58.6e6)])
def test_measured_peaks_with_dropout(precision: str, measured: float) -> None:
    """As above, with dropout 0.05 and stage 0."""
    shape = Shape(256, 6, 8, 4, 688, 4000, 32)
    layout = Layout(0, 2, precision, 512, 256, reduce_bucket=50_000_000, dropped=2 * 256)
    trained = shape.lora_parameters(8, ["q_proj", "v_proj"])
    assert sum(step_bytes(shape, trained, layout).values()) == pytest.approx(measured, rel=0.05)


def test_an_unknown_model_is_one_error() -> None:
    with pytest.raises(ModelError, match="llama-7b"):
        read_shape("nowhere", None)
    with pytest.raises(ModelError, match="no such preset"):
        read_shape("nowhere", "gpt-5")
