"""Every model family that users have, against transformers and PEFT alone: losses, adapters, weights and answers.

Tiny random models. When a new transformers release changes a family, its row says so.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dpa_ds.config.load import load_config
from tests import families, plain, tiny
from tests.plain_inference import PlainClient
from tests.plain_start import start_plain
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
CLIENTS, NEW_TOKENS, BEAMS, ALPHA = (5, 4), 5, 2, 0.4
TOLERANCE = 1e-3


def train_and_evaluate(job: Any, training: Sequence[str], evaluation: Sequence[str]) -> None:
    """A round of two clients, and every client's answers to every test row."""
    from dpa_ds.cli.evaluate import load
    from dpa_ds.cli.session import train
    from dpa_ds.evaluation.runner import evaluate

    train(load_config(training), job)
    evaluate(load(evaluation), job)


def recipe(model: Path, data: Path, folder: Path, family: families.Family, **more: Any) -> list[str]:
    settings = {
        "model__attention": family.attention,
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


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_equals_transformers_and_peft(name: str, tmp_path: Path) -> None:
    """Costs 2 s a family: the price of knowing what a new release of transformers changes."""
    family = families.FAMILIES[name]
    model = families.make_family(tmp_path / "model", name)
    data = tiny.make_federation(tmp_path / "data", CLIENTS, num_test=2)
    training = recipe(model, data, tmp_path / "runs", family)
    run = tmp_path / "runs" / "tiny"
    evaluation = ["--run", str(run), f"--beams={BEAMS}", f"--max_new_tokens={NEW_TOKENS}"]
    run_on_ranks(train_and_evaluate, 1, tmp_path, training, evaluation)

    config = load_config(training)
    reference, clients, start = start_plain(config)
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
