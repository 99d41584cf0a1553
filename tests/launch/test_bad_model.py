"""Bad model directories and GGUF files: one line names the file or tensor, under every way to load it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.bad_input import (
    Case,
    Place,
    change_json,
    change_tensors,
    cut,
    fifo,
    folder,
    link,
    make_place,
    refuse,
    remove,
    write,
)

pytestmark = pytest.mark.launch
CONFIG, WEIGHTS, TOKENIZER = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
INDEX = "model/model.safetensors.index.json"
TENSOR = "model.layers.1.self_attn.q_proj.weight"
GGUF = ("--model.path", "{root}/m.gguf")


def split(place: Place) -> None:
    """Name a shard that is not there."""
    remove(WEIGHTS)(place)
    write(INDEX, json.dumps({"metadata": {}, "weight_map": {TENSOR: "model-00001-of-00002.safetensors"}}))(place)


def shortened(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {TENSOR: tensors[TENSOR][:-1].clone()}


def header(num_bytes: int, content: bytes) -> Any:
    return write(WEIGHTS, num_bytes.to_bytes(8, "little") + content)


DIRECTORIES = [
    Case("no such model", "model.path 'on/the/disk' is neither a directory", ("--model.path", "on/the/disk")),
    Case(
        "no config", "model.path {model} has no config.json: give a Hugging Face model directory", spoil=remove(CONFIG)
    ),
    Case("model in a symlink loop", ("model.path", "{model}", "check the path"), spoil=link("model", "model")),
    Case("model is a pipe", ("model.path", "{model}", "check the path"), spoil=fifo("model")),
    Case("config of zero bytes", ("{model}/config.json", "describes no model", "correct it"), spoil=write(CONFIG, "")),
    Case("config cut off", ("{model}/config.json", "describes no model", "correct it"), spoil=write(CONFIG, "{")),
    Case(
        "config in invalid UTF-8",
        ("{model}/config.json", "describes no model", "correct it"),
        spoil=write(CONFIG, b'{"a": "\xff"}'),
    ),
    Case("config is a list", ("{model}/config.json", "describes no model", "correct it"), spoil=write(CONFIG, "[1]")),
    Case("config nested deeply", ("{model}/config.json", "describes no model"), spoil=write(CONFIG, "[" * 100_000)),
    Case("config of no model", ("{model}/config.json", "model_type", "correct it"), spoil=write(CONFIG, "{}")),
    Case("config is a folder", "model.path {model} has no config.json: give a", spoil=folder(CONFIG)),
    Case("config of a newer model", ("{model}", "llama9"), spoil=change_json(CONFIG, model_type="llama9")),
    Case("config of a picture model", ("{model}",), spoil=write(CONFIG, '{"model_type": "vit"}')),
    Case("layers in words", ("{model}", "num_hidden_layers"), spoil=change_json(CONFIG, num_hidden_layers="two")),
    Case(
        "hidden size 0",
        "{model}/config.json: hidden_size must be a whole number >= 1, got 0",
        spoil=change_json(CONFIG, hidden_size=0),
    ),
    Case(
        "negative layers",
        "{model}/config.json: num_hidden_layers must be a whole number >= 1, got -1",
        spoil=change_json(CONFIG, num_hidden_layers=-1),
    ),
    Case("no tokenizer", "no usable tokenizer in {model}", spoil=remove(TOKENIZER, "model/tokenizer_config.json")),
    Case("tokenizer of zero bytes", "no usable tokenizer in {model}", spoil=write(TOKENIZER, "")),
    Case("tokenizer cut off", "no usable tokenizer in {model}", spoil=cut(TOKENIZER, 100)),
    Case("tokenizer of other JSON", "no usable tokenizer in {model}", spoil=write(TOKENIZER, '{"version": 3}')),
    Case(
        "tokenizer config of a list", "no usable tokenizer in {model}", spoil=write("model/tokenizer_config.json", "[]")
    ),
    Case(
        "no end token",
        "has no end token (eos_token): set it in tokenizer_config.json",
        spoil=change_json("model/tokenizer_config.json", eos_token=None),
    ),
    Case(
        "vocabulary too small",
        ("has the id 256, but the model knows 100 tokens", "put the right one there"),
        spoil=lambda place: smaller_vocabulary(place),
    ),
]

LOADS = [
    Case("no weights", "{model} has no model.safetensors: convert the weights", spoil=remove(WEIGHTS)),
    Case(
        "pickled weights only",
        "{model} has no model.safetensors: convert the weights",
        spoil=lambda place: pickled(place),
    ),
    Case("weights of zero bytes", ("{model}/model.safetensors", "again"), spoil=write(WEIGHTS, "")),
    Case("weights truncated", ("{model}/model.safetensors", "again"), spoil=cut(WEIGHTS, 1000)),
    Case("header of 2^60 bytes", ("{model}/model.safetensors", "again"), spoil=header(1 << 60, b"{}")),
    Case("header of 2^64 - 1 bytes", ("{model}/model.safetensors", "again"), spoil=header((1 << 64) - 1, b"{}")),
    Case("header that is no JSON", ("{model}/model.safetensors", "again"), spoil=header(4, b"oops")),
    Case(
        "weights are a folder",
        ("{model}/model.safetensors is not there, or no file: download it again",),
        spoil=folder(WEIGHTS),
    ),
    Case(
        "weights in a symlink loop",
        ("{model}/model.safetensors is not there, or no file: download it again",),
        spoil=link(WEIGHTS, "model.safetensors"),
    ),
    Case(
        "weights are a pipe",
        ("{model}/model.safetensors is not there, or no file: download it again",),
        spoil=fifo(WEIGHTS),
    ),
    Case(
        "wrong shape", (f"tensor {TENSOR!r} has shape (31, 32)", "(32, 32)"), spoil=change_tensors(WEIGHTS, shortened)
    ),
    Case(
        "tensor missing",
        f"no tensor {TENSOR!r}: it",
        spoil=change_tensors(WEIGHTS, lambda tensors: {k: v for k, v in tensors.items() if k != TENSOR}),
    ),
    Case(
        "config of another size",
        ("tensor ", "has shape", "the model's config says"),
        spoil=change_json(CONFIG, intermediate_size=48),
    ),
    Case("config of a deeper model", "no tensor 'model.layers.2.", spoil=change_json(CONFIG, num_hidden_layers=3)),
    Case(
        "shard missing",
        ("{model}/model-00001-of-00002.safetensors is not there, or no file: download it again",),
        spoil=split,
    ),
    Case(
        "index of zero bytes",
        ("{model}/model.safetensors.index.json is damaged", "download it again"),
        spoil=lambda place: index(place, ""),
    ),
    Case(
        "index of other JSON",
        ("{model}/model.safetensors.index.json is damaged", "download it again"),
        spoil=lambda place: index(place, "[1]"),
    ),
    Case(
        "index that leads elsewhere",
        ("{model}/model.safetensors.index.json", "must name a file"),
        spoil=lambda place: index(place, json.dumps({"weight_map": {TENSOR: "../m"}})),
    ),
]

FILES = [
    Case("text instead of GGUF", "{root}/m.gguf: not a GGUF file", GGUF, write("m.gguf", "not a model")),
    Case("GGUF of zero bytes", "{root}/m.gguf: not a GGUF file", GGUF, write("m.gguf", "")),
    Case("GGUF of 4 bytes", "{root}/m.gguf: truncated or damaged GGUF (4 bytes", GGUF, write("m.gguf", "GGUF")),
    Case("GGUF without metadata", "{root}/m.gguf", GGUF, write("m.gguf", b"GGUF\3\0\0\0" + bytes(16))),
    Case(
        "GGUF of 2^60 tensors",
        "{root}/m.gguf",
        GGUF,
        write("m.gguf", b"GGUF\3\0\0\0" + (1 << 60).to_bytes(8, "little") * 2),
    ),
]


def smaller_vocabulary(place: Place) -> None:
    """Weights for 100 tokens under a tokenizer of 258."""
    change_json(CONFIG, vocab_size=100, eos_token_id=1, pad_token_id=2)(place)
    name = "model.embed_tokens.weight"
    change_tensors(WEIGHTS, lambda tensors: tensors | {name: tensors[name][:100].clone()})(place)


def pickled(place: Place) -> None:
    (place.root / WEIGHTS).rename(place.model / "pytorch_model.bin")


def index(place: Place, content: str) -> None:
    (place.root / WEIGHTS).rename(place.model / "model-00001-of-00001.safetensors")
    write(INDEX, content)(place)


@pytest.mark.parametrize("case", [*DIRECTORIES, *LOADS, *FILES], ids=str)
def test_refused(case: Case, tmp_path: Path, model: Path, federation: Path) -> None:
    place: Place = make_place(tmp_path, model, federation)
    refuse(case, place)


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_refused_by_zero_3(case: Case, tmp_path: Path, model: Path, federation: Path) -> None:
    """Each rank then reads its part of the files itself."""
    place: Place = make_place(tmp_path, model, federation)
    with place.recipe.open("a") as file:
        file.write("\nengine.deepspeed_config: ds_configs/zero3.json\n")
    refuse(case, place)
