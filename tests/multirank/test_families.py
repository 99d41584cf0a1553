"""Every model family that users have, against transformers and PEFT alone: losses, adapters, weights and answers.

Tiny random models. When a new transformers release changes a family, its row says so.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import adapter_table
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import LoraConfig
from tests import families, plain, tiny
from tests.plain_inference import PlainClient
from tests.plain_start import start_plain
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
CLIENTS, NEW_TOKENS, BEAMS, ALPHA = (5, 4), 5, 2, 0.4
TOLERANCE = 1e-3
NOT_COMPARED = {"kimi_linear"}
"""There for other tests: without kernels of a GPU it takes minutes."""


def evaluate_on_rank(job: Any, argv: Sequence[str]) -> None:
    """The evaluation that `launch/evaluate.py` starts with the arguments `argv`."""
    from dpa_ds.cli.evaluate import load
    from dpa_ds.evaluation.runner import evaluate

    evaluate(load(argv), job)


def recipe(model: Path, data: Path, folder: Path, family: families.Family, **more: Any) -> list[str]:
    settings = {
        "lora__target_modules": list(family.targets),
        "data__template": "{instruction}",
        "method__alpha": ALPHA,
        "federation__num_rounds": 1,
        "train__learning_rate": 1e-2,
        # AdamW divides by the gradient's own size: with the usual epsilon the rounding of a tiny gradient counts in full.
        "train__adam_epsilon": 1e-4,
        "weighting__num_references": 2,
        "evaluation__every_rounds": 0,
        **more,
    }
    return tiny.recipe(model, data, folder, **settings)


@pytest.mark.parametrize("name", sorted(families.FAMILIES.keys() - NOT_COMPARED))
def test_a_family_equals_transformers_and_peft(name: str, tmp_path: Path) -> None:
    """Costs 2 s a family: the price of knowing what a new release of transformers changes."""
    check(name, tmp_path, num_ranks=1, training={}, evaluation=[])


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "deepseek_v2"])
def test_under_zero_3_from_files_with_other_names_and_single_experts(name: str, tmp_path: Path) -> None:
    zero3 = {"cluster__ranks_per_group": 2, "engine__deepspeed_config": "ds_configs/zero3.json"}
    check(name, tmp_path, 2, zero3, ["--evaluation.sharding=always"])


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", "all-linear"),
        ("mixtral", "all-linear"),
        ("gpt_oss", ["q_proj", "experts.gate_up_proj", "experts.down_proj"]),
    ],
)
def test_all_linear_layers_and_experts_train_as_with_peft(name: str, targets: Any, tmp_path: Path) -> None:
    """Mixtral's experts and routers are single parameters: PEFT's all-linear has them."""
    check(name, tmp_path, num_ranks=1, training={"lora__target_modules": targets}, evaluation=[])


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_all_linear_adapts_what_peft_adapts(name: str, tmp_path: Path) -> None:
    directory = families.make_family(tmp_path / "model", name)
    lora = LoraConfig(rank=2, local_rank=3, dropout=0.0, target_modules="all-linear")
    adapters = AdapterModel(AutoModelForCausalLM.from_pretrained(directory), adapter_table(lora), lora)
    base = AutoModelForCausalLM.from_pretrained(directory)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    if name in ("mamba", "falcon_h1"):
        with pytest.raises(ValueError, match="'out_proj' is incompatible"):
            peft.get_peft_model(base, config)
        base = AutoModelForCausalLM.from_pretrained(directory)
        config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["out_proj"], task_type="CAUSAL_LM")
    expected = adapted_modules(peft.get_peft_model(base, config))
    assert adapted_modules(adapters.peft_model) == expected
    assert len(adapters.layers) + len(adapters.experts) == len(expected)
    shapes = adapters.shapes
    assert shapes["local"].keys() == shapes["global"].keys()
    for key, shape in shapes["local"].items():
        rank_first = key.endswith("lora_A.weight")
        assert 2 * shape[0 if rank_first else 1] == 3 * shapes["global"][key][0 if rank_first else 1], key


def adapted_modules(model: peft.PeftModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("targets", ["all-linear", ["experts.down_proj"]])
def test_experts_in_one_parameter_are_refused_under_zero_3(targets: Any, tmp_path: Path) -> None:
    model = families.make_family(tmp_path / "model", "mixtral")
    data = tiny.make_federation(tmp_path / "data", CLIENTS, num_test=2)
    zero3 = {"cluster__ranks_per_group": 2, "engine__deepspeed_config": "ds_configs/zero3.json"}
    family = families.FAMILIES["mixtral"]
    argv = recipe(model, data, tmp_path / "runs", family, lora__target_modules=targets, **zero3)
    with pytest.raises(AssertionError, match="MixtralForCausalLM keeps in one parameter, which ZeRO-3 divides"):
        run_on_ranks(train_on_rank, 2, tmp_path, argv)


def test_a_run_of_an_older_recipe_resumes_where_attention_is_chosen(tmp_path: Path) -> None:
    """sdpa was the default: it stands in saved recipes."""
    model = tiny.make_model(tmp_path / "model")
    data = tiny.make_federation(tmp_path / "data", CLIENTS, num_test=2)
    before = {"model__attention": "sdpa", "federation__num_rounds": 1}
    run_on_ranks(train_on_rank, 1, tmp_path, tiny.recipe(model, data, tmp_path / "runs", **before))
    assert "attention: sdpa" in (tmp_path / "runs/tiny/config.yaml").read_text()
    run_on_ranks(train_on_rank, 1, tmp_path, tiny.recipe(model, data, tmp_path / "runs", resume="must"))
    assert "continues after round 1 of 2" in (tmp_path / "runs/tiny/log.txt").read_text()


def check(name: str, tmp_path: Path, num_ranks: int, training: dict[str, Any], evaluation: list[str]) -> None:
    """Adapters of a round, and all answers, equal those of transformers and PEFT alone."""
    family = families.FAMILIES[name]
    model = families.make_family(tmp_path / "model", name)
    data = tiny.make_federation(tmp_path / "data", CLIENTS, num_test=2)
    argv = recipe(model, data, tmp_path / "runs", family, **training)
    run = tmp_path / "runs" / "tiny"
    options = ["--run", str(run), f"--beams={BEAMS}", f"--max_new_tokens={NEW_TOKENS}", *evaluation]
    run_on_ranks(train_on_rank, num_ranks, tmp_path, argv)
    said = (run / "log.txt").read_text()
    (taken,) = re.findall(r"attention (\w+).*; rows (\w+):", said)
    assert taken == (family.attention, family.rows)
    run_on_ranks(evaluate_on_rank, num_ranks, tmp_path, options)

    reference, clients, start = start_plain(load_config(argv))
    final = plain.feddpa_t(reference, clients, start, 1, ALPHA)
    assert_close(load_file(run / "adapters/global/adapter_model.safetensors"), final)
    for client, place in zip(clients, sorted((run / "adapters/local").iterdir()), strict=True):
        assert_close(load_file(place / "adapter_model.safetensors"), client.local)
    assert_answers_equal(run, model, family.attention)


def assert_close(found: plain.State, expected: plain.State) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        error = (found[key] - expected[key]).norm() / expected[key].norm().clamp_min(1e-12)
        assert error < TOLERANCE, (key, float(error))


def assert_answers_equal(run: Path, model: Path, attention: str) -> None:
    """Weights and texts of all answers, each computed alone."""
    (answers,) = run.glob("evaluations/*/answers")
    rows = [json.loads(line) for path in sorted(answers.iterdir()) for line in path.read_text().splitlines()]
    tests = [json.loads(line) for line in (model.parent / "data/test.jsonl").read_text().splitlines()]
    assert len(rows) == len(CLIENTS) * len(tests)
    for client in range(len(CLIENTS)):
        alone = PlainClient(model, run / "adapters", client, attention)
        for row in rows:
            if row["client"] == client:
                instruction = [test for test in tests if test["category"] == row["task"]][row["row"]]["instruction"]
                alpha = alone.alpha(instruction, "centred_cosine", 1.0, "last_token")
                assert row["alpha"] == pytest.approx(alpha, abs=1e-4), row
                assert row["text"] == alone.answer(instruction, alpha, BEAMS, NEW_TOKENS), row


def test_a_layer_that_the_model_never_computes_is_reported(tmp_path: Path) -> None:
    """The last layer of Gemma 3n has a gate that nothing after it reads."""
    family = families.FAMILIES["gemma3n_text"]
    model = families.make_family(tmp_path / "model", "gemma3n_text")
    data = tiny.make_federation(tmp_path / "data", CLIENTS, num_test=2)
    argv = recipe(model, data, tmp_path / "runs", family, lora__target_modules=["q_proj", "per_layer_input_gate"])
    (said,) = run_on_ranks(console_of_training, 1, tmp_path, argv)
    assert "model.layers.1.per_layer_input_gate had no gradient" in said


def console_of_training(job: Any, argv: Sequence[str]) -> str:
    import io
    from contextlib import redirect_stdout

    from dpa_ds.cli.session import train

    with redirect_stdout(io.StringIO()) as console:
        train(load_config(argv), job)
    return console.getvalue()
