"""Bad checkpoints and output folders: refused in one line, the run stays as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.bad_input import (
    LAST,
    ROUNDS,
    Case,
    Place,
    change_json,
    cut,
    folder,
    link,
    make_run,
    not_finite,
    other_rank,
    refuse,
    remove,
    resealed,
    write,
)

pytestmark = pytest.mark.launch


def resumed(name: str, says: str | tuple[str, ...], spoil: Callable[[Place], object], *arguments: str) -> Case:
    """A row on a run that is to continue."""
    more = ("--federation.num_rounds", "3", "--resume", "must")
    return Case(name, says, (*more, *arguments), spoil, exit_code=4)


def each(spoil: Callable[[str], Callable[[Place], object]]) -> Callable[[Place], object]:
    """The same in all rounds."""
    return lambda place: [spoil(path)(place) for path in ROUNDS]


WHOLE = "no complete round of {run} is whole: restore one, or delete the folder ({root}/"
RESUMED = [
    resumed("every meta.json of zero bytes", WHOLE, each(lambda path: write(f"{path}/meta.json", ""))),
    resumed("every meta.json of other JSON", WHOLE, each(lambda path: write(f"{path}/meta.json", "[1]"))),
    resumed("every meta.json nested deeply", WHOLE, each(lambda path: write(f"{path}/meta.json", "[" * 100_000))),
    resumed("every meta.json is a folder", WHOLE, each(lambda path: folder(f"{path}/meta.json"))),
    resumed("file of the manifest missing", WHOLE, each(lambda path: remove(f"{path}/local/client_01"))),
    resumed(
        "wrong checksum in every round", WHOLE, each(lambda path: cut(f"{path}/global/adapter_model.safetensors", 1))
    ),
    resumed("state.json of zero bytes", WHOLE, each(lambda path: write(f"{path}/global/state.json", ""))),
    resumed(
        "no rounds",
        ("{run} holds nothing to resume from, and resume is must", "output_dir"),
        remove("runs/tiny/rounds"),
    ),
    resumed(
        "NaN in an adapter",
        ("{root}/" + LAST + "/global has NaN or infinity in", "delete {root}/" + LAST),
        resealed(not_finite),
    ),
    resumed(
        "NaN in a client's adapter",
        ("/local/client_01 has NaN", "delete {root}/" + LAST),
        resealed(not_finite, "local/client_01"),
    ),
    resumed(
        "state.json changed",
        (WHOLE, "/local/client_00/state.json (checksum differs)"),
        each(lambda path: change_json(f"{path}/local/client_00/state.json", info={})),
    ),
    resumed(
        "fingerprint of zero bytes",
        ("{run}/model.json cannot be read", "restore it"),
        write("runs/tiny/model.json", ""),
    ),
    resumed(
        "fingerprint of another model",
        ("the base model, or its chat template, differs", "{run}/model.json", "set model.path to"),
        change_json("runs/tiny/model.json", fingerprint="0"),
    ),
    resumed(
        "model changed",
        ("the base model, or its chat template, differs", "set model.path"),
        change_json("model/config.json", rms_norm_eps=0.5),
    ),
    resumed(
        "another learning rate",
        ("{run} holds a different run (train.learning_rate: 0.01 -> 0.5)", "choose another name"),
        lambda place: None,
        "--train.learning_rate=0.5",
    ),
    resumed(
        "another rank",
        ("{run} holds a different run (lora.rank: 4 -> 8)", "choose another name"),
        lambda place: None,
        "--lora.rank=8",
    ),
    Case(
        "adapter of another rank",
        (
            "the saved global adapter does not fit this model: ",
            "has shape (8, 32), expected (4, 32): set model.path and lora.*",
        ),
        ("--federation.num_rounds", "3"),
        resealed(other_rank),
    ),
    Case(
        "recipe of the run of zero bytes",
        ("{run}/config.yaml", "got nothing"),
        spoil=write("runs/tiny/config.yaml", ""),
    ),
    Case(
        "recipe of the run damaged",
        "{run}/config.yaml, line 1: x is not a field",
        spoil=write("runs/tiny/config.yaml", "x: 1\n"),
    ),
    Case(
        "resume never",
        ("{run} holds results (up to round 2), and resume is never: choose another name",),
        ("--resume", "never"),
        exit_code=4,
    ),
]

PLACES = [
    Case(
        "results in a file",
        ("cannot write", "{recipe}/tiny", "choose another output_dir"),
        ("--output_dir", "{recipe}"),
        exit_code=4,
    ),
    Case(
        "results below a file",
        ("cannot write", "{recipe}/below/tiny", "choose another output_dir"),
        ("--output_dir", "{recipe}/below"),
        exit_code=4,
    ),
    Case(
        "results in /proc",
        ("cannot write", "/proc/dpa_ds/tiny", "choose another output_dir"),
        ("--output_dir", "/proc/dpa_ds"),
        exit_code=4,
    ),
    Case(
        "results in /dev/null",
        ("cannot write", "/dev/null/runs/tiny", "choose another output_dir"),
        ("--output_dir", "/dev/null/runs"),
        exit_code=4,
    ),
    Case(
        "results in a symlink loop",
        ("{run}", "choose another"),
        spoil=lambda place: (remove("runs")(place), link("runs", "runs")(place)),
        exit_code=4,
    ),
    Case(
        "results below too long a name",
        "output_dir must be a path (no NUL character, names of up to 255 bytes)",
        ("--output_dir", "/tmp/" + "d" * 300),
    ),
    Case(
        "folder that is no run",
        "{run} exists but is not a run (no config.yaml): choose another name",
        spoil=lambda place: (remove("runs/tiny")(place), write("runs/tiny/thesis.txt", "years of work")(place)),
        exit_code=4,
    ),
]


@pytest.mark.parametrize("case", [*RESUMED, *PLACES], ids=str)
def test_refused(case: Case, tmp_path: Path, trained: Place) -> None:
    refuse(case, make_run(tmp_path, trained))
