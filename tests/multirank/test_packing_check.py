"""Rows of several examples only for models that keep them apart: tried on the model, and held against transformers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families, tiny
from tests.multirank.test_engine import build
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
LEAKING = {"lfm2": "sdpa", "recurrent_gemma": "sdpa", "gpt_oss": "eager"}
"""Families whose layers look at all of a row, and the attention they are tried with."""
EXACT = {"llama": "sdpa", "gemma3_text": "sdpa", "gpt2": "sdpa"}
NAMES = {"PackedAttention": "packed", "PaddedRows": "padded", "SingleRows": "single"}


def losses(job: Any, argv: Sequence[str], stage: str) -> tuple[str, float, float, float]:
    """How rows are placed, and the loss of seven examples: as rows are chosen, with many a row, and by transformers."""
    from dpa_ds.adapters.adapter_model import global_local_mix
    from dpa_ds.config.load import load_config
    from dpa_ds.data.batching import build_step
    from dpa_ds.data.formats import build_format
    from dpa_ds.data.sources import read_client
    from dpa_ds.data.tokenize import load_or_tokenize
    from dpa_ds.engine.packed_attention import PackedAttention
    from dpa_ds.engine.rows import Rows
    from dpa_ds.model.directory import load_tokenizer

    engine, _ = build(job, argv, stage)
    config = load_config(argv)
    directory = Path(config.model.path)
    example_format = build_format(load_tokenizer(directory), config.data)
    tokens = load_or_tokenize(read_client(config.data, 0, 0).train, example_format, config.data, "client")
    chosen = engine.rows

    def loss(rows: Rows) -> float:
        engine.rows = rows
        batching = rows.batching(256, 0)
        step = build_step(tokens, range(len(tokens)), engine.world.rank, engine.world.world_size, batching)
        return float(engine.loss([step], 0.0 * global_local_mix(0.0)))  # the base alone

    many = PackedAttention(engine.adapters.base_model)
    return NAMES[type(chosen).__name__], loss(chosen), loss(many), alone(directory, tokens, config.model.attention)


def alone(directory: Path, tokens: Any, attention: str) -> float:
    """One example at a time, with nothing of this project."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()
    total, count = 0.0, 0
    for index in range(len(tokens)):
        ids = torch.tensor(tokens.input_ids(index).astype("int64"))
        with torch.no_grad():
            logits = base(input_ids=ids[None], use_cache=False).logits[0, :-1]
        first = tokens.first_label(index)
        targets = ids[first:]
        total += float(torch.nn.functional.cross_entropy(logits[first - 1 :], targets, reduction="sum"))
        count += len(targets)
    return total / count


def tried(family: str, attention: str, stage: str, num_ranks: int, tmp_path: Path) -> tuple[str, float, float, float]:
    model = families.make_family(tmp_path / "model", family)
    data = tiny.make_federation(tmp_path / "data")
    settings = {"model__attention": attention, "lora__target_modules": list(families.FAMILIES[family].targets)}
    found: list[Any] = run_on_ranks(
        losses, num_ranks, tmp_path, tiny.recipe(model, data, tmp_path / "runs", **settings), stage
    )
    return tuple(found[0])  # type: ignore[return-value]


@pytest.mark.parametrize("family", LEAKING)
def test_a_model_that_mixes_a_row_gets_padded_rows(family: str, tmp_path: Path) -> None:
    rows, loss, packed, expected = tried(family, LEAKING[family], "zero1", 1, tmp_path)
    assert rows == "padded"
    assert loss == pytest.approx(expected, rel=1e-5)
    assert packed != pytest.approx(expected, rel=1e-4), "several a row would have been wrong"


@pytest.mark.parametrize("family", EXACT)
def test_a_model_that_keeps_them_apart_gets_many(family: str, tmp_path: Path) -> None:
    rows, loss, _, expected = tried(family, EXACT[family], "zero1", 1, tmp_path)
    assert rows == "packed"
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("family", "rows"), [("lfm2", "padded"), ("llama", "packed")])
def test_under_zero_3(family: str, rows: str, tmp_path: Path) -> None:
    found, loss, _, expected = tried(family, "sdpa", "zero3", 2, tmp_path)
    assert (found, loss) == (rows, pytest.approx(expected, rel=1e-5))


def rows_of(job: Any, argv: Sequence[str], precision: str) -> str:
    from dpa_ds.errors import ModelError

    try:
        engine, _ = build(job, argv, precision=precision)
    except ModelError as error:
        return str(error)
    return NAMES[type(engine.rows).__name__]


@pytest.mark.parametrize(("family", "rows"), [("lfm2", "padded"), ("qwen3_moe", "packed"), ("gpt_oss", "padded")])
def test_in_16_bits_rounding_is_no_leak_and_a_leak_no_rounding(family: str, rows: str, tmp_path: Path) -> None:
    """Also where a router may choose another expert by rounding alone."""
    model = families.make_family(tmp_path / "model", family)
    data = tiny.make_federation(tmp_path / "data")
    attention = families.FAMILIES[family].attention
    argv = tiny.recipe(model, data, tmp_path / "runs", model__attention=attention)
    assert run_on_ranks(rows_of, 1, tmp_path, argv, "bf16") == [rows]


def test_a_base_that_computes_nan_is_said_to_be_at_fault(tmp_path: Path) -> None:
    """All of its weights are finite, but in fp32 their products are not."""
    model = tiny.make_model(tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "up_proj" in name or "down_proj" in name:
            tensors[name] *= 1e20
    save_file(tensors, file, metadata={"format": "pt"})
    argv = tiny.recipe(model, tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    (said,) = run_on_ranks(rows_of, 1, tmp_path, argv, "fp32")
    assert "the base model (LlamaForCausalLM) returns NaN or infinity before anything is trained" in said
