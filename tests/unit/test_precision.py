"""In which precision a job computes, and how a CPU computes attention in 16 bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpa_ds.cli.precision import settle_precision
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import ModelConfig
from dpa_ds.model.cpu_attention import sdpa
from dpa_ds.model.precision import check_precision, native_precision
from tests import tiny
from tests.ranks import run_on_ranks

# ---- auto -----------------------------------------------------------------------------------------------------------


def settled(job: Any, run_dir: str, without_bf16: tuple[int, ...]) -> str:
    """The precision of a rank; those of `without_bf16` have a CPU without instructions for it, the others with."""
    computes = job.launch.global_rank not in without_bf16
    torch.cpu._is_avx512_bf16_supported = lambda: computes
    torch.cpu._is_amx_tile_supported = lambda: False
    return settle_precision(ModelConfig(path="m"), Path(run_dir), job).precision


@pytest.mark.parametrize(("without_bf16", "expected"), [((), "bf16"), ((1,), "fp32"), ((0, 1), "fp32")])
def test_a_new_run_has_what_all_ranks_compute_natively(
    without_bf16: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    assert run_on_ranks(settled, 2, tmp_path, str(tmp_path / "run"), without_bf16) == [expected] * 2


@pytest.mark.parametrize("recorded", ["fp32", "bf16", "fp16"])
def test_a_run_that_exists_keeps_its_precision(recorded: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(f"model: {{path: m, precision: {recorded}}}\ndata: {{path: d}}\n")
    assert run_on_ranks(settled, 2, tmp_path, str(run_dir), (0,)) == [recorded] * 2


def test_a_recipe_that_names_no_precision_has_auto(tmp_path: Path) -> None:
    argv = tiny.recipe(tmp_path, tmp_path, tmp_path)
    assert load_config([*argv, "--model.precision=auto"]).model == ModelConfig(path=str(tmp_path))


def test_this_cpu() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = "bf16" if {"avx512_bf16", "amx_tile"} & set(flags) else "fp32"
    assert native_precision("cpu") == expected
    check_precision(expected, torch.device("cpu"))


# ---- attention in fp32 ----------------------------------------------------------------------------------------------


def attend(function: Any, dtype: torch.dtype, masked: str) -> list[torch.Tensor]:
    """The output, and gradients of queries, keys and values: 4 heads that share 2 of keys."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    shapes = [(3, 4, 11, 16), (3, 2, 11, 16), (3, 2, 11, 16)]
    inputs = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    mask = None
    if masked != "causal":
        mask = torch.ones(11, 11, dtype=torch.bool).tril().expand(3, 1, 11, 11).clone()
        mask[0, :, :, 1] = False
        mask[0, :, 1, 1] = True
    if mask is not None and masked == "additive":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    output, _ = function(module, *inputs, mask, scaling=0.25)
    output.float().square().sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("masked", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_16_bit_is_that_of_fp32_rounded_once(dtype: torch.dtype, masked: str) -> None:
    exact = attend(sdpa_attention_forward, torch.float32, masked)
    found = attend(sdpa, dtype, masked)
    assert [tensor.dtype for tensor in found] == [dtype] * 4
    assert torch.equal(found[0], exact[0].to(dtype))
    for ours, expected in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)


def test_attention_of_fp32_stays_what_it_was() -> None:
    for ours, plain in zip(
        attend(sdpa, torch.float32, "boolean"), attend(sdpa_attention_forward, torch.float32, "boolean"), strict=True
    ):
        assert torch.equal(ours, plain)
