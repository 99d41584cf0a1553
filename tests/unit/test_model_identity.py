"""Which base a run belongs to, and whether it fits one rank."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpa_ds.config.schema import ModelConfig
from dpa_ds.errors import CheckpointError, ModelError
from dpa_ds.model import base
from dpa_ds.model.directory import load_tokenizer, model_fingerprint, read_config
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


def test_no_file_of_a_model_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody, or a pipe, says yes to the question of transformers."""
    directory = tmp_path / "evil"
    directory.mkdir()
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    named = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": named}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": named}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (read_config, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"evil brings code of its own \(auto_map: evil.Evil\), which is never run"
        ):
            load(directory)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Phi-3 and Falcon: files from before transformers had the architecture."""
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    named = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | {"auto_map": named}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    read_and_load(directory)
    load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()


def read_and_load(directory: Path) -> None:
    read_config(directory)
    base.load_base(ModelConfig(path=str(directory), precision="fp32"), directory, {}, torch.device("cpu"))


NONSENSE = [
    ({"num_hidden_layers": 10_000_000}, "num_hidden_layers must be at most 10000, got 10000000"),
    ({"vocab_size": 10**15}, "vocab_size must be at most 100000000, got"),
    ({"attention_dropout": "much"}, r"attention_dropout|much"),
    ({"attention_dropout": 7}, r"attention_dropout must be a number in \[0, 1\), got 7"),
    ({"hidden_act": "nonsense"}, "config.json describes no model .*nonsense.*: correct it"),
    ({"pad_token_id": 10**6}, "config.json describes no model .*: correct it"),
]


@pytest.mark.parametrize(("changes", "fault"), NONSENSE, ids=lambda case: str(case)[:40])
def test_nonsense_in_the_config_is_one_line(
    changes: dict[str, object], fault: str, model: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=fault) as caught:
        read_and_load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beside_a_model", [True, False])
def test_an_adapter_is_no_base(beside_a_model: bool, model: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names; merged, any adapter is a base, one of DoRA too."""
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    config = peft.LoraConfig(use_dora=True, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dora = peft.get_peft_model(whole, config).eval()
    dora.save_pretrained(directory)
    if not beside_a_model:
        (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"holds a PEFT adapter .*not a base: give the base, or merge") as caught:
        read_and_load(directory)
    assert "\n" not in str(caught.value)

    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        expected = dora(input_ids=ids).logits
        merged = Path(shutil.copytree(model, tmp_path / "merged"))
        dora.merge_and_unload().save_pretrained(merged)
        loaded = base.load_base(ModelConfig(path=str(merged), precision="fp32"), merged, {}, torch.device("cpu"))
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_nonsense_in_the_tokenizers_config_is_one_line(model: Path, tmp_path: Path) -> None:
    """A setting that loading does not look at; the first text did, with a TypeError."""
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(ModelError, match=r"no usable tokenizer in .*tokenizer_config\.json, undamaged") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite(number: float, model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(model, tmp_path / "llama"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = number
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor 'model.norm.weight' of the base model has NaN or infinity: download"):
        read_and_load(directory)


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
    with pytest.raises(
        CheckpointError, match=r"the base model, or its chat template, differs .* set model.path to the right one"
    ):
        folder.check_model("4567")


def test_a_base_fits_where_a_quarter_of_the_memory_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    num_parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    for precision, num_bytes in (("fp32", 4 * num_parameters), ("bf16", 2 * num_parameters)):
        config = ModelConfig(precision=precision)
        for memory, ranks_on_host, fits in (
            (num_bytes / 0.75 + 1, 1, True),
            (num_bytes / 0.75 - 1, 1, False),
            (num_bytes / 0.75 + 1, 2, False),  # on a CPU the ranks of a host share its memory
            (2 * num_bytes / 0.75 + 2, 2, True),
        ):
            monkeypatch.setattr(base, "free_memory", lambda _device, memory=memory: memory)
            assert base.fits_one_rank(config, model, torch.device("cpu"), ranks_on_host) == fits, (
                precision,
                memory,
                ranks_on_host,
            )
