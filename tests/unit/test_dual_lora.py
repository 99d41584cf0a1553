"""The weighted sum of two adapters, by hand and per layer; what freezing does and does not cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dpa_ds.adapters.dual_lora import ADAPTERS, DualAdapter
from dpa_ds.adapters.state import flatten, unflatten
from dpa_ds.config.schema import LoraConfig
from dpa_ds.errors import ModelError
from tests import tiny

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"], local_rank=3)


@pytest.fixture
def dual(tmp_path: Path) -> DualAdapter:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"), dtype=torch.float32)
    dual = DualAdapter(base, LORA)
    torch.manual_seed(5)
    with torch.no_grad():
        for adapter in ADAPTERS:
            for parameter in dual.parameters[adapter].values():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    dual.peft_model.eval()
    return dual


def layers(dual: DualAdapter) -> dict[str, LoraLayer]:
    return {n: m for n, m in dual.peft_model.named_modules() if isinstance(m, LoraLayer)}


def by_hand(layer: LoraLayer, x: torch.Tensor, alpha: float, global_detached: bool = False) -> torch.Tensor:
    """h = W0 x + (1 - alpha) s B_g A_g x + alpha s B_l A_l x, in fp64; s = 8 / 4 for both ranks."""
    x = x.double()
    h = x @ layer.base_layer.weight.double().T
    for weight, name in ((1 - alpha, "global"), (alpha, "local")):
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        added = weight * 2.0 * (x @ a.T @ b.T)
        h = h + (added.detach() if global_detached and name == "global" else added)
    return h


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_weighted_sum_in_every_layer(dual: DualAdapter, alpha: float) -> None:
    dual.set_mix(alpha)
    assert len(layers(dual)) == 4
    for name, layer in layers(dual).items():
        assert layer.r == {"global": 4, "local": 3}
        x = torch.randn(2, 5, layer.in_features)
        torch.testing.assert_close(layer(x).double(), by_hand(layer, x, alpha), rtol=1e-5, atol=1e-5, msg=name)


def test_one_weight_per_instance_equals_one_by_one(dual: DualAdapter) -> None:
    alphas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    ids = torch.randint(0, 256, (4, 9))
    dual.set_mix(alphas)
    batch = dual.peft_model(input_ids=ids).logits
    for i, alpha in enumerate(alphas.tolist()):
        dual.set_mix(alpha)
        torch.testing.assert_close(batch[i : i + 1], dual.peft_model(input_ids=ids[i : i + 1]).logits)


def test_frozen_adapter_passes_its_gradient_to_lower_layers(dual: DualAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code detaches the frozen branch; the gradient of the layer below then lacks its share."""
    dual.set_trainable("global", False)
    dual.set_mix(0.3)
    below = layers(dual)["base_model.model.model.layers.0.self_attn.v_proj"].lora_A["local"].weight

    def gradient() -> torch.Tensor:
        loss = dual.peft_model(input_ids=torch.arange(8).unsqueeze(0)).logits.square().mean()
        return torch.autograd.grad(loss, below)[0]

    def gradient_by_hand(global_detached: bool) -> torch.Tensor:
        for layer in layers(dual).values():
            monkeypatch.setattr(layer, "forward", lambda x, it=layer: by_hand(it, x, 0.3, global_detached).float())
        return gradient()

    ours, kept, cut = gradient(), gradient_by_hand(False), gradient_by_hand(True)
    torch.testing.assert_close(ours, kept, rtol=1e-4, atol=1e-6)
    assert (kept - cut).norm() > 0.01 * kept.norm()
    assert all(p.grad is None for p in dual.parameters["global"].values())


def test_in_training_each_adapter_drops_inputs_of_its_own(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"), dtype=torch.float32)
    dual = DualAdapter(base, replace(LORA, dropout=0.5))
    dual.load_state("global", {k: torch.randn(s) for k, s in dual.shapes["global"].items()})
    dual.load_state("local", {k: torch.randn(s) for k, s in dual.shapes["local"].items()})
    dual.set_mix(0.3)
    layer = dual.layers[0].train()
    x = torch.randn(2, 5, layer.in_features)
    torch.manual_seed(1)
    mixed = layer(x)
    torch.manual_seed(1)
    dropped = {name: torch.nn.functional.dropout(x, 0.5) for name in ADAPTERS}
    expected = layer.base_layer(x)
    for weight, name in ((0.7, "global"), (0.3, "local")):
        expected = expected + weight * 2.0 * layer.lora_B[name](layer.lora_A[name](dropped[name]))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(layer.eval()(x).double(), by_hand(layer, x, 0.3), rtol=1e-5, atol=1e-5)


def test_a_base_of_conv1d_layers_is_mixed_alike() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)).eval()
    dual = DualAdapter(base, LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules=["c_attn"]))
    for adapter in ADAPTERS:
        dual.load_state(adapter, {k: torch.randn(s) for k, s in dual.shapes[adapter].items()})
    dual.set_mix(torch.tensor([0.2, 1.0]))
    (layer,) = dual.layers
    x = torch.randn(2, 3, 16)
    for row, alpha in enumerate((0.2, 1.0)):
        expected = layer.base_layer(x[row])
        for weight, name in ((1 - alpha, "global"), (alpha, "local")):
            expected = expected + weight * 2.0 * layer.lora_B[name](layer.lora_A[name](x[row]))
        torch.testing.assert_close(layer(x)[row], expected)


def test_initial_state_is_a_pure_function_of_the_seed(dual: DualAdapter) -> None:
    first, again, other = (dual.initial_state("local", seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert first.keys() == dual.parameters["local"].keys()
    for key, value in first.items():
        assert torch.equal(value, again[key])
        if "lora_B" in key:
            assert not value.any()
        else:
            assert not torch.equal(value, other[key])
            assert value.abs().max() <= 32**-0.5  # Kaiming uniform: 1 / sqrt(fan-in)
            assert value.abs().mean() == pytest.approx(32**-0.5 / 2, rel=0.2)


def test_flatten_and_unflatten(dual: DualAdapter) -> None:
    state = dual.initial_state("global", (3,))
    flat = flatten(dict(reversed(state.items())))
    assert flat.shape == (sum(p.numel() for p in dual.parameters["global"].values()),)
    back = unflatten(flat, state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_unknown_target_modules_are_listed(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"\['query'\].*k_proj.*q_proj"):
        DualAdapter(base, LoraConfig(target_modules=["q_proj", "query"]))
