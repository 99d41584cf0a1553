"""The DeepSpeed config of a rank group: what is refused beside what the loader of the file refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.schema import TrainConfig
from dpa_ds.engine.engine import UNSUPPORTED, build_deepspeed_json
from dpa_ds.errors import ConfigError


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_would_round_the_adapters_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"mine.json: zero_optimization.{key} is not supported: .*; remove it"):
        build_deepspeed_json({"zero_optimization": {"stage": 3, key: True}}, "mine.json", TrainConfig(), "bf16", 2)


@pytest.mark.parametrize(("partition_size", "world_size"), [(2, 3), (3, 4), (8, 12)])
def test_a_second_share_divides_the_rank_group(partition_size: int, world_size: int) -> None:
    file_json = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": partition_size}}
    message = f"{partition_size} does not divide the rank group of {world_size} ranks"
    with pytest.raises(ConfigError, match=message):
        build_deepspeed_json(file_json, "mine.json", TrainConfig(), "bf16", world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_the_shipped_partition_size_fits(world_size: int) -> None:
    file_json = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    assert build_deepspeed_json(file_json, "zeropp.json", TrainConfig(), "bf16", world_size)


SIZES = ("reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("stage", value) for value in (7, -1, True, 1.0, "3", None)),
        *((key, value) for key in SIZES for value in (-1, "5e8", None, True, 2**63)),
        *(("zero_hpz_partition_size", value) for value in (0, "8", None)),
    ],
)
def test_what_the_planner_reads_is_checked_without_deepspeed(key: str, value: Any, tmp_path: Path) -> None:
    """It ended in a traceback in launch/plan.py."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {key: value}}))
    with pytest.raises(ConfigError, match=f"ds.json: zero_optimization.{key} must be a"):
        load_deepspeed_json(str(path))


def test_sizes_in_powers_of_ten_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 0}}')
    assert load_deepspeed_json(str(path))["zero_optimization"]["reduce_bucket_size"] == 5e8


def test_an_offloaded_optimizer_needs_no_other_key_and_takes_none_that_contradicts() -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert build_deepspeed_json(offload, "mine.json", TrainConfig(), "bf16", 2)["zero_force_ds_cpu_optimizer"] is False
    contradicted = {**offload, "zero_force_ds_cpu_optimizer": True}
    with pytest.raises(ConfigError, match=r"mine.json: zero_force_ds_cpu_optimizer true does not go with"):
        build_deepspeed_json(contradicted, "mine.json", TrainConfig(), "bf16", 2)


@pytest.mark.parametrize(
    "content",
    [
        {"sparse_gradients": True},
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 2.0},
        {"pipeline": {"stages": 2}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
    ],
)
def test_keys_that_were_not_tried_are_refused_by_name(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    name = "zero_optimization.offload_optimizer.ratio" if "zero_optimization" in content else next(iter(content))
    with pytest.raises(ConfigError, match=f'mine.json: "{name}" is not a key that the JSON may have'):
        load_deepspeed_json(str(path))
