"""A base in 8 and 4 bits: adapters, losses and answers are those of transformers, PEFT and bitsandbytes alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dpa_ds.config.load import load_config
from tests import plain, tiny
from tests.launch.processes import REPOSITORY
from tests.multirank.test_evaluation import Run, answers, summary
from tests.multirank.test_invariance import Adapters
from tests.plain_inference import PlainClient
from tests.plain_start import start_plain
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
pytest.importorskip("bitsandbytes")
ROUNDS, ALPHA_MIX = 2, 0.4
TOLERANCE = 1e-3  # one row alone has equal bits; AdamW enlarges the rounding of rows that are packed
KINDS = ["int8", "nf4"]
SMOLLM = REPOSITORY / ".cache" / "demo" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny.make_model(folder / "model", hidden_size=64, intermediate_size=128)
    file = model / "model.safetensors"
    # Numbers that bf16 has: else other codes would come of them in bf16.
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    return model, tiny.make_federation(folder / "data", sizes=(7, 5)), folder


def settings(kind: str, **overrides: Any) -> dict[str, Any]:
    return {
        "model__quantization": kind,
        "method__alpha": ALPHA_MIX,
        "federation__num_rounds": ROUNDS,
        "lora__target_modules": "all-linear",
        # AdamW enlarges the rounding of gradients that are nearly zero: with a larger epsilon less.
        "train__adam_epsilon": 1e-5,
        **overrides,
    }


def run(inputs: Any, tmp_path: Path, num_ranks: int, kind: str, **overrides: Any) -> Adapters:
    model, data, _ = inputs
    tmp_path.mkdir(exist_ok=True)
    argv = tiny.recipe(model, data, tmp_path / "runs", **settings(kind, **overrides))
    run_on_ranks(train_on_rank, num_ranks, tmp_path, argv)
    adapters = tmp_path / "runs" / "tiny" / "adapters"
    return Adapters(
        load_file(adapters / "global" / "adapter_model.safetensors"),
        [load_file(folder / "adapter_model.safetensors") for folder in sorted((adapters / "local").iterdir())],
    )


def reference(inputs: Any, kind: str, **overrides: Any) -> tuple[Adapters, list[plain.Client]]:
    """feddpa_t by the plain loop, and the clients with the losses of their steps."""
    model, data, folder = inputs
    config = load_config(tiny.recipe(model, data, folder / f"reference-{kind}", **settings(kind, **overrides)))
    plain_model, clients, initial = start_plain(config)
    final = plain.feddpa_t(plain_model, clients, initial, config.federation.num_rounds, ALPHA_MIX)
    return Adapters(final, [client.local for client in clients]), clients


@pytest.fixture(scope="module")
def references(inputs: Any) -> dict[str, Adapters]:
    """For each kind."""
    return {kind: reference(inputs, kind)[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_group", "stage"),
    [(1, 1, 0), (1, 1, 1), (1, 1, 2), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2)],
)
def test_every_layout_gives_the_adapters_of_a_plain_loop(
    inputs: Any, references: Any, tmp_path: Path, num_ranks: int, ranks_per_group: int, stage: int, kind: str
) -> None:
    result = run(
        inputs,
        tmp_path,
        num_ranks,
        kind,
        cluster__ranks_per_group=ranks_per_group,
        engine__deepspeed_config=f"ds_configs/zero{stage}.json",
    )
    result.assert_close(references[kind], TOLERANCE)


def test_the_kinds_differ_by_more_than_what_is_tolerated(references: Any) -> None:
    """Else the comparison above would say nothing of the weights."""
    with pytest.raises(AssertionError):
        references["int8"].assert_close(references["nf4"], 10 * TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_resumes_after_an_evaluation_gives_the_same_bits(inputs: Any, tmp_path: Path, kind: str) -> None:
    """The held-out loss is computed in every round: it must leave no trace in the layers that train on."""
    straight = run(inputs, tmp_path / "straight", 1, kind)
    run(inputs, tmp_path / "resumed", 1, kind, federation__num_rounds=1)
    resumed = run(inputs, tmp_path / "resumed", 1, kind)
    resumed.assert_close(straight, 1e-30)


def test_another_kind_is_another_run(inputs: Any, tmp_path: Path) -> None:
    run(inputs, tmp_path, 1, "int8", federation__num_rounds=1)
    with pytest.raises(AssertionError, match=r'model\.quantization: "int8" -> "nf4"'):
        run(inputs, tmp_path, 1, "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_quantised_already_is_trained_as_it_is(
    inputs: Any, references: Any, tmp_path: Path, kind: str
) -> None:
    model, data, folder = inputs
    stored = tmp_path / "model"
    plain.load_base(model, kind).save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, stored / name)
    run((stored, data, folder), tmp_path, 1, "none").assert_close(references[kind], TOLERANCE)
    other = "nf4" if kind == "int8" else "int8"
    with pytest.raises(AssertionError, match=f"model.quantization is {other}, but .* says that the files are {kind}"):
        run((stored, data, folder), tmp_path / "other", 1, other)


@pytest.mark.parametrize("kind", KINDS)
def test_alphas_and_answers_equal_a_plain_computation(inputs: Any, tmp_path: Path, kind: str) -> None:
    model, data, _ = inputs
    run(inputs, tmp_path, 1, kind, train__max_steps=20, train__learning_rate=3e-2, data__template="{instruction}")
    trained = Run(tmp_path / "runs" / "tiny", model, data)
    found = answers(trained.evaluate(tmp_path, "--lambda=2.0"))
    assert len({text for _, text in found.values()}) > len(trained.test_rows)
    for client in range(2):
        reference = PlainClient(model, trained.folder / "adapters", client, quantization=kind)
        for task, row, instruction in trained.test_rows:
            alpha, text = found[client, task, row]
            expected = reference.alpha(instruction, "centred_cosine", 2.0, "last_token")
            assert alpha == pytest.approx(expected, abs=1e-5)
            assert text == reference.answer(instruction, expected, 1, 8)


def test_zero_3_is_refused_in_training_and_for_answers(inputs: Any, tmp_path: Path) -> None:
    reason = r"a base in int8 \(model.quantization\) does not go with ZeRO-3"
    with pytest.raises(AssertionError, match=reason):
        run(inputs, tmp_path / "zero3", 1, "int8", engine__deepspeed_config="ds_configs/zero3.json")
    run(inputs, tmp_path, 1, "int8", federation__num_rounds=1)
    trained = Run(tmp_path / "runs" / "tiny", *inputs[:2])
    with pytest.raises(AssertionError, match=reason):
        trained.evaluate(tmp_path, "--evaluation.sharding=always", num_ranks=2)


def assert_losses(run_dir: Path, clients: list[plain.Client]) -> None:
    """Mean losses of the phases of the first round, against those of the plain loop's steps."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [one for one in records if one["kind"] == "client" and one["round"] == 1]
    assert len(found) == len(clients)
    for record, client in zip(found, clients, strict=True):
        steps = int(record["num_steps"])
        of_global, of_local = client.history[: steps // 2], client.history[steps // 2 : steps]
        assert record["global_loss"] == pytest.approx(sum(of_global) / len(of_global), rel=TOLERANCE)
        assert record["local_loss"] == pytest.approx(sum(of_local) / len(of_local), rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_a_plain_loop(inputs: Any, tmp_path: Path, kind: str) -> None:
    _, clients = reference(inputs, kind, federation__num_rounds=1)
    run(inputs, tmp_path, 1, kind, federation__num_rounds=1)
    assert_losses(tmp_path / "runs" / "tiny", clients)


@pytest.mark.skipif(not SMOLLM.is_dir(), reason="the demo's model is not here (make demo)")
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_gives_the_losses_adapters_and_answers_of_a_plain_loop(tmp_path: Path, kind: str) -> None:
    """A minute each: SmolLM2-135M is loaded three times, and takes four steps in both ways."""
    real = (SMOLLM, tiny.make_federation(tmp_path / "data", sizes=(4,), num_test=1), tmp_path)
    few = {"federation__num_rounds": 1, "train__max_steps": 2, "lora__target_modules": ["q_proj", "v_proj"]}
    few |= {"data__template": "{instruction}", "train__learning_rate": 2e-3}
    expected, clients = reference(real, kind, **few)
    run(real, tmp_path, 1, kind, **few).assert_close(expected, 1e-3)
    assert_losses(tmp_path / "runs" / "tiny", clients)
    trained = Run(tmp_path / "runs" / "tiny", *real[:2])
    weighting = ("--weighting=cosine", "--lambda=0.5")  # with one client there is no mean of others to centre by
    client = PlainClient(SMOLLM, trained.folder / "adapters", 0, quantization=kind)
    for (_, task, row), (alpha, text) in answers(trained.evaluate(tmp_path, *weighting)).items():
        (instruction,) = [asked for name, number, asked in trained.test_rows if (name, number) == (task, row)]
        assert alpha == pytest.approx(client.alpha(instruction, "cosine", 0.5, "last_token"), abs=1e-4)
        assert text == client.answer(instruction, alpha, 1, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_nothing(inputs: Any, references: Any, tmp_path: Path, kind: str) -> None:
    run(inputs, tmp_path, 1, kind, model__gradient_checkpointing=True).assert_close(references[kind], TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_bf16_go_the_same_way(inputs: Any, references: Any, tmp_path: Path, kind: str) -> None:
    """DeepSpeed casts a module to bf16 as it takes it over: codes and scales must not be among what it casts."""
    found = run(inputs, tmp_path, 2, kind, model__precision="bf16", cluster__ranks_per_group=2)
    for key, expected in references[kind].global_state.items():
        cosine = (found.global_state[key] * expected).sum() / (found.global_state[key].norm() * expected.norm())
        assert cosine > 0.9, (key, float(cosine))


def test_a_run_may_be_evaluated_over_the_plain_base(inputs: Any, tmp_path: Path) -> None:
    run(inputs, tmp_path, 1, "nf4", federation__num_rounds=1)
    trained = Run(tmp_path / "runs" / "tiny", *inputs[:2])
    as_trained = trained.evaluate(tmp_path)
    plain_base = trained.evaluate(tmp_path, "--model.quantization=none")
    assert as_trained.parent != plain_base.parent
    assert summary(as_trained)["settings"]["precision"] == "fp32+nf4"
    assert summary(plain_base)["settings"]["precision"] == "fp32"
