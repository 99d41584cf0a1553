"""The benchmarks compare equal work: ours has the loss of Hugging Face's own Trainer, in both phases; and they end with ratios."""

import json
import re
from pathlib import Path

import pytest

from tests.launch.processes import PYTHON, run

pytestmark = pytest.mark.launch


def test_a_step_is_that_of_the_trainer(model: Path, federation: Path, tmp_path: Path) -> None:
    found, picture = tmp_path / "found.json", tmp_path / "found.png"
    words = (
        f"--model {model} --data {federation} --client 1 --batch_size 4 --steps 1 --repeats 2 --threads 1 --clock cpu"
    )
    words += f" --trainer_batch 2 4 --floor_tokens 128 --device cpu --parts --json {found} --picture {picture}"
    ended = run([PYTHON, "benchmarks/train_step.py", *words.split()], 240.0)
    assert ended.returncode == 0, ended.output
    result = json.loads(found.read_text())
    assert result["first_loss_relative_difference"] < 1e-5
    variants = [(v["name"], v["phase"]) for v in result["variants"]]
    names = ("ours", "ours, no prefix", "ours, PEFT layers", "ours, neither", "Trainer, batch 2", "Trainer, batch 4")
    assert variants == [(name, phase) for phase in ("global", "local") for name in names] + [
        ("floor, 128 tokens", "any")
    ]
    losses = {(v["name"], v["phase"]): v["losses"] for v in result["variants"]}
    for phase in ("global", "local"):
        ours = losses["ours", phase]
        assert losses["Trainer, batch 2", phase] == pytest.approx(ours, rel=1e-5), phase
    assert losses["ours", "global"] != losses["ours", "local"]
    for variant in result["variants"]:
        assert len(variant["seconds"]) == 2
        shares = variant["name"] in ("ours", "ours, PEFT layers")
        assert (variant["real_over_computed"] > 1) == shares
        for median, lowest, highest in variant["ours_over_this"].values():
            assert 0 < lowest <= median <= highest
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_a_round_costs_beside_its_steps() -> None:
    ended = run([PYTHON, "benchmarks/round.py", "--model", "llama-1b", "--repeats", "2"], 240.0)
    assert ended.returncode == 0, ended.output
    assert " s: aggregation beside a bare all-reduce\n" in ended.output, "it says what it is at"
    ratios = re.findall(
        r"(aggregation / bare all-reduce|large base / small base) +(\S+) \((\S+) to (\S+)\)", ended.output
    )
    assert [name for name, *_ in ratios] == ["aggregation / bare all-reduce", "large base / small base"]
    assert all(0 < float(low) <= float(median) <= float(high) for _, median, low, high in ratios)


def test_a_step_beside_its_plan() -> None:
    """Case 7: ZeRO 3 in bf16. Bytes are counted, and equal the plan on any machine."""
    ended = run([PYTHON, "benchmarks/planner.py", "--cases", "7"], 240.0, PYTHONPATH="")
    assert ended.returncode == 0, ended.output
    (line,) = (line for line in ended.output.splitlines() if line.startswith("ZeRO 3, bf16"))
    measured, planned, ratio, gathered, gathers_planned, gather_ratio, to_floor = map(float, line[52:].split())
    assert ratio == pytest.approx(measured / planned, abs=0.01)
    assert ratio == pytest.approx(1.0, abs=0.1)
    assert gather_ratio == pytest.approx(gathered / gathers_planned, abs=0.02)
    assert gather_ratio == pytest.approx(1.0, abs=0.1)
    assert to_floor >= 1.0
