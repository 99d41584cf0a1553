"""Quantised layers: whose numbers they give, what they keep, and which models are refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa_ds.config.schema import ModelConfig
from dpa_ds.errors import ConfigError, ModelError
from dpa_ds.model import quantization
from dpa_ds.model.base import load_base
from dpa_ds.model.gguf.convert import convert_gguf
from tests import families, plain, tiny
from tests.unit.test_gguf import tiny_llama, write_gguf

bitsandbytes = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, attention_bias=True)


def load(model: Path, kind: str, precision: Any = "fp32") -> Any:
    return load_base(ModelConfig(path=str(model), precision=precision, quantization=kind), model, {}, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_a_layer_of_8_bits_gives_the_bits_of_bitsandbytes_in_training(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    from dpa_ds.model.quantized_layers import Int8Linear

    torch.manual_seed(0)
    theirs = bitsandbytes.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False).to("cpu")
    ours = Int8Linear(theirs.weight.data.clone(), theirs.weight.SCB.clone(), None)
    found = []
    for layer in (ours, theirs.train()):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        result = layer(x)
        result.square().sum().backward()
        found.append((result, x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_and_evaluation_compute_the_same(model: Path, kind: str, precision: str) -> None:
    """Of bitsandbytes' own layers they do not on a CPU, and those of 4 bits stay changed."""
    base = load(model, kind, precision)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = base.train()(ids).logits
        assert torch.equal(base.eval()(ids).logits, expected)
        assert torch.equal(base.train()(ids).logits, expected)
        # A row's logits depend on no other row, but for rounding.
        alone = base.eval()(ids[:1]).logits
    torch.testing.assert_close(alone, expected[:1])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_a_quantised_base_are_those_that_it_has(model: Path, kind: str, precision: str) -> None:
    base = load(model, kind, precision)
    found = 0
    for parameter in base.parameters():
        found += parameter.numel() * parameter.itemsize
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            found += 4 * module.weight.quant_state.absmax.numel()
        elif hasattr(module, "scales"):
            found += 4 * module.scales.numel()
    assert found == quantization.base_bytes(model, base.dtype, kind)
    assert found < quantization.base_bytes(model, base.dtype, None)


def test_weights_without_finite_scales_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tiny.make_model(tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weight of 'model.layers.1.mlp.up_proj' of the base model has NaN"):
        load(directory, "int8")


@pytest.mark.parametrize(("stored", "message"), [
    ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, which needs the package gptqmodel"),
    ({"quant_method": "awq", "bits": 4}, "quantised by awq, which needs the package gptqmodel"),
    ({"quant_method": "compressed-tensors"}, "quantised by compressed-tensors, which needs the package compressed"),
    ({"quant_method": "something"}, "quantised by something, on whose layers adapters were never trained here"),
])  # fmt: skip
def test_other_methods_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], message: str
) -> None:
    directory = tiny.make_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for wanted in ("none", "int8"):
        with pytest.raises(ModelError, match=message):
            quantization.check_quantization(wanted, directory)


def store_as_fp8(directory: Path) -> dict[str, torch.Tensor]:
    """Rewrite the projections of a saved model as DeepSeek stores them, a scale for 128 x 128; what they then are."""
    from safetensors.torch import load_file, save_file

    file, stored, meant = directory / "model.safetensors", {}, {}
    for name, weight in load_file(file).items():
        stored[name] = meant[name] = weight
        if "proj" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            codes = (blocks / scales).to(torch.float8_e4m3fn)
            stored[name] = codes.view(rows, columns)
            stored[f"{name}_scale_inv"] = scales.view(rows // 128, columns // 128).clone()
            meant[name] = (codes.float() * scales).view(rows, columns)
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp8_is_dequantised_as_it_is_loaded(tmp_path: Path, precision: str) -> None:
    directory = tiny.make_model(tmp_path, hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    meant = store_as_fp8(directory)
    base = load(directory, "none", precision)
    found = dict(base.named_parameters())
    assert found.keys() == meant.keys()
    for name, weight in meant.items():
        assert torch.equal(found[name], weight.to(base.dtype)), name
    with pytest.raises(ModelError, match=r"model.quantization is nf4, but .* says that the files are fp8"):
        load(directory, "nf4", precision)


def test_without_bitsandbytes_the_remedy_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert quantization.check_quantization("none", model) is None
    with pytest.raises(ConfigError, match=r'needs bitsandbytes: pip install "dpa_ds\[quantization\]"'):
        quantization.check_quantization("nf4", model)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_gguf_file_is_quantised_from_what_it_holds(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    converted = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        expected = plain.load_base(converted, kind)(ids).logits
        torch.testing.assert_close(load(converted, kind)(ids).logits, expected)
        assert not torch.allclose(load(converted, "none")(ids).logits, expected, rtol=1e-3)


def test_experts_in_one_parameter_stay_as_they_are_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = families.make_family(tmp_path / "model", "mixtral")
    base = load(directory, "nf4", "bf16")
    assert "2 parameters of experts stay in bfloat16" in caplog.text or "4 parameters of experts stay" in caplog.text
    assert base.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


def test_a_model_of_convolutions_by_name_is_quantised(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds its weight the other way round."""
    directory = families.make_family(tmp_path / "model", "gpt2")
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        expected, found = load(directory, "none")(ids).logits, load(directory, "int8")(ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    base = load(directory, "int8")
    numbers = sum(parameter.numel() * parameter.itemsize for parameter in base.parameters())
    scales = sum(4 * module.scales.numel() for module in base.modules() if hasattr(module, "scales"))
    assert numbers + scales == quantization.base_bytes(directory, torch.float32, "int8")
