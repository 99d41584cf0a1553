"""What a user can get wrong: each ends with one line that names value and remedy, a status that is not 0, and no trace.

Every case is a process of its own (forked from one that has imported everything), with the run's own entry point.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.launch.processes import run_forked

pytestmark = pytest.mark.launch
ZERO3 = "ds_configs/zero3.json"


@dataclass
class Place:
    """A test's folder with copies of model and data to spoil."""

    root: Path
    model: Path
    data: Path

    @property
    def runs(self) -> Path:
        """`output_dir` of the recipe."""
        return self.root / "runs"

    def training_file(self, client: int) -> Path:
        """Where the client's examples are."""
        return self.data / "2" / f"local_training_{client}.json"

    def recipe(self, **overrides: Any) -> list[str]:
        """The small run, which would work."""
        return tiny.recipe(self.model, self.data, self.runs, data__cache_dir=self.root / "cache", **overrides)


@pytest.fixture
def place(tmp_path: Path, model: Path, federation: Path) -> Place:
    """Fresh copies."""
    return Place(tmp_path, shutil.copytree(model, tmp_path / "model"), shutil.copytree(federation, tmp_path / "data"))


def refuse(place: Place, argv: list[str], exit_code: int = 2) -> str:
    """The one error line of a job with `argv`, which must leave every file of `output_dir` as it was."""
    before = checksums(place.runs)
    ended = run_forked(argv, place.root / "output.txt")
    assert ended.returncode == exit_code, ended.output
    assert ended.num_tracebacks == 0, ended.output
    assert len(ended.errors) == 1, ended.output
    assert ended.errors[0].startswith("error: "), ended.output
    assert checksums(place.runs) == before
    return ended.output[ended.output.index("error: ") :]


def checksums(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, and what is in it."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in [folder, *folder.rglob("*")]
        if path.exists()
    }


# ---- recipe and cluster ------------------------------------------------------------------------------------------

RECIPES = {
    "unknown key": (["--train.learning_rat", "1"], 2, "did you mean train.learning_rate?"),
    "wrong type": (["--train.batch_size", "many"], 2, "train.batch_size must be a whole number"),
    "out of range": (["--federation.client_fraction", "1.5"], 2, "federation.client_fraction must be in (0, 1]"),
    "template without field": (["--data.template", "Answer:"], 2, "data.template must contain {instruction} exactly"),
    "no such recipe": (["--config", "nowhere.yaml"], 2, "--config: no such file: nowhere.yaml"),
    "ranks that do not fit": (
        ["--cluster.ranks_per_group", "2"],
        3,
        "job has 1 ranks, not a multiple of cluster.ranks_per_group = 2: use a multiple of 2 ranks, or set "
        "cluster.ranks_per_group to one of [1]",
    ),
    "list that does not add up": (["--cluster.ranks_per_group", "[2, 1]"], 3, "start 3 ranks or change the list"),
    "target modules": (
        ["--lora.target_modules", "[q_proj, w_proj]"],
        2,
        "lora.target_modules ['w_proj'] are not linear layers of LlamaForCausalLM; it has ['down_proj', 'gate_proj'",
    ),
    "no such DeepSpeed JSON": (["--engine.deepspeed_config", "zero9.json"], 2, "no such file: zero9.json"),
    "no such model": (
        ["--model.path", "somewhere/on/disk"],
        2,
        "model.path 'somewhere/on/disk' is neither a directory",
    ),
    "no such data": (["--data.path", "nowhere"], 2, "nowhere: no such file or folder: check data.path"),
    "no such number of clients": (
        ["--data.num_clients", "5"],
        2,
        "[2], wanted: 5: set data.num_clients to one of them",
    ),
    "table without column": (
        ["--data.format", "table", "--data.partition.column", "who"],
        2,
        "folder without data: name a file in it",
    ),
    "examples too long": (["--data.max_length", "3"], 2, "examples fits into data.max_length 3: raise it"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(case: str, place: Place) -> None:
    arguments, exit_code, message = RECIPES[case]
    assert message in refuse(place, [*place.recipe(), *arguments], exit_code)
    assert not place.runs.exists()


def test_recipe_with_broken_yaml_names_the_line(place: Place) -> None:
    argv = place.recipe()
    Path(argv[1]).write_text("name: a\ntrain: [\n")
    assert f"{argv[1]}, line 3: not a YAML recipe" in refuse(place, argv)


OWNED = {
    "owned keys": (
        {"optimizer": {}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        "sets what the recipe owns: optimizer (owned by train.learning_rate, train.weight_decay and train.adam_*), "
        "bf16.enabled (owned by model.precision)",
    ),
    "nvme for adapters": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
        "offload_optimizer.device nvme is not supported",
    ),
}


@pytest.mark.parametrize("case", OWNED)
def test_deepspeed_json(case: str, place: Place) -> None:
    content, message = OWNED[case]
    path = place.root / "ds.json"
    path.write_text(json.dumps(content))
    told = refuse(place, place.recipe(engine__deepspeed_config=path))
    assert str(path) in told
    assert message in told


# ---- data --------------------------------------------------------------------------------------------------------

GOOD = '{"instruction": "a", "output": "b"}'
DATA = {
    "empty file": ("", "client_1 ({file}) has no training examples: add some, or take the client out"),
    "no examples": ("[]", "client_1 ({file}) has no training examples"),
    "malformed": (f"[{GOOD},\n{GOOD},\n{{oops]", "{file}:3: not JSON"),
    "cut off": (f"[{GOOD},\n{GOOD}", "{file}:2: not JSON"),
    "not objects": ("[1, 2]", "{file}: row 1: expected an object with named columns, got int"),
    "column missing": ('[{"instruction": "a", "answer": "b"}]', "{file}: row 1: no column 'output'; columns are"),
    "answer empty": (f'[{GOOD}, {{"instruction": "a", "output": " "}}]', "{file}: row 2: column 'output' is empty"),
    "not text": (
        '[{"instruction": ["a"], "output": "b"}]',
        "{file}: row 1: column 'instruction' must be text, got list",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_of_a_client(case: str, place: Place) -> None:
    content, message = DATA[case]
    place.training_file(1).write_text(content)
    assert message.format(file=place.training_file(1)) in refuse(place, place.recipe())


def test_data_file_missing(place: Place) -> None:
    place.training_file(0).rename(place.training_file(7))
    told = refuse(place, place.recipe())
    assert "missing: ['local_training_0.json'], surplus: ['local_training_7.json']" in told


def test_two_test_files(place: Place) -> None:
    (place.data / "other.jsonl").write_text(GOOD)
    assert "several test files (other.jsonl, test.jsonl): name one in data.test_path" in refuse(place, place.recipe())


# ---- model -------------------------------------------------------------------------------------------------------


def without_config(model: Path) -> str:
    (model / "config.json").unlink()
    return f"model.path {model} has no config.json: give a Hugging Face model directory or a GGUF file"


def without_tokenizer(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    return f"no usable tokenizer in {model}"


def without_end_token(model: Path) -> str:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    return "has no end token (eos_token): set it in tokenizer_config.json"


def without_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return f"{model}"


def truncated_weights(model: Path) -> str:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return f"cannot load a causal LM from {model}: "


def wrong_shape(model: Path) -> str:
    change_weights(model, lambda weights: weights | {FIRST: weights[FIRST][:-1].clone()})
    return FIRST


def missing_tensor(model: Path) -> str:
    change_weights(model, lambda weights: {key: value for key, value in weights.items() if key != FIRST})
    return FIRST


def broken_config(model: Path) -> str:
    (model / "config.json").write_text("{")
    return f"{model}"


FIRST = "model.layers.1.self_attn.q_proj.weight"


def change_weights(model: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [without_config, without_tokenizer, without_end_token, broken_config])
def test_model_directory(spoil: Callable[[Path], str], place: Place) -> None:
    assert spoil(place.model) in refuse(place, place.recipe())


@pytest.mark.parametrize("deepspeed_config", ["ds_configs/zero1.json", ZERO3])
@pytest.mark.parametrize("spoil", [without_weights, truncated_weights, wrong_shape, missing_tensor])
def test_weights(spoil: Callable[[Path], str], deepspeed_config: str, place: Place) -> None:
    named = spoil(place.model)
    assert named in refuse(place, place.recipe(engine__deepspeed_config=deepspeed_config))


def test_model_that_is_no_gguf(place: Place) -> None:
    path = place.root / "model.gguf"
    path.write_text("not a model")
    assert str(path) in refuse(place, place.recipe(model__path=path))


# ---- where the results go ----------------------------------------------------------------------------------------


def test_folder_of_a_different_run(place: Place) -> None:
    done = run_forked([*place.recipe(), "--federation.num_rounds", "1"], place.root / "first.txt")
    assert done.returncode == 0, done.output
    told = refuse(place, [*place.recipe(), "--train.learning_rate", "0.5"], exit_code=4)
    assert f"{place.runs / 'tiny'} holds a different run (train.learning_rate: 0.01 -> 0.5)" in told
    assert "choose another name" in told


def test_folder_that_is_no_run(place: Place) -> None:
    (place.runs / "tiny").mkdir(parents=True)
    (place.runs / "tiny" / "thesis.txt").write_text("years of work")
    assert "exists but is not a run (no config.yaml): choose another name" in refuse(place, place.recipe(), exit_code=4)


@pytest.mark.parametrize("output_dir", ["{file}", "{file}/below", "/proc/dpa_ds", "/dev/null/runs"])
def test_output_dir_that_cannot_be_written(output_dir: str, place: Place) -> None:
    file = place.root / "file"
    file.write_text("in the way")
    path = output_dir.format(file=file)
    told = refuse(place, [*place.recipe(), "--output_dir", path], exit_code=4)
    assert "error: cannot write" in told
    assert f"{path}/tiny" in told
    assert "choose another output_dir" in told
    assert file.read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_without_permission(place: Place) -> None:
    place.runs.mkdir(mode=0o555)
    assert "cannot write results to" in refuse(place, place.recipe(), exit_code=4)
