"""Rows of several examples only for models that keep them apart: tried on the model, and held against transformers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import families, tiny
from tests.multirank.test_engine import build
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
LEAKING = {"lfm2": "sdpa", "recurrent_gemma": "sdpa", "gpt_oss": "eager"}
"""Families whose layers look at all of a row, and the attention they are tried with."""
EXACT = {"llama": "sdpa", "gemma3_text": "sdpa", "gpt2": "sdpa"}
TARGETS = {"gpt2": ["c_attn"]}


def losses(job: Any, argv: Sequence[str], stage: str) -> tuple[str, float, float, float]:
    """What rows may hold, and the loss of seven examples: as rows are chosen, with many a row, and by transformers."""
    from dpa_ds.adapters.adapter_model import global_local_mix
    from dpa_ds.config.load import load_config
    from dpa_ds.data.batching import build_step
    from dpa_ds.data.sources import read_client
    from dpa_ds.data.tokenize import load_or_tokenize
    from dpa_ds.engine.packing_check import Rows
    from dpa_ds.model.directory import load_tokenizer

    engine, _ = build(job, argv, stage)
    config = load_config(argv)
    directory = Path(config.model.path)
    tokens = load_or_tokenize(read_client(config.data, 0, 0).train, load_tokenizer(directory), config.data, "client")
    chosen = engine.packing.rows

    def loss(rows: Rows) -> float:
        engine.packing.rows = rows
        batching = engine.packing.batching(256, 0)
        step = build_step(tokens, range(len(tokens)), engine.world.rank, engine.world.world_size, batching)
        return float(engine.loss([step], 0.0 * global_local_mix(0.0)))  # the base alone

    return chosen.name, loss(chosen), loss(Rows.MANY), alone(directory, tokens, config.model.attention)


def alone(directory: Path, tokens: Any, attention: str) -> float:
    """One example at a time, with nothing of this project."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()
    total, count = 0.0, 0
    for index in range(len(tokens)):
        ids = torch.tensor(tokens.input_ids(index).astype("int64"))
        with torch.no_grad():
            logits = base(input_ids=ids[None], use_cache=False).logits[0, :-1]
        first = max(1, int(tokens.prompt_lengths[index]))
        targets = ids[first:]
        total += float(torch.nn.functional.cross_entropy(logits[first - 1 :], targets, reduction="sum"))
        count += len(targets)
    return total / count


def tried(family: str, attention: str, stage: str, num_ranks: int, tmp_path: Path) -> tuple[str, float, float, float]:
    model = families.make_family(tmp_path / "model", family)
    data = tiny.make_federation(tmp_path / "data")
    settings = {"model__attention": attention, "lora__target_modules": TARGETS.get(family, ["q_proj", "v_proj"])}
    found: list[Any] = run_on_ranks(
        losses, num_ranks, tmp_path, tiny.recipe(model, data, tmp_path / "runs", **settings), stage
    )
    return tuple(found[0])  # type: ignore[return-value]


@pytest.mark.parametrize("family", LEAKING)
def test_a_model_that_mixes_a_row_gets_one_example_a_row(family: str, tmp_path: Path) -> None:
    rows, loss, packed, expected = tried(family, LEAKING[family], "zero1", 1, tmp_path)
    assert rows == "ONE"
    assert loss == pytest.approx(expected, rel=1e-5)
    assert packed != pytest.approx(expected, rel=1e-4), "several a row would have been wrong"


@pytest.mark.parametrize("family", EXACT)
def test_a_model_that_keeps_them_apart_gets_many(family: str, tmp_path: Path) -> None:
    rows, loss, _, expected = tried(family, EXACT[family], "zero1", 1, tmp_path)
    assert rows == "MANY"
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("family", "rows"), [("lfm2", "ONE"), ("llama", "MANY")])
def test_under_zero_3(family: str, rows: str, tmp_path: Path) -> None:
    found, loss, _, expected = tried(family, "sdpa", "zero3", 2, tmp_path)
    assert (found, loss) == (rows, pytest.approx(expected, rel=1e-5))
