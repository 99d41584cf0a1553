"""P and TTP between rounds: the same on every layout, and the same as an evaluation of that round afterwards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clients whose answers are easy: one letter that depends on the task and on the first word."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data" / "2").mkdir(parents=True)
    test = []
    for k, task in enumerate(("colour", "count")):
        rows = [
            {"instruction": f"{task} {word}", "output": "abcd"[2 * k + (word in "red dog")], "category": task}
            for word in ("red", "cat", "dog", "far", "one", "two")
        ]
        (folder / "data" / "2" / f"local_training_{k}.json").write_text(json.dumps(rows))
        test += rows[:3]
    # A task that no client trains on: UNSEEN of the evaluation, and no part of TTP.
    test += [{"instruction": f"riddle {word}", "output": "e", "category": "riddle"} for word in ("red", "cat", "dog")]
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return tiny.make_model(folder / "model"), folder / "data"


def train(inputs: tuple[Path, Path], folder: Path, num_ranks: int, **overrides: Any) -> list[dict[str, float]]:
    """One round, long enough for some answers to come out right; P and TTP of each client."""
    folder.mkdir()
    argv = tiny.recipe(
        *inputs,
        folder / "runs",
        federation__num_rounds=1,
        lora__target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        train__local_epochs=40.0,
        evaluation__scores_every_rounds=1,
        evaluation__instances_per_task=3,
        generation__num_beams=2,
        generation__max_new_tokens=12,
        **overrides,
    )
    run_on_ranks(train_on_rank, num_ranks, folder, argv)
    records = read_records(folder / "runs" / "tiny" / "metrics.jsonl")
    assert not any("P" in record for record in records if record["round"] == 0)
    clients = [r for r in records if r["kind"] == "client" and r["round"] == 1]
    (whole,) = [r for r in records if r["kind"] == "round" and r["round"] == 1]
    for name in ("P", "TTP"):
        assert whole[name] == pytest.approx(sum(client[name] for client in clients) / len(clients))
    return [{name: client[name] for name in ("P", "TTP")} for client in clients]


def evaluate_on_rank(job: Any, argv: Sequence[str]) -> None:
    from dpa_ds.cli.evaluate import load
    from dpa_ds.evaluation.runner import evaluate

    evaluate(load(argv), job)


def test_scores_do_not_depend_on_the_layout_and_equal_an_evaluation(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    layouts = {
        "two groups": train(inputs, tmp_path / "a", 2),
        "two ranks share every batch": train(inputs, tmp_path / "b", 2, cluster__ranks_per_group=2),
    }
    expected = layouts["two groups"]
    assert any(0 < client["TTP"] < 100 for client in expected), "a trivial score shows nothing"
    assert layouts["two ranks share every batch"] == [pytest.approx(client) for client in expected]

    run_dir = tmp_path / "a" / "runs" / "tiny"
    run_on_ranks(evaluate_on_rank, 1, tmp_path, ["--run", str(run_dir)])
    (path,) = run_dir.glob("evaluations/*/*/summary.json")
    clients = json.loads(path.read_text())["clients"]
    assert [{name: c[name]["rouge1"] for name in ("P", "TTP")} for c in clients] == [pytest.approx(c) for c in expected]
