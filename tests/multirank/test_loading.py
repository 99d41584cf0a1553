"""Loading. ZeRO-3: every rank reads and holds its own share. Below: straight to the device, past the host's memory."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpa_ds.config.load import load_config
from tests import families, tiny
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank


def load_shares(job: Any, argv: Sequence[str], model_dir: str, precision: str) -> dict[str, float]:
    import deepspeed

    from dpa_ds.distributed.topology import plan_topology
    from dpa_ds.distributed.world import build_world
    from dpa_ds.model import base

    size = job.launch.job_world_size
    config = load_config([*argv, f"--model.path={model_dir}", f"--model.precision={precision}"])
    build_world(job, plan_topology(size, 1, size), config.cluster, 60.0)
    ds_json = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": precision == "bf16"},
    }
    read = []
    read_partition = base._read_partition

    class Counted:
        def __init__(self, stored: Any) -> None:
            self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype
            self._stored = stored

        def __getitem__(self, rows: slice) -> torch.Tensor:
            read.append(self._stored[rows].numel())
            return self._stored[rows]

    def counting(stored: Any, name: str, parameter: torch.nn.Parameter) -> None:
        read_partition(stored if isinstance(stored, torch.Tensor) else Counted(stored), name, parameter)

    base._read_partition = counting
    model = base.load_base(config.model, Path(model_dir), ds_json, torch.device("cpu"))
    held = sum(p.ds_tensor.numel() for p in model.parameters())
    total = sum(p.ds_numel for p in model.parameters())
    whole = AutoModelForCausalLM.from_pretrained(model_dir, dtype=base.DTYPES[precision])
    wanted, buffers = whole.state_dict(), dict(whole.named_buffers())
    wrong = 0.0
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            wrong = max(wrong, float((parameter - wanted[name]).abs().max()))
    found = dict(model.named_buffers())
    assert buffers
    assert found.keys() == buffers.keys()
    same = all(found[name].dtype == b.dtype and torch.equal(found[name], b) for name, b in buffers.items())
    return {"buffers": same, "held": held / total, "read": sum(read) / total, "wrong": wrong}


@pytest.mark.parametrize(("num_ranks", "precision", "changes"), [
    (1, "fp32", {}),
    (2, "bf16", {"tie_word_embeddings": False}),
    (3, "fp32", {"hidden_size": 40, "num_key_value_heads": 4}),  # sizes that 3 does not divide
    (4, "fp32", {}),
])  # fmt: skip
def test_each_rank_reads_its_share(tmp_path: Path, num_ranks: int, precision: str, changes: dict[str, Any]) -> None:
    model = tiny.make_model(tmp_path / "model", **changes)
    argv = tiny.recipe(model, tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    for share in run_on_ranks(load_shares, num_ranks, tmp_path, argv, str(model), precision):
        assert share["wrong"] == 0.0
        assert share["buffers"]
        assert share["held"] == pytest.approx(1 / num_ranks, rel=0.01)
        # whole rows are read, so a share may begin and end with part of a row
        assert share["read"] <= 1 / num_ranks + 0.05


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    argv = tiny.recipe(model, tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    for share in run_on_ranks(load_shares, 2, tmp_path, argv, str(model), "fp32"):
        assert share["wrong"] == 0.0


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "deepseek_v3", "hrm_text", "olmo_hybrid", "kimi_linear"])
def test_other_names_and_layouts_of_files_are_read(tmp_path: Path, family: str) -> None:
    """An `embed_out` for the head, experts one by one, and several matrices in one."""
    model = families.make_family(tmp_path / "model", family)
    argv = tiny.recipe(model, tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    for share in run_on_ranks(load_shares, 2, tmp_path, argv, str(model), "fp32"):
        assert share["wrong"] == 0.0


def load_whole(job: Any, argv: Sequence[str], small: str, large: str) -> dict[str, Any]:
    from dpa_ds.adapters.adapter_model import AdapterModel
    from dpa_ds.adapters.methods import adapter_table
    from dpa_ds.model.base import load_base

    config = load_config([*argv, "--model.precision=bf16"])
    device = torch.device("meta")
    load_base(config.model, Path(small), {}, device)  # what it imports is not to be measured
    grown = anonymous_growth(lambda: load_base(config.model, Path(large), {}, device))
    base = load_base(config.model, Path(large), {}, device)
    tensors = [*base.parameters(), *base.buffers()]
    # PEFT leaves a second adapter where it was made if the first is on this stand-in.
    adapters = AdapterModel(base, adapter_table(config.lora)[:1], config.lora)
    tensors += adapters.parameters["global"].values()
    return {"grown": grown, "devices": {tensor.device.type for tensor in tensors}}


def anonymous_growth(function: Callable[[], Any]) -> int:
    """Bytes by which this process's own memory, mapped files left out, grows at most while `function` runs."""
    done = threading.Event()
    seen = [own_memory()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    done.set()
    watcher.join()
    seen.append(own_memory())  # while the result is there
    del result
    return max(seen) - seen[0]


def own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_a_whole_base_goes_past_the_memory_of_the_host(tmp_path: Path) -> None:
    """Stand-in for CUDA: the meta device, which stores nothing. The files are fp32, so bf16 is a conversion.

    Loaded to the CPU first, each rank would hold all 2 bytes of every parameter.
    """
    small = tiny.make_model(tmp_path / "small")
    large = tiny.make_model(tmp_path / "large", hidden_size=512, intermediate_size=1376, num_hidden_layers=12)
    argv = tiny.recipe(small, tiny.make_federation(tmp_path / "data"), tmp_path / "runs")
    size_in_bf16 = (large / "model.safetensors").stat().st_size // 2
    for found in run_on_ranks(load_whole, 2, tmp_path, argv, str(small), str(large)):
        assert found["devices"] == {"meta"}
        assert found["grown"] < size_in_bf16 / 4


def refusal(job: Any, argv: Sequence[str], model_dir: str) -> str:
    from dpa_ds.errors import ModelError

    try:
        load_shares(job, argv, model_dir, "fp32")
    except ModelError as error:
        return str(error)
    return ""


def test_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    """A checkpoint in 8 bits, whose numbers are weights only with its scales; then one that says so in its config."""
    directory = tiny.make_model(tmp_path / "model")
    argv = tiny.recipe(directory, tmp_path, tmp_path / "runs")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, metadata={"format": "pt"})
    (reason,) = run_on_ranks(refusal, 1, tmp_path, argv, str(directory))
    assert f"tensor '{name}' is stored as F8_E4M3, which loading under ZeRO-3 does not take" in reason
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    (reason,) = run_on_ranks(refusal, 1, tmp_path, argv, str(directory))
    assert "config.json says that the files are quantised by fp8" in reason


def test_a_model_without_sdpa_names_the_attention_that_it_has(tmp_path: Path) -> None:
    directory = families.make_family(tmp_path / "model", "gemma2")
    argv = tiny.recipe(directory, tmp_path, tmp_path / "runs", model__attention="sdpa")
    (reason,) = run_on_ranks(refusal_of_whole, 1, tmp_path, argv, str(directory))
    assert (
        reason
        == "Gemma2ForCausalLM has no attention of the kind model.attention sdpa: set model.attention: auto or eager"
    )


def refusal_of_whole(job: Any, argv: Sequence[str], model_dir: str) -> str:
    from dpa_ds.config.load import load_config
    from dpa_ds.errors import ModelError
    from dpa_ds.model.base import load_base

    try:
        load_base(load_config(argv).model, Path(model_dir), {}, torch.device("cpu"))
    except ModelError as error:
        return str(error)
    return ""
