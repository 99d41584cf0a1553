"""The planner's numbers: parameters against the real models on the meta device, DeepSpeed's estimators."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import peft
import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dpa_ds.adapters.methods import build_schedule
from dpa_ds.cli.plan import main
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import LoraConfig, MethodConfig, RanksPerGroup
from dpa_ds.errors import ModelError
from dpa_ds.model import quantization
from dpa_ds.planning.hardware import GPUS, Cluster, parse_cluster
from dpa_ds.planning.memory import Layout, Lora, adapter_bytes, base_bytes, host_bytes, model_bytes
from dpa_ds.planning.plan import Plan, judge, layout_of, plan, ranks_of_recipe
from dpa_ds.planning.scenario import PHASES, Scenario, Workload, lora_of, scenario_of
from dpa_ds.planning.shapes import PRESETS, Shape, _shape_of, read_shape


def real_model(shape: Shape) -> torch.nn.Module:
    """The model of transformers with these sizes, on the meta device."""
    kind = Qwen2Config if shape.qkv_bias else Qwen3Config if shape.qk_norm else LlamaConfig
    experts = {}
    if shape.experts:
        kind = Qwen3MoeConfig if shape.qk_norm else MixtralConfig
        experts = {"num_local_experts": shape.experts, "num_experts": shape.experts}
        experts |= {"num_experts_per_tok": shape.active_experts, "moe_intermediate_size": shape.intermediate}
    config = kind(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        **experts,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    """The base's, and PEFT's, for adapters of two ranks on some and on all linear layers."""
    shape = PRESETS[name]
    model = real_model(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(elements * number for elements, number in shape.tensors) == shape.parameters
    assert _shape_of(json.loads(model.config.to_json_string(use_diff=False))) == shape
    for targets in (("q_proj", "v_proj"), tuple(shape.linears)):
        lora = Lora(targets, rank=8, local_rank=4)
        config = {"lora_alpha": 16, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
        with torch.device("meta"):
            adapted = peft.PeftModel(model, peft.LoraConfig(r=8, **config), adapter_name="global")
            adapted.add_adapter("local", peft.LoraConfig(r=4, **config))
        found = [
            sum(p.numel() for key, p in adapted.named_parameters() if f".{name}." in key)
            for name in ("global", "local")
        ]
        assert tuple(found) == lora.parameters(shape)
        model = adapted.unload()


def test_all_linear_is_every_layer_of_the_shape() -> None:
    shape = PRESETS["llama-7b"]
    planned = lora_of(LoraConfig(target_modules="all-linear", rank=8), shape)
    assert planned.targets == tuple(shape.linears)
    assert planned.parameters(shape)[0] == shape.lora_parameters(8, list(shape.linears))


def test_parameters_of_published_names() -> None:
    """In billions, as the models' cards say: all, and those that a token passes through."""
    published = {
        "llama3-8b": (8.03, 8.03),
        "llama3-70b": (70.6, 70.6),
        "mistral-7b": (7.24, 7.24),
        "mixtral-8x7b": (46.7, 12.9),
        "qwen3-8b": (8.2, 8.2),
        "qwen3-32b": (32.8, 32.8),
        "qwen3-30b-a3b": (30.5, 3.3),
    }
    for name, (parameters, active) in published.items():
        shape = PRESETS[name]
        assert shape.parameters / 1e9 == pytest.approx(parameters, rel=0.01), name
        assert shape.active_parameters / 1e9 == pytest.approx(active, rel=0.02), name


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
@pytest.mark.parametrize("size", ["tied", "biased"])
def test_bytes_of_a_base_are_those_of_its_layers(kind: str, size: str, tmp_path: Path) -> None:
    """`model/quantization.py` counts the layers of the model of transformers; that it has them, its own test says."""
    shape = Shape(64, 2, 4, 2, 128, 300, 16, tied=size == "tied", qkv_bias=size == "biased")
    real_model(shape).config.save_pretrained(tmp_path)
    planned = base_bytes(shape, "bf16", kind)
    assert planned == quantization.base_bytes(tmp_path, torch.bfloat16, None if kind == "none" else kind)


def test_all_experts_are_not_planned() -> None:
    with pytest.raises(ModelError, match="all-linear adapts every expert"):
        lora_of(LoraConfig(target_modules="all-linear"), PRESETS["mixtral-8x7b"])


def test_an_unknown_layer_is_an_error() -> None:
    with pytest.raises(ModelError, match="c_attn"):
        PRESETS["llama-7b"].lora_parameters(8, ["c_attn"])


@pytest.mark.parametrize("ranks", [1, 8])
def test_frozen_weights_are_what_deepspeed_estimates(ranks: int) -> None:
    """Its estimators with the optimizer offloaded leave the 16-bit weights, and for stage 3 the largest layer with gradients."""
    shape = PRESETS["llama-13b"]
    largest = shape.vocab * shape.hidden
    _, whole = estimate_zero2_model_states_mem_needs(
        shape.parameters, ranks, 1, cpu_offload=True, additional_buffer_factor=1.0
    )
    assert model_bytes(shape, Lora(), Layout(2, ranks))["base"] == whole
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
    planned = model_bytes(shape, Lora(), Layout(3, ranks, reuse_distance=0, persistence=0, prefetch=0))
    assert planned["base"] == pytest.approx(divided - layer, abs=8)
    assert planned["gathered"] - largest * 2 == max(largest, shape.layer_parameters) * 2


ARGUMENTS = ["--config", "launch/recipes/paper.yaml", "--cluster", "nodes=1,gpus=8,gpu=h100-80g,net=400Gb"]


@pytest.mark.parametrize(("ranks", "second_share_ranks", "times_the_base"), [(8, 1, 1 / 8), (8, 4, 3 / 8), (2, 8, 1)])
def test_a_second_share_is_planned(ranks: int, second_share_ranks: int, times_the_base: float) -> None:
    shape = PRESETS["llama-13b"]
    planned = model_bytes(shape, Lora(), Layout(3, ranks, second_share_ranks=second_share_ranks))
    assert planned["base"] == pytest.approx(times_the_base * 2 * shape.parameters)


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
    # forward and backward; a layer and a prefetch bucket stay at the turn, and the embedding is read once
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    twice = 2 * PRESETS["llama-70b"].parameters - 32000 * 8192 - layer - 50_000_000
    assert first["gather_bytes"] == pytest.approx(2 * twice * 3 / 4)


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"--cluster": "gpus=8,gpu=h100"}, "unknown gpu h100"),
        ({"--cluster": "nodes=0"}, "every number must be > 0"),
        ({"--cluster": "nodes=two"}, "write it like"),
        ({"--cluster": "cpus=2"}, "unknown key cpus"),
        ({"--cluster": "gpus=8,mfu=40"}, "in (0, 1]"),
        ({"--cluster": "gpus=8,net=nan"}, "every number must be > 0"),
        ({"--clients": "0"}, "--clients must be a whole number > 0, got '0'"),
        ({"--tokens": "many"}, "--tokens must be a number > 0, got 'many'"),
        ({"--tokens": "nan"}, "--tokens must be a number > 0, got 'nan'"),
        ({"--json": "/dev/null/plan.json"}, "choose another file with --json"),
        ({"--cluster.ranks_per_group": "16"}, "--cluster has 8 GPUs"),
        ({"--model": "gpt-5"}, "no such preset"),
        ({"--config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"--lora.target_modules": "[c_attn]"}, "c_attn"),
    ],
)
def test_bad_arguments_are_one_line(changed: dict[str, str], reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {**dict(zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True)), "--model": "llama-7b", **changed}
    assert main([word for pair in arguments.items() for word in pair]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reported in line


LLAMA, DATASET1 = PRESETS["llama-7b"], Workload()


@pytest.mark.parametrize("method", get_args(MethodConfig.__annotations__["name"]))
def test_phases_are_those_of_the_schedule(method: str) -> None:
    schedule = build_schedule(MethodConfig(name=method))  # type: ignore[arg-type]
    assert PHASES[method] == len(schedule.before) + len(schedule.overlap) + len(schedule.after)


def judged(cluster: str, work: Workload = DATASET1, **changed: str) -> Plan:
    """paper.yaml's own layout for 7B on that cluster, with overrides of the recipe (section__field)."""
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changed.items()]
    config, hosts = load_config([*ARGUMENTS[:2], *words]), parse_cluster(cluster)
    zero = load_deepspeed_json(config.engine.deepspeed_config)["zero_optimization"]
    return judge_recipe(scenario_of(config, LLAMA, zero, work), config.cluster.ranks_per_group, hosts)


def judge_recipe(scenario: Scenario, wanted: RanksPerGroup, hosts: Cluster) -> Plan:
    """The layout that the recipe itself has."""
    return judge(scenario, hosts, layout_of(scenario, ranks_of_recipe(wanted, scenario, hosts)))


def test_rounds_of_methods_and_clients() -> None:
    """A method of one phase takes half of the time of two; half the groups, or twice the clients, take twice as long."""
    eight = "nodes=1,gpus=8,gpu=h100-80g"
    whole = judged(eight).round_seconds
    assert judged(eight, method__name="fedit").round_seconds == pytest.approx(whole / 2)
    assert judged("nodes=1,gpus=4,gpu=h100-80g").round_seconds == pytest.approx(2 * whole)
    assert judged(eight, Workload(clients=16)).round_seconds == pytest.approx(2 * whole)
    assert judged(eight, Workload(clients=16), federation__client_fraction="0.5").round_seconds == pytest.approx(whole)
    # centralized: one client with all 2400 examples, 380 steps instead of 2 x 50, each on 8 ranks
    alone = judged(eight, method__name="centralized")
    assert alone.layout.ranks == 8
    reduced = alone.reduce_bytes / (0.7 * 450e9)
    assert alone.round_seconds == pytest.approx(380 * (whole / 100 / 8 + reduced), rel=1e-6)


def test_offload_pays_for_its_memory_in_time() -> None:
    """The base's share leaves the GPU, and comes over the host link for every gather: in 2 micro-batches, nearly twice in each.

    What lies at the turn (half of stage3_max_reuse_distance, a prefetch bucket) and the embedding come once.
    """
    words = {"cluster__ranks_per_group": "2", "train__micro_batch_tokens": "1120"}
    whole = judged("gpus=2,gpu=h100-80g", engine__deepspeed_config="ds_configs/zero3.json", **words)
    outside = judged("gpus=2,gpu=h100-80g", engine__deepspeed_config="ds_configs/zero3_offload_cpu.json", **words)
    share = LLAMA.parameters * 2 / 2
    assert (whole.host_bytes, outside.host_bytes) == (0, share)
    assert whole.memory["base"] - outside.memory["base"] == share
    twice = 2 - (500_000_000 + 50_000_000 + LLAMA.vocab * LLAMA.hidden) / LLAMA.parameters
    assert outside.step_seconds - whole.step_seconds == pytest.approx(2 * twice * share / (0.7 * 64e9))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ranks", [1, 8])
def test_pinned_memory_is_rounded_as_torch_rounds_it(name: str, ranks: int) -> None:
    """Each parameter's share, as DeepSpeed pins them, to the next power of two, as CachingHostAllocator.h allocates it.

    A formula stands in for both: without CUDA nothing is pinned.
    """
    shape = PRESETS[name]
    layout = Layout(3, ranks, offload_params=True)
    shares = [2 * math.ceil(parameter.numel() / ranks) for parameter in real_model(shape).parameters()]
    assert host_bytes(shape, layout, exact_above=math.inf) == sum(2 ** math.ceil(math.log2(size)) for size in shares)
    assert host_bytes(shape, replace(layout, pinned=False)) == sum(shares)
    assert sum(shares) <= host_bytes(shape, layout) < 1.01 * sum(shares)
    assert (
        host_bytes(shape, replace(layout, offload_params=False)) == host_bytes(shape, replace(layout, nvme=True)) == 0
    )


def test_13b_takes_44_gb_of_pinned_memory_where_torch_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "launch/recipes/offload.yaml", "--cluster", "gpu=a100-40g", "--model", "llama-13b"]
    assert main(arguments) == 0
    assert "host, GB a rank: 26.03; 44.02 without pinned_max_cached_size_mb:1" in capsys.readouterr().out


def test_ranked_layouts_choose_micro_batches_and_offload(tmp_path: Path) -> None:
    """On one small GPU only offload fits; there, a larger micro-batch brings the base from the host less often."""
    file = tmp_path / "plan.json"
    cluster = ["--cluster", "gpus=1,gpu=v100-32g"]
    assert main([*ARGUMENTS[:2], *cluster, "--model", "llama-70b", "--json", str(file)]) == 0
    ranked = json.loads(file.read_text())["ranked"]
    assert [one["layout"]["offload_params"] for one in ranked if one["fits"]] == [True] * sum(o["fits"] for o in ranked)
    first = ranked[0]
    passes = math.ceil(64 * 70 / first["layout"]["tokens"])
    assert passes < math.ceil(64 * 70 / 512)
    assert sum(first["memory"].values()) <= 0.9 * 32e9


def test_a_local_adapter_of_another_rank() -> None:
    shape = PRESETS["llama-1b"]
    alike = adapter_bytes(*Lora(rank=8, local_rank=8).parameters(shape), Layout(1, 1))
    wider = adapter_bytes(*Lora(rank=8, local_rank=24).parameters(shape), Layout(1, 1))
    assert {part: wider[part] / alike[part] for part in alike} == {"adapters": 2, "gradients": 3, "optimizer": 2}


def test_help_names_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    words = set(re.findall(r"[\w.-]*\w", capsys.readouterr().out))
    assert {*GPUS, *PRESETS} <= words


def test_a_closed_pipe_is_no_traceback() -> None:
    command = [sys.executable, "launch/plan.py", *ARGUMENTS, "--model", "llama-7b"]
    plan, reader = subprocess.PIPE, os.pipe()
    os.close(reader[0])  # as after `| head -0`
    done = subprocess.run(command, stdout=reader[1], stderr=plan, timeout=120, text=True, check=False)
    os.close(reader[1])
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_model_is_one_error() -> None:
    with pytest.raises(ModelError, match="llama-7b"):
        read_shape("nowhere", None)
    with pytest.raises(ModelError, match="no such preset"):
        read_shape("nowhere", "gpt-5")


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("llama2_7b", "llama-7b"),
        ("llama2_13b", "llama-13b"),
        ("llama2_70b", "llama-70b"),
        ("qwen2_5_7b", "qwen2.5-7b"),
    ],
)
def test_recipes_say_what_the_planner_expects(recipe: str, preset: str) -> None:
    text = Path(f"launch/recipes/{recipe}.yaml").read_text()
    found = re.search(r"per GPU: ([\d.]+) GB, of it ([\d.]+) GB of weights; (\d+) s a round on (\d+) H100", text)
    assert found
    config, hosts = load_config(["--config", f"launch/recipes/{recipe}.yaml"]), int(found[4]) // 8
    assert f"--nodes={hosts} " in text
    cluster = parse_cluster(f"nodes={hosts},gpus=8,gpu=h100-80g,net=400Gb")
    zero = load_deepspeed_json(config.engine.deepspeed_config)["zero_optimization"]
    scenario = scenario_of(config, PRESETS[preset], zero, DATASET1)
    one = judge_recipe(scenario, config.cluster.ranks_per_group, cluster)
    said = (f"{one.total / 1e9:.1f}", f"{one.memory['base'] / 1e9:.1f}", f"{one.round_seconds:.0f}")
    assert said == (found[1], found[2], found[3]), "write these into the recipe"
    assert one.fits


@pytest.mark.parametrize(
    ("recipe", "preset", "hosts"),
    [
        ("paper", "llama-7b", 1),
        ("fedit", "llama-7b", 1),
        ("llama2_7b", "llama-7b", 1),
        ("qwen2_5_7b", "qwen2.5-7b", 1),
        ("llama2_13b", "llama-13b", 2),
    ],
)
def test_recipes_have_the_best_micro_batch_of_their_layout(recipe: str, preset: str, hosts: int) -> None:
    """One a step of 64 examples of 70 tokens, and no larger than that takes."""
    config = load_config(["--config", f"launch/recipes/{recipe}.yaml"])
    cluster = parse_cluster(f"nodes={hosts},gpus=8,gpu=h100-80g,net=400Gb")
    zero = load_deepspeed_json(config.engine.deepspeed_config)["zero_optimization"]
    scenario = scenario_of(config, PRESETS[preset], zero, DATASET1)
    one = judge_recipe(scenario, config.cluster.ranks_per_group, cluster)
    assert one in plan(scenario, cluster)
    assert one.micro_batches == 1
