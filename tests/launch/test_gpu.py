"""A GPU computes what the CPU does: the same recipe on both, layouts of ZeRO, bf16. Skipped where there is none; CI has none."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.launch.processes import RUN, adapters, assert_same_adapters, run

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def trained(folder: Path, device: str, **overrides: object) -> dict[str, torch.Tensor]:
    """Adapters of a run of two rounds, four clients on one rank."""
    folder.mkdir()
    model, data = tiny.make_model(folder / "model"), tiny.make_federation(folder / "data")
    argv = tiny.recipe(model, data, folder / "runs", cluster__device=device, train__learning_rate=1e-3, **overrides)
    ended = run([*RUN, *argv], 300.0)
    assert ended.returncode == 0, ended.output
    return adapters(folder / "runs" / "tiny")


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu"])
def test_fp32_is_that_of_the_cpu(stage: str, tmp_path: Path) -> None:
    config = f"ds_configs/{stage}.json"
    on_gpu = trained(tmp_path / "gpu", "auto", engine__deepspeed_config=config)
    assert_same_adapters(on_gpu, trained(tmp_path / "cpu", "cpu"), tolerance=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_is_close_to_fp32(attention: str, tmp_path: Path) -> None:
    """Adam's first steps are signs, which rounding turns: the direction is compared, not every number."""
    words = {"model__precision": "bf16", "model__attention": attention}
    on_gpu, on_cpu = trained(tmp_path / "gpu", "auto", **words), trained(tmp_path / "cpu", "cpu")
    flat = [torch.cat([one[key].flatten() for key in sorted(on_cpu) if ".lora_B." in key]) for one in (on_gpu, on_cpu)]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.95
