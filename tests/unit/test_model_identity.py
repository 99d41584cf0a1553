"""Which base a run belongs to, and whether it fits one rank."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpa_ds.errors import CheckpointError
from dpa_ds.model import base
from dpa_ds.model.directory import model_fingerprint
from dpa_ds.runs.folder import MODEL, RunFolder
from dpa_ds.runs.storage import write_file
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model") / "llama")


def test_a_copy_has_the_same_fingerprint(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    assert model_fingerprint(copy) == model_fingerprint(model)
    assert len(model_fingerprint(model)) == 16


def flip_a_weight(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def change_the_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def change_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")


def use_another_model(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.make_model(folder, seed=1)


@pytest.mark.parametrize("change", [flip_a_weight, change_the_config, change_the_tokenizer, use_another_model])
def test_another_model_has_another_fingerprint(model: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change(folder)
    assert model_fingerprint(folder) != model_fingerprint(model)


def test_a_run_refuses_another_base_and_takes_one_that_names_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_model("0123")  # a new run
    write_file(tmp_path / MODEL, '{"fingerprint": "0123", "path": "models/x"}')
    folder.check_model("0123")
    with pytest.raises(CheckpointError, match=r"the base model differs .* set model.path to the right one"):
        folder.check_model("4567")


def test_a_base_fits_where_a_quarter_of_the_memory_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    num_parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    for precision, num_bytes in (("fp32", 4 * num_parameters), ("bf16", 2 * num_parameters)):
        for memory, ranks_on_host, fits in (
            (num_bytes / 0.75 + 1, 1, True),
            (num_bytes / 0.75 - 1, 1, False),
            (num_bytes / 0.75 + 1, 2, False),  # on a CPU the ranks of a host share its memory
            (2 * num_bytes / 0.75 + 2, 2, True),
        ):
            monkeypatch.setattr(base, "free_memory", lambda _device, memory=memory: memory)
            assert base.fits_one_rank(model, precision, torch.device("cpu"), ranks_on_host) == fits, (
                precision,
                memory,
                ranks_on_host,
            )
