"""Bad output folders, checkpoints and commands on a trained run: refused in one line, the run stays as it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa_ds.storage import sha256_of
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
from tests.launch.processes import run_forked

pytestmark = pytest.mark.launch
ROUNDS = ("runs/tiny/rounds/round_000001", "runs/tiny/rounds/round_000002")
LAST = ROUNDS[1]
ADAPTER = f"{LAST}/global/adapter_model.safetensors"
RUN = ("--run", "{run}")
CLIENT = (*RUN, "--client", "0")
ASK = (*CLIENT, "--prompt", "red")


@pytest.fixture(scope="module")
def trained(model: Path, federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of two rounds beside its model and data."""
    place = make_place(tmp_path_factory.mktemp("trained"), model, federation)
    ended = run_forked(["--config", str(place.recipe)], place.root / "output.txt")
    assert ended.returncode == 0, ended.output
    remove("output.txt", "cache")(place)
    return place


def make_run(root: Path, trained: Place) -> Place:
    """A copy of the run, as if it had been trained there."""
    place = Place(root)
    shutil.copytree(trained.root, root, symlinks=True, dirs_exist_ok=True)
    for path in (place.recipe, place.run / "config.yaml"):
        path.write_text(path.read_text().replace(str(trained.root), str(root)))
    return place


def evaluation(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments or RUN, exit_code=exit_code, program="launch/evaluate.py", **more)


def question(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments or ASK, exit_code=exit_code, program="launch/generate.py", **more)


def comparison(name: str, says: str | tuple[str, ...], *arguments: str, exit_code: int = 2, **more: Any) -> Case:
    return Case(name, says, arguments, exit_code=exit_code, program="launch/compare.py", **more)


def resumed(name: str, says: str | tuple[str, ...], spoil: Callable[[Place], object], *arguments: str) -> Case:
    """A row on a run that is to go on."""
    more = ("--federation.num_rounds", "3", "--resume", "must")
    return Case(name, says, (*more, *arguments), spoil, exit_code=4)


def each(spoil: Callable[[str], Callable[[Place], object]]) -> Callable[[Place], object]:
    """The same in all rounds."""
    return lambda place: [spoil(path)(place) for path in ROUNDS]


def resealed(change: Callable[[dict[str, Any]], dict[str, Any]], client: str = "global") -> Callable[[Place], object]:
    """Change an adapter of the last round and make all checksums right again."""

    def spoil(place: Place) -> None:
        change_tensors(f"{LAST}/{client}/adapter_model.safetensors", change)(place)
        reseal(place, client, adapter_model=place.root / LAST / client / "adapter_model.safetensors")

    return spoil


def reseal(place: Place, client: str, **files: Path) -> None:
    state, meta = place.root / LAST / client / "state.json", place.root / LAST / "meta.json"
    content = json.loads(state.read_text())
    content["sha256"] |= {path.name: sha256_of(path) for path in files.values()}
    state.write_text(json.dumps(content))
    manifest = json.loads(meta.read_text())
    manifest["states"][f"{client}/state.json"] = sha256_of(state)
    meta.write_text(json.dumps(manifest))


def not_finite(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


def other_rank(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.repeat(2, 1) if "lora_A" in name else tensor.repeat(1, 2) for name, tensor in tensors.items()}


WHOLE = "no complete round of {run} is whole: restore one, or delete the folder ({root}/"
RESUMED = [
    resumed("every meta.json of zero bytes", WHOLE, each(lambda path: write(f"{path}/meta.json", ""))),
    resumed("every meta.json of other JSON", WHOLE, each(lambda path: write(f"{path}/meta.json", "[1]"))),
    resumed("every meta.json nested deeply", WHOLE, each(lambda path: write(f"{path}/meta.json", "[" * 100_000))),
    resumed("every meta.json is a folder", WHOLE, each(lambda path: folder(f"{path}/meta.json"))),
    resumed("file of the manifest missing", WHOLE, each(lambda path: remove(f"{path}/local/client_01"))),
    resumed("wrong checksum in every round", WHOLE, each(lambda path: cut(f"{path}/global/adapter_model.safetensors", 1))),
    resumed("state.json of zero bytes", WHOLE, each(lambda path: write(f"{path}/global/state.json", ""))),
    resumed("no rounds", ("{run} holds nothing to go on from, and resume is must", "output_dir"), remove("runs/tiny/rounds")),
    resumed("NaN in an adapter", ("{root}/" + LAST + "/global has NaN or infinity in", "delete {root}/" + LAST), resealed(not_finite)),
    resumed("NaN in a client's adapter", ("/local/client_01 has NaN", "delete {root}/" + LAST), resealed(not_finite, "local/client_01")),
    resumed("state.json changed", (WHOLE, "/local/client_00/state.json (checksum differs)"), each(lambda path: change_json(f"{path}/local/client_00/state.json", info={}))),
    resumed("fingerprint of zero bytes", ("{run}/model.json cannot be read", "restore it"), write("runs/tiny/model.json", "")),
    resumed("fingerprint of another model", ("the base model differs", "{run}/model.json", "set model.path to"), change_json("runs/tiny/model.json", fingerprint="0")),
    resumed("model changed", ("the base model differs", "set model.path"), change_json("model/config.json", rms_norm_eps=0.5)),
    resumed("another learning rate", ("{run} holds a different run (train.learning_rate: 0.01 -> 0.5)", "choose another name"), lambda place: None, "--train.learning_rate=0.5"),
    resumed("another rank", ("{run} holds a different run (lora.rank: 4 -> 8)", "choose another name"), lambda place: None, "--lora.rank=8"),
    Case("adapter of another rank", ("the saved global adapter does not fit this model: ", "has shape (8, 32), expected (4, 32): set model.path and lora.*"), ("--federation.num_rounds", "3"), resealed(other_rank)),
    Case("recipe of the run of zero bytes", ("{run}/config.yaml", "got nothing"), spoil=write("runs/tiny/config.yaml", "")),
    Case("recipe of the run damaged", "{run}/config.yaml, line 1: x is not a field", spoil=write("runs/tiny/config.yaml", "x: 1\n")),
    Case("resume never", ("{run} holds results (up to round 2), and resume is never: choose another name",), ("--resume", "never"), exit_code=4),
]  # fmt: skip

PLACES = [
    Case("results in a file", ("cannot write", "{recipe}/tiny", "choose another output_dir"), ("--output_dir", "{recipe}"), exit_code=4),
    Case("results below a file", ("cannot write", "{recipe}/below/tiny", "choose another output_dir"), ("--output_dir", "{recipe}/below"), exit_code=4),
    Case("results in /proc", ("cannot write", "/proc/dpa_ds/tiny", "choose another output_dir"), ("--output_dir", "/proc/dpa_ds"), exit_code=4),
    Case("results in /dev/null", ("cannot write", "/dev/null/runs/tiny", "choose another output_dir"), ("--output_dir", "/dev/null/runs"), exit_code=4),
    Case("results in a symlink loop", ("{run}", "choose another"), spoil=lambda place: (remove("runs")(place), link("runs", "runs")(place)), exit_code=4),
    Case("results below too long a name", "output_dir must be a path (no NUL character, names of up to 255 bytes)", ("--output_dir", "/tmp/" + "d" * 300)),
    Case("folder that is no run", "{run} exists but is not a run (no config.yaml): choose another name", spoil=lambda place: (remove("runs/tiny")(place), write("runs/tiny/thesis.txt", "years of work")(place)), exit_code=4),
]  # fmt: skip

EVALUATIONS = [
    evaluation("no run named", "no run: give one with --run runs/NAME", "--alpha", "0.5"),
    evaluation("no such run", ("--run {root}/other: no such run", "give a folder that launch/run.py wrote"), "--run", "{root}/other"),
    evaluation("mistyped run", ("--run {root}/runs/tin: no such run", "runs beside it: tiny"), "--run", "{root}/runs/tin"),
    evaluation("run is a file", "--run {recipe}: no such run", "--run", "{recipe}"),
    evaluation("run in a symlink loop", "--run {run}: no such run", spoil=link("runs/tiny", "tiny")),
    evaluation("no round", "{run} has no complete round yet: train it", spoil=remove("runs/tiny/rounds"), exit_code=4),
    evaluation("no such client", "{run} has no client [9]: its clients are [0, 1]", *RUN, "--clients", "0,9"),
    evaluation("no such task", "the test data has no task ['verse']: its tasks are", *RUN, "--tasks", "verse"),
    evaluation("trained with another value", "was trained with another value (lora.rank: 4 -> 8): leave that option out", *RUN, "--lora.rank", "8"),
    evaluation("unknown option of evaluate", "--color is not an option; options are --run, --clients", *RUN, "--color", "red"),
    evaluation("alpha of no number", "weighting.scale must be a number or null", *RUN, "--weighting", "fixed", "--alpha", "half"),
    evaluation("alpha above 1", "weighting.scale must be in [0, 1] with weighting.kind fixed, got 1.5", *RUN, "--weighting", "fixed", "--alpha", "1.5"),
    evaluation("alpha that has no effect", "--alpha is the weight of --weighting fixed", *RUN, "--alpha", "0.5"),
    evaluation("model is gone", "say where it is with --model.path", spoil=remove("model")),
    evaluation("adapter damaged", ("{root}/" + ADAPTER + " is damaged (checksum differs): delete {root}/" + LAST,), spoil=cut(ADAPTER, 1), exit_code=4),
    evaluation("adapter of NaN", ("has NaN or infinity in", "delete {root}/" + LAST), spoil=resealed(not_finite), exit_code=4),
    evaluation("adapter of rank 8", ("the saved global adapter does not fit", "expected (4, 32): set model.path and lora.*"), spoil=resealed(other_rank)),
    evaluation("client's adapter of rank 8", ("the saved local adapter does not fit", "expected (4, 32): set model.path and lora.*"), spoil=resealed(other_rank, "local/client_01")),
    evaluation("client's state.json of zero bytes", "/local/client_01 cannot be read", spoil=write(f"{LAST}/local/client_01/state.json", ""), exit_code=4),
    evaluation("client's state.json changed", ("/local/client_00/state.json is damaged", "delete {root}/" + LAST), spoil=change_json(f"{LAST}/local/client_00/state.json", info={}), exit_code=4),
    evaluation("answers too long", "lower generation.max_new_tokens", *RUN, "--max_new_tokens", "500"),
    evaluation("no held-out data", "evaluation.split held_out needs a run that was trained with data.held_out_fraction", *RUN, "--split", "held_out"),
]  # fmt: skip

QUESTIONS = [
    question("no client named", "--client must be the id of a client such as 0, got 'nothing'", *RUN),
    question("client in words", "--client must be the id of a client such as 0, got 'first'", *RUN, "--client", "first"),
    question("client 9", "{run} has no client 9: its clients are [0, 1]", *RUN, "--client", "9", "--prompt", "red"),
    question("two sources", "--prompt and --input exclude one another: leave one out", *ASK, "--input", "{recipe}"),
    question("no such input", "{root}/ask.txt: no such file or folder", *CLIENT, "--input", "{root}/ask.txt"),
    question("input of zero bytes", "{root}/ask.txt: no prompts: write one a line", *CLIENT, "--input", "{root}/ask.txt", spoil=write("ask.txt", "")),
    question("input in invalid UTF-8", "{root}/ask.txt: byte 0 is not UTF-8: convert", *CLIENT, "--input", "{root}/ask.txt", spoil=write("ask.txt", b"\xff\n")),
    question("input is a folder", "{data}: cannot be read", *CLIENT, "--input", "{data}"),
    question("input is a pipe", "{root}/ask.txt: is a pipe, not a file", *CLIENT, "--input", "{root}/ask.txt", spoil=fifo("ask.txt")),
    question("input without column", "{root}/ask.jsonl:1: no column 'instruction'", *CLIENT, "--input", "{root}/ask.jsonl", spoil=write("ask.jsonl", '{"a": 1}')),
    question("endless beams", "generation.num_beams must be >= 1", *ASK, "--beams", "0"),
    question("prompt longer than the context", ("context of 128", "shorten"), *CLIENT, "--prompt", "red " * 1000),
]  # fmt: skip

COMPARISONS = [
    comparison("unknown method", "--methods ['fedavg'] are unknown: choose among", "--methods", "fedavg"),
    comparison("seed in words", "--seeds and --tuning_instances are whole numbers", "--seeds", "one"),
    comparison("negative seed to compare", "seed must be >= 0, got -1", "--methods", "fedit", "--seeds=-1"),
    comparison("unknown weighting", "--weightings", "--weightings", "magic"),
    comparison("scale in words", "--weightings cosine:many: scales are numbers", "--weightings", "cosine:many"),
    comparison("scale that is no number", "--weightings fixed:nan: scales of fixed must be in [0, 1]", "--weightings", "fixed:nan"),
    comparison("no instances to choose by", "--tuning_instances must be >= 1, got 0", "--tuning_instances", "0"),
    comparison("nothing held out", "data.held_out_fraction is 0: set it", "--weightings", "cosine:1|2"),
    comparison("tasks that nobody trains on", "the test data has no task ['verse']", "--evaluation.tasks", "[verse]"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*RESUMED, *PLACES, *EVALUATIONS, *QUESTIONS, *COMPARISONS], ids=str)
def test_refused(case: Case, tmp_path: Path, trained: Place) -> None:
    refuse(case, make_run(tmp_path, trained))
