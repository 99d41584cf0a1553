"""The planner's memory against the measured peak of a real step on 2 ranks."""

from pathlib import Path

import pytest

from benchmarks.memory import Setting, measure, write_model
from dpa_ds.planning.memory import Layout, step_bytes
from dpa_ds.planning.shapes import read_shape
from tests import tiny
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("stage", [0, 3])
def test_planned_is_measured(stage: int, tmp_path: Path) -> None:
    setting = Setting(256, 688, 6, vocab_size=4000)
    model = write_model(tmp_path / "model", setting)
    json = f"ds_configs/zero{stage}.json"
    argv = tiny.recipe(model, tmp_path / "data", tmp_path / "runs", lora__rank=8, engine__deepspeed_config=json)
    measured = run_on_ranks(measure, 2, tmp_path, setting, argv)[0]["peak"]
    shape = read_shape(str(model), None)
    planned = step_bytes(
        shape,
        shape.lora_parameters(8, ["q_proj", "v_proj"]),
        Layout(stage, 2, "fp32", 512, 256, reduce_bucket=50_000_000),
    )
    assert sum(planned.values()) == pytest.approx(measured, rel=0.1)
