"""The weighted sum of adapters, by hand, per layer and against PEFT; what freezing does and does not cut."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dpa_ds.adapters import mixed_lora
from dpa_ds.adapters.adapter_model import AdapterModel, global_local_mix
from dpa_ds.adapters.methods import GLOBAL, LOCAL, AdapterSpec, adapter_table
from dpa_ds.adapters.state import flatten, unflatten
from dpa_ds.config.schema import LoraConfig, ModelConfig
from dpa_ds.errors import ModelError
from dpa_ds.model.base import load_base
from dpa_ds.runs.folder import RunFolder
from tests import families, tiny

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"], local_rank=3)


@pytest.fixture
def dual(tmp_path: Path) -> AdapterModel:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"), dtype=torch.float32)
    dual = AdapterModel(base, adapter_table(LORA), LORA)
    torch.manual_seed(5)
    with torch.no_grad():
        for adapter in dual.table:
            for parameter in dual.parameters[adapter].values():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    dual.peft_model.eval()
    return dual


def layers(dual: AdapterModel) -> dict[str, LoraLayer]:
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
def test_weighted_sum_in_every_layer(dual: AdapterModel, alpha: float) -> None:
    dual.set_mix(global_local_mix(alpha))
    assert len(layers(dual)) == 4
    for name, layer in layers(dual).items():
        assert layer.r == {"global": 4, "local": 3}
        x = torch.randn(2, 5, layer.in_features)
        torch.testing.assert_close(layer(x).double(), by_hand(layer, x, alpha), rtol=1e-5, atol=1e-5, msg=name)


def test_one_weight_per_instance_equals_one_by_one(dual: AdapterModel) -> None:
    alphas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    ids = torch.randint(0, 256, (4, 9))
    dual.set_mix(global_local_mix(alphas))
    batch = dual.peft_model(input_ids=ids).logits
    for i, alpha in enumerate(alphas.tolist()):
        dual.set_mix(global_local_mix(alpha))
        torch.testing.assert_close(batch[i : i + 1], dual.peft_model(input_ids=ids[i : i + 1]).logits)


def test_decoding_stacks_the_adapters_once_and_never_uses_old_ones(
    dual: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = []
    plain_cat = mixed_lora._cat
    monkeypatch.setattr(mixed_lora, "_cat", lambda tensors, dim: stacked.append(1) or plain_cat(tensors, dim))
    ids = torch.randint(0, 256, (1, 9))
    dual.set_mix(global_local_mix(0.3))
    with torch.no_grad():
        before = [dual.peft_model(input_ids=ids).logits for _ in range(3)]
    assert len(stacked) == 2 * len(dual.layers), "once a layer, for A and for B"
    assert torch.equal(before[0], before[2])
    # Weights that change without a new mix: by a state that is loaded, and by training.
    dual.load_state(LOCAL, {key: 2 * value for key, value in dual.parameters[LOCAL].items()})
    with torch.no_grad():
        loaded = dual.peft_model(input_ids=ids).logits
    assert not torch.equal(loaded, before[0])
    dual.peft_model(input_ids=ids)  # a forward pass of training
    with torch.no_grad():
        for parameter in dual.parameters[LOCAL].values():
            parameter.div_(2)
        assert torch.equal(dual.peft_model(input_ids=ids).logits, dual.peft_model(input_ids=ids).logits)
        torch.testing.assert_close(dual.peft_model(input_ids=ids).logits, before[0])


def test_frozen_adapter_passes_its_gradient_to_lower_layers(
    dual: AdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code detaches the frozen branch; the gradient of the layer below then lacks its share."""
    dual.set_trainable("global", False)
    dual.set_mix(global_local_mix(0.3))
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
    lora = replace(LORA, dropout=0.5)
    dual = AdapterModel(base, adapter_table(lora), lora)
    dual.load_state("global", {k: torch.randn(s) for k, s in dual.shapes["global"].items()})
    dual.load_state("local", {k: torch.randn(s) for k, s in dual.shapes["local"].items()})
    dual.set_mix(global_local_mix(0.3))
    layer = dual.layers[0].train()
    x = torch.randn(2, 5, layer.in_features)
    torch.manual_seed(1)
    mixed = layer(x)
    torch.manual_seed(1)
    dropped = {name: torch.nn.functional.dropout(x, 0.5) for name in dual.table}
    expected = layer.base_layer(x)
    for weight, name in ((0.7, "global"), (0.3, "local")):
        expected = expected + weight * 2.0 * layer.lora_B[name](layer.lora_A[name](dropped[name]))
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(layer.eval()(x).double(), by_hand(layer, x, 0.3), rtol=1e-5, atol=1e-5)


def test_a_base_of_conv1d_layers_is_mixed_alike() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)).eval()
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, target_modules=["c_attn"])
    dual = AdapterModel(base, adapter_table(lora), lora)
    for adapter in dual.table:
        dual.load_state(adapter, {k: torch.randn(s) for k, s in dual.shapes[adapter].items()})
    dual.set_mix(global_local_mix(torch.tensor([0.2, 1.0])))
    (layer,) = dual.layers
    x = torch.randn(2, 3, 16)
    for row, alpha in enumerate((0.2, 1.0)):
        expected = layer.base_layer(x[row])
        for weight, name in ((1 - alpha, "global"), (alpha, "local")):
            expected = expected + weight * 2.0 * layer.lora_B[name](layer.lora_A[name](x[row]))
        torch.testing.assert_close(layer(x)[row], expected)


THREE = (AdapterSpec("a", 4), AdapterSpec("b", 3), AdapterSpec("c", 2))


def three_adapters(folder: Path) -> AdapterModel:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(folder / "model"), dtype=torch.float64)
    model = AdapterModel(base, THREE, LORA)
    generator = torch.Generator().manual_seed(8)
    for name, shapes in model.shapes.items():
        state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        model.load_state(name, state)
    model.peft_model.eval()
    return model


def by_peft(model: AdapterModel, folder: Path) -> peft.PeftModel:
    """The same adapters in PEFT's own layers, all of which take part and require gradients."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    targets = LORA.target_modules
    configs = {spec.name: peft.LoraConfig(r=spec.rank, lora_alpha=1, target_modules=targets) for spec in THREE}
    plain = peft.PeftModel(base, configs["a"], adapter_name="a")
    for name in ("b", "c"):
        plain.add_adapter(name, configs[name])
    plain.load_state_dict(model.peft_model.state_dict())
    plain.base_model.set_adapter(["a", "b", "c"])
    return plain.eval()


def gradients(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Of every adapter; zeros for one that took no part."""
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in adapters.items()}


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_any_number_of_adapters_any_weight_per_row_and_layer(tmp_path: Path, num_rows: int, num_layers: int) -> None:
    """Forward and gradients in fp64, against PEFT's own layers on one row at a time."""
    model = three_adapters(tmp_path)
    torch.manual_seed(6)
    ids = torch.randint(0, 256, (3, 9))
    mix = torch.rand(num_rows, num_layers, 3)
    mix[0, 0, 1] = 0.0
    model.set_mix(mix)
    logits = model.peft_model(input_ids=ids).logits
    logits.square().sum().backward()

    plain = by_peft(model, tmp_path)
    layers = [module for module in plain.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == len(model.layers) == 4
    everywhere = mix.expand(3, 4, 3)
    for row in range(3):
        for i, layer in enumerate(layers):
            layer.scaling = dict(zip("abc", (everywhere[row, i] * 8.0 / 4).tolist(), strict=True))
        expected = plain(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-9, atol=1e-9)
        expected.square().sum().backward()
    found, wanted = gradients(model.peft_model), gradients(plain)
    assert len(wanted) == 4 * 3 * 2
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_an_adapter_without_weight_is_computed_only_on_demand(tmp_path: Path) -> None:
    model = three_adapters(tmp_path)
    for parameter in model.parameters["b"].values():
        parameter.data.fill_(float("nan"))  # 0 times NaN is NaN: what is computed shows
    ids = torch.arange(8).unsqueeze(0)
    model.set_mix(torch.tensor([[[0.4, 0.0, 0.6]]]))
    assert model.peft_model(input_ids=ids).logits.isfinite().all()
    model.set_mix(torch.tensor([[[0.4, 0.0, 0.6]]]), compute_all=True)
    assert not model.peft_model(input_ids=ids).logits.isfinite().any()
    model.set_mix(model.no_mix)
    with model.peft_model.disable_adapter():
        base = model.peft_model.get_base_model()(input_ids=ids).logits
    assert torch.equal(model.peft_model(input_ids=ids).logits, base)


def test_a_table_says_what_is_trained_and_shared(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"), dtype=torch.float32)
    table = (AdapterSpec(GLOBAL, 4, shared=("A",), trained=("B",)), AdapterSpec(LOCAL, 4))
    model = AdapterModel(base, table, LORA)
    model.set_trainable(GLOBAL, True)
    model.set_trainable(LOCAL, False)
    for key, parameter in model.parameters[GLOBAL].items():
        assert parameter.requires_grad == (".lora_B." in key)
        assert table[0].is_shared(key) == (".lora_A." in key)
        assert not table[1].is_shared(key)
    assert not any(parameter.requires_grad for parameter in model.parameters[LOCAL].values())
    assert [spec.federated for spec in table] == [True, False]
    assert [spec.federated for spec in adapter_table(LORA)] == [True, False]


def test_initial_state_is_a_pure_function_of_the_seed(dual: AdapterModel) -> None:
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


def test_flatten_and_unflatten(dual: AdapterModel) -> None:
    state = dual.initial_state("global", (3,))
    flat = flatten(dict(reversed(state.items())))
    assert flat.shape == (sum(p.numel() for p in dual.parameters["global"].values()),)
    back = unflatten(flat, state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_unknown_target_modules_are_listed(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"))
    lora = LoraConfig(target_modules=["q_proj", "query"])
    with pytest.raises(ModelError, match=r"\['query'\].*k_proj.*q_proj"):
        AdapterModel(base, adapter_table(lora), lora)


def test_an_adapter_on_a_tied_head_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tied in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / str(tied), tie_word_embeddings=tied))
        caplog.clear()
        lora = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "lm_head"])
        AdapterModel(base, adapter_table(lora), lora)
        assert ("PEFT cannot merge such an adapter" in caplog.text) == tied


@pytest.mark.parametrize(
    ("family", "lora", "reported"),
    [
        (
            "deepseek_v3",
            {"target_modules": ["q_proj", "down_proj"], "dropout": 0.0},
            r"\['down_proj'\] mean experts to PEFT, which leaves out the linear layer model.layers.0.mlp.down_proj",
        ),
        (
            "mixtral",
            {"target_modules": ["q_proj", "w1"]},
            r"\['w1'\] are not linear layers of Mixtral.*experts.down_proj",
        ),
        ("mixtral", {"target_modules": "all-linear", "dropout": 0.1}, "know no dropout: set lora.dropout: 0"),
        ("llama", {"target_modules": ["all-linear"]}, "write lora.target_modules: all-linear, without brackets"),
        ("deepseek_v3", {"target_modules": ["q_proj", "gate_proj"], "dropout": 0.0}, "PEFT refuses .*up_proj"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(
    family: str, lora: dict[str, Any], reported: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(families.make_family(tmp_path / "model", family))
    config = LoraConfig(rank=4, alpha=8, **lora)
    with pytest.raises(ModelError, match=reported) as raised:
        AdapterModel(base, adapter_table(config), config)
    assert "\n" not in str(raised.value)


def test_experts_in_one_parameter_have_one_mix_for_all_rows(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(families.make_family(tmp_path / "model", "mixtral"))
    config = LoraConfig(rank=4, alpha=8, dropout=0.0, target_modules=["experts.down_proj"])
    adapters = AdapterModel(base, adapter_table(config), config)
    assert (len(adapters.layers), len(adapters.experts)) == (0, 2)
    adapters.set_mix(global_local_mix(torch.tensor([0.5, 0.5])))
    with pytest.raises(NotImplementedError, match="one mix for all rows"):
        adapters.set_mix(global_local_mix(torch.tensor([0.5, 0.4])))


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (15,)])
def test_weights_of_rows_fit_inputs_of_other_shapes(dual: AdapterModel, shape: tuple[int, ...]) -> None:
    """(batch, seq_len), (batch, 1, seq_len) as in DeepSeek's attention, and all tokens in one dimension."""
    alphas = torch.tensor([0.1, 0.5, 0.9])
    layer = next(iter(layers(dual).values()))
    rows = torch.randn(3, 5, layer.in_features)
    dual.set_mix(global_local_mix(alphas))
    found = layer(rows.view(*shape, -1)).view(3, 5, -1)
    for row, alpha in enumerate(alphas.tolist()):
        expected = by_hand(layer, rows[row], alpha).float()
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_gives_the_same_bits_with_and_without_gradients(dual: AdapterModel, dtype: torch.dtype) -> None:
    """In place or not, the product is weighted in fp32 and rounded once, and so is its sum with the frozen layer."""
    dual.peft_model.to(dtype)
    dual.set_mix(global_local_mix(torch.tensor([0.1, 0.5, 0.9])))
    layer = next(iter(layers(dual).values()))
    x = torch.randn(3, 5, layer.in_features).to(dtype)
    before = x.clone()
    stacked_a = torch.cat([layer.lora_A[name].weight for name in dual.table], dim=0)
    stacked_b = torch.cat([layer.lora_B[name].weight for name in dual.table], dim=1)
    low = ((x @ stacked_a.T) * layer._weights).to(dtype)
    if dtype == torch.float32:
        expected = torch.addmm(layer.base_layer(x).flatten(0, 1), low.flatten(0, 1), stacked_b.T).view(3, 5, -1)
    else:
        expected = torch.addmm((low @ stacked_b.T).flatten(0, 1), x.flatten(0, 1), layer.base_layer.weight.T)
        expected = expected.view(3, 5, -1)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "linear with a bias", "Conv1D"])
def test_a_young_adapter_is_not_lost_in_16_bit(kind: str, dtype: torch.dtype) -> None:
    """What the layer adds to the frozen output, measured along the adapter's product: all of it. PEFT's own layer loses
    some, since it adds to an output that was rounded already."""
    torch.manual_seed(0)
    layer = Conv1D(256, 256) if kind == "Conv1D" else torch.nn.Linear(256, 256, bias=kind != "linear")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["layer"], bias="none")
    x = torch.randn(1, 512, 256).to(dtype)

    def kept(config: peft.LoraConfig) -> float:
        holder = torch.nn.Module()
        holder.add_module("layer", layer.to(dtype))
        peft.inject_adapter_in_model(config, holder)
        adapted: Any = holder.layer.to(dtype)
        with torch.no_grad():
            adapted.lora_A["default"].weight.copy_(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) / 16)
            torch.nn.init.normal_(adapted.lora_B["default"].weight, std=2e-4 if dtype == torch.bfloat16 else 2e-5)
            if isinstance(adapted, mixed_lora.MixedLora):
                adapted.mix(["default"], torch.ones(1, 1, 4))
            found = adapted(x).double()
            product = (
                x.double() @ adapted.lora_A["default"].weight.double().T @ adapted.lora_B["default"].weight.double().T
            )
            exact = copy.deepcopy(adapted.base_layer).double()(x.double())
        return float(((found - exact) * product).sum() / product.square().sum())

    assert kept(mixed_lora.with_mixed_layers(config)) == pytest.approx(1.0, abs=0.05)
    if kind == "linear":
        assert kept(replace(config)) < 0.9


# ---- what others read ---------------------------------------------------------------------------------------------

KNOWN_SINCE_2023 = {
    "base_model_name_or_path", "bias", "lora_alpha", "lora_dropout", "peft_type", "r", "target_modules", "task_type",
}  # fmt: skip
"""Fields that PEFT 0.3 has; 0.11 and 0.13 refuse a file with one that is newer than they are."""


@pytest.fixture
def exported(tmp_path: Path) -> tuple[AdapterModel, Path]:
    """An adapter with weights of its own, saved as a run saves it, over a base that was loaded as a run loads it."""
    config = ModelConfig(path=str(tiny.make_model(tmp_path / "model")), precision="fp32")
    base = load_base(config, Path(config.path), {}, torch.device("cpu"))
    adapters = AdapterModel(base, adapter_table(LORA), LORA)
    state = {key: torch.full(shape, 0.1) for key, shape in adapters.shapes[GLOBAL].items()}
    adapters.load_state(GLOBAL, state)
    folder = RunFolder(tmp_path / "run")
    folder.save_adapter(1, GLOBAL, state, adapters.peft_config(GLOBAL), {}, {})
    return adapters, tmp_path / "run" / "rounds" / "round_000001.tmp" / GLOBAL


def test_an_adapter_names_its_base_and_nothing_that_old_versions_do_not_know(
    exported: tuple[AdapterModel, Path], tmp_path: Path
) -> None:
    content = json.loads((exported[1] / "adapter_config.json").read_text())
    assert set(content) == KNOWN_SINCE_2023
    assert content["base_model_name_or_path"] == str(tmp_path / "model")
    assert (content["r"], content["lora_alpha"], content["target_modules"]) == (4, 8.0, ["q_proj", "v_proj"])
    read_back = peft.LoraConfig.from_pretrained(exported[1]).to_dict()
    kept = exported[0].peft_config(GLOBAL).to_dict()
    differing = {name for name in kept if read_back[name] != kept[name]}
    assert differing <= {"target_modules", "inference_mode"}, "a list for a set; PEFT loads for inference"


@pytest.mark.parametrize("load", [peft.AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_libraries_load_an_adapter_by_its_folder_alone(
    exported: tuple[AdapterModel, Path], load: Callable[..., torch.nn.Module]
) -> None:
    adapters, folder = exported
    ids = torch.randint(0, 256, (2, 9))
    adapters.set_mix(global_local_mix(0.0))
    adapters.peft_model.eval()
    with torch.no_grad():
        expected = adapters.peft_model(input_ids=ids).logits
        torch.testing.assert_close(load(folder, dtype=torch.float32).eval()(input_ids=ids).logits, expected)


def random_adapters(base: Any, lora: LoraConfig, folder: Path) -> AdapterModel:
    """Both adapters with random weights, saved to `folder`/global and `folder`/local as a run saves them."""
    adapters = AdapterModel(base, adapter_table(lora), lora)
    run = RunFolder(folder / "run")
    generator = torch.Generator().manual_seed(0)
    for name, shapes in adapters.shapes.items():
        state = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        adapters.load_state(name, state)
        run.save_adapter(1, name, state, adapters.peft_config(name), {}, {})
        (run.run_dir / "rounds" / "round_000001.tmp" / name).rename(folder / name)
    adapters.peft_model.eval()
    return adapters


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("family", ["tiny", "mixtral"])
@torch.no_grad()
def test_peft_scales_a_saved_adapter_alike(family: str, scaling: Any, tmp_path: Path) -> None:
    """Of another rank too, merged into the base or not; PEFT gives Mixtral's fused experts twice the rank."""
    make = tiny.make_model if family == "tiny" else lambda folder: families.make_family(folder, family)
    model, ids = make(tmp_path / "model"), torch.randint(0, 50, (2, 9))
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.0, target_modules="all-linear", local_rank=3, scaling=scaling)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain_logits = base(input_ids=ids).logits
    adapters = random_adapters(base, lora, tmp_path)
    for name, alpha in ((GLOBAL, 0.0), (LOCAL, 1.0)):
        adapters.set_mix(global_local_mix(alpha))
        found = adapters.peft_model(input_ids=ids).logits
        assert float((found - plain_logits).abs().max()) > 0.01, "the adapter changes the answer"
        assert json.loads((tmp_path / name / "adapter_config.json").read_text()).get("use_rslora", False) == (
            scaling == "rslora"
        )
        again = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / name).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, found, rtol=0, atol=2e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, found, rtol=0, atol=2e-5)
