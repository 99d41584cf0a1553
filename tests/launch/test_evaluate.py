"""The evaluation as a user starts it: what it prints and writes, that it continues after a kill, and what it refuses."""

import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dpa_ds.errors import Preempted
from tests import tiny
from tests.launch.bad_input import checksums
from tests.launch.processes import (
    PYTHON,
    Ended,
    Running,
    beside_python,
    free_port,
    run,
    run_by_hand,
    run_forked,
    start_by_hand,
    wait_for,
)

pytestmark = pytest.mark.launch
PROGRAM = "launch/evaluate.py"


@dataclass(frozen=True)
class Place:
    """A folder with a trained run of two clients, its base and its data, all of them to spoil."""

    root: Path

    @property
    def run(self) -> Path:
        """Of one round, named tiny."""
        return self.root / "runs" / "tiny"

    def copy(self, root: Path) -> "Place":
        """The same in another folder, with its paths."""
        copy = Place(shutil.copytree(self.root, root, symlinks=True))
        recipe = copy.run / "config.yaml"
        recipe.write_text(recipe.read_text().replace(str(self.root), str(root)))
        return copy

    def command(self, *options: str) -> list[str]:
        """For deepspeed with LOCAL_SIZE ranks."""
        port = str(free_port())
        return [beside_python("deepspeed"), "--master_port", port, PROGRAM, "--run", str(self.run), *options]

    def evaluate(self, *options: str) -> Ended:
        """On one rank."""
        return run_forked(["--run", str(self.run), *options], program=PROGRAM)

    def refuse(self, options: list[str], exit_code: int) -> str:
        """The one line of an evaluation that fails; it must leave the run as it was."""
        before = checksums(self.root / "runs")
        ended = run_forked(options, program=PROGRAM)
        assert ended.returncode == exit_code, ended.output
        assert ended.num_tracebacks == 0, ended.output
        assert len(ended.errors) == 1, ended.output
        assert ended.output.endswith(f"{ended.errors[0]}\n"), "the message is one line, and the last"
        assert checksums(self.root / "runs") == before
        return ended.errors[0].removeprefix("error: ")

    @property
    def evaluation(self) -> Path:
        """Folder of the only evaluation."""
        (folder,) = (self.run / "evaluations").iterdir()
        return folder

    @property
    def report(self) -> Path:
        """Folder of its report on all clients and instances."""
        return self.evaluation / "all"

    def answers(self) -> dict[tuple[int, str, int], dict[str, Any]]:
        """All complete answers of the only evaluation by client, task and row; none is there twice."""
        files = (self.evaluation / "answers").glob("*.jsonl")
        whole = [json.loads(line) for f in files for line in f.read_text().splitlines() if line.endswith("}")]
        by_key = {(answer["client"], answer["task"], answer["row"]): answer for answer in whole}
        assert len(by_key) == len(whole), "something was answered twice"
        return by_key


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, federation: Path) -> Place:
    """The run that all tests copy."""
    place = Place(tmp_path_factory.mktemp("evaluate") / "trained")
    train(place, model, federation)
    return place


@pytest.fixture
def place(tmp_path: Path, trained: Place) -> Place:
    """A fresh copy."""
    return trained.copy(tmp_path / "place")


def train(place: Place, model: Path, federation: Path, **overrides: Any) -> None:
    base = shutil.copytree(model, place.root / "model")
    data = shutil.copytree(federation, place.root / "data")
    settings = {"federation__num_rounds": 1, "generation__num_beams": 1, "generation__max_new_tokens": 8}
    settings |= {"data__cache_dir": place.root / "cache", **overrides}
    ended = run_forked(tiny.recipe(base, data, place.root / "runs", **settings))
    assert ended.returncode == 0, ended.output


def table(ended: Ended) -> str:
    """What was printed from the table to the files."""
    assert ended.returncode == 0, ended.output
    assert not ended.errors, ended.output
    return ended.output[ended.output.index("ROUGE-1") : ended.output.index("\ntook ")]


def test_table_and_files_on_two_ranks_and_nothing_to_do_the_second_time(place: Place) -> None:
    ended = run(place.command(), LOCAL_SIZE="2")
    printed = table(ended)
    assert "tiny after round 1, centred_cosine, lambda 1, 5 references" in ended.output
    assert "2 clients x 8 instances; 0 of 16 answers are there already" in ended.output
    summary = json.loads((place.report / "summary.json").read_text())
    for name, meaning in (("P", "own tasks"), ("TTP", "all trained tasks")):
        (row,) = re.findall(
            rf"^{name} +\({meaning}\) +([\d.]+)!? +95 % interval \[([\d.]+), ([\d.]+)\] +floor ([\d.]+)$", printed, re.M
        )
        scores, floor = summary[name]["rouge1"], summary["floors"][name]["rouge1"]
        assert [float(x) for x in row] == pytest.approx(
            [scores["mean"], scores["low"], scores["high"], floor], abs=0.05
        )
        assert floor > 0
    every = {(client, task, row) for client in range(2) for task in ("colour0", "count1") for row in range(4)}
    assert place.answers().keys() == every
    assert any(0 < answer["alpha"] < 1 for answer in place.answers().values())
    pictures = ["scores.png", "alpha.png", "p_against_ttp.png"]
    assert {path.name for path in place.evaluation.iterdir()} == {"answers", "settings.json", "all"}
    assert {path.name for path in place.report.iterdir()} == {"summary.json", "report.md", *pictures}
    assert all((place.report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all(f"]({name})" in (place.report / "report.md").read_text() for name in pictures)

    before = checksums(place.evaluation)
    again = run(place.command(), LOCAL_SIZE="2")
    assert "16 of 16 answers are there already" in again.output
    assert table(again) == printed
    assert checksums(place.evaluation) == before


@pytest.mark.parametrize("sharding", ["never", "always"])
def test_a_signal_stops_an_evaluation_on_all_ranks(sharding: str, place: Place, tmp_path: Path) -> None:
    """With the base on every rank, and with one that the two ranks share: between two batches, with all answers kept."""
    test = tiny.make_federation(tmp_path / "more", sizes=(1, 1), num_test=20) / "test.jsonl"
    options = ["--data.test_path", str(test), "--generation.batch_tokens", "1", "--evaluation.sharding", sharding]
    command = [PYTHON, PROGRAM, "--run", str(place.run), *options]
    ranks = start_by_hand(command, 2)
    wait_for(place.run, "evaluations/*/answers/*.jsonl", ranks, 60.0)
    ranks[1].process.send_signal(signal.SIGUSR1)
    for ended in run_by_hand(ranks, 60.0):
        assert ended.returncode == Preempted.exit_code, ended.output
        assert not ended.errors, ended.output
        assert ended.num_tracebacks == 0, ended.output
    known = place.answers()
    assert 0 < len(known) < 80
    ended = place.evaluate(*options[:-2])
    assert f"{len(known)} of 80 answers are there already" in ended.output


def test_killed_evaluation_resumes(place: Place, tmp_path: Path) -> None:
    """On two ranks, then on one: answers that are there count, whoever gave them; a line that was cut off does not."""
    test = tiny.make_federation(tmp_path / "more", sizes=(1, 1), num_test=20) / "test.jsonl"
    options = ["--data.test_path", str(test), "--max_new_tokens", "24", "--generation.batch_tokens", "1"]
    undisturbed = place.copy(tmp_path / "undisturbed")
    expected = undisturbed.evaluate(*options)

    with Running(place.command(*options), LOCAL_SIZE="2") as running:
        deadline = time.monotonic() + 60
        while len(lines := [x for f in place.run.glob("evaluations/*/answers/*") for x in f.open()]) < 8:
            assert running.process.poll() is None, running.output()
            assert time.monotonic() < deadline, running.output()
            time.sleep(0.01)
        running.kill()
    assert not (place.report / "summary.json").exists(), f"killed too late to tell anything: {len(lines)} answers"
    cut = max((place.evaluation / "answers").iterdir(), key=lambda path: path.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:-5])
    known = place.answers()
    assert 7 <= len(known) < 80

    ended = place.evaluate(*options)
    assert f"{len(known)} of 80 answers are there already" in ended.output
    assert table(ended).replace(str(place.root), "") == table(expected).replace(str(undisturbed.root), "")
    assert place.answers() == undisturbed.answers()
    assert len(place.answers()) == 80
    assert (place.report / "summary.json").read_text() == (undisturbed.report / "summary.json").read_text()


def test_help_is_quick_and_starts_nothing() -> None:
    ended = run([PYTHON, "-X", "importtime", PROGRAM, "--help"])
    assert ended.returncode == 0, ended.output
    assert "usage: deepspeed launch/evaluate.py --run runs/NAME [--option VALUE ...]" in ended.output
    imported = re.findall(r"^import time:.*\| +(\S+)$", ended.output, re.M)
    assert "dpa_ds.cli.args" in imported
    assert not {"torch", "transformers", "deepspeed"} & set(imported)


OPTIONS = {
    "--clients 1,7": "{run} has no client 7: its clients are 0 (client_0 colour0), 1 (client_1 count1)",
    "--tasks colour0,sums": "the test data has no task ['sums']: its tasks are ['colour0', 'count1']",
    "--beam 2": "--beam is not an option; options are --run, --weighting, --lambda, --alpha, --beams, "
    "--private_dir, --max_new_tokens, --temperature, --top_k, --top_p, --sampling_seed, --clients, --tasks, --instances, "
    "--split, --section.field",
    "--temperature 0.7 --beams 2": "generation.temperature 0.7 samples one answer, and generation.num_beams 2 searches for "
    "the likeliest: set num_beams 1 (--beams 1), or temperature 0",
    "--clients --beams 2": "--clients needs a value: --clients VALUE (see --help)",
    "--lora.rank 2": "{run} was trained with another value (lora.rank: 4 -> 2): leave that option out, or train a run of "
    "its own with it",
    "--weighting cosinus": "command line: weighting.kind must be one of auto, cosine, centred_cosine, pearson, l2, fixed, "
    'global, local, swapped, none, got "cosinus"',
    "--weighting centred_cosine --weighting.encoder local": "weighting.encoder local does not go with weighting.kind "
    "centred_cosine: clients can share one reference mean only of the encoder that all of them have and that never changes: "
    "use encoder none, or weighting.kind cosine",
    "--weighting auto --weighting.encoder global": "weighting.encoder global does not go with weighting.kind centred_cosine: "
    "clients can share one reference mean only of the encoder that all of them have and that never changes: use encoder none, or "
    "weighting.kind cosine",
    "--weighting fixed --alpha 2": "weighting.scale must be in [0, 1] with weighting.kind fixed, got 2.0",
    "--weighting cosine --alpha 0.3": "--alpha is the weight of --weighting fixed, but weighting.kind is cosine: add "
    "--weighting fixed, or give the scale of the similarity with --lambda",
    "--split held_out": "evaluation.split held_out needs a run that was trained with data.held_out_fraction above 0",
    "--data.test_path {run}.jsonl": "{run}.jsonl: no such file or folder: check data.path and data.test_path",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, trained: Place) -> None:
    reported = trained.refuse(["--run", str(trained.run), *options.format(run=trained.run).split()], exit_code=2)
    assert reported == OPTIONS[options].format(run=trained.run)


def test_no_run_and_no_such_run(place: Place) -> None:
    reported = place.refuse([], exit_code=2)
    assert reported == "no run: give one with --run runs/NAME (a folder that launch/run.py wrote; see --help)"
    shutil.copytree(place.run, place.run.with_name("second"))
    other = place.run.with_name("tin")
    assert place.refuse(["--run", str(other)], exit_code=2) == (
        f"--run {other}: no such run (no {other}/config.yaml): give a folder that launch/run.py wrote; runs beside it: "
        "second, tiny"
    )


# file, its new content (None: it is gone), message
ROUND, TEST = "runs/tiny/rounds/round_000001", "data/test.jsonl"
SPOILT: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "no complete round": (
        f"{ROUND}/meta.json",
        lambda old: None,
        "{root}/runs/tiny has no complete round yet: train it with launch/run.py first",
    ),
    "flipped bit": (
        f"{ROUND}/local/client_00/adapter_model.safetensors",
        lambda old: old[:-1] + bytes([old[-1] ^ 1]),
        f"{{file}} is damaged (checksum differs): delete {{root}}/{ROUND} to continue from the round before",
    ),
    "empty test file": (
        TEST,
        lambda old: b"\n",
        "{file}: is empty: no rows; give data.path and data.test_path a file with examples",
    ),
    "no test file": (
        TEST,
        lambda old: None,
        "there is no test file (*.jsonl) in {root}/data: set data.test_path, or evaluation.split held_out",
    ),
    "damaged model.json": (
        "runs/tiny/model.json",
        lambda old: b"[]",
        "{file} cannot be read (TypeError('list indices must be integers or slices, not str')): restore it; or delete it, "
        "if you are sure that model.path is the base that this run was trained over",
    ),
    "prompt longer than the context": (
        TEST,
        lambda old: old + b'{"instruction": "%s", "output": "a", "category": "count1"}\n' % (b"x" * 200),
        "row 4 of task count1 has 203 tokens: with generation.max_new_tokens 8 that is more than the model's context of "
        "192: lower generation.max_new_tokens, or shorten or remove it",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_file(case: str, place: Place) -> None:
    name, change, message = SPOILT[case]
    file = place.root / name
    content = change(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    exit_code = 4 if name.startswith("runs") else 2
    assert place.refuse(["--run", str(place.run)], exit_code) == message.format(file=file, root=place.root)


@pytest.mark.parametrize("name", ["global", "local/client_01"])
def test_adapter_that_is_not_finite(name: str, place: Place) -> None:
    """Saved so: its checksum is right."""
    folder = place.root / ROUND / name
    path, state = folder / "adapter_model.safetensors", folder / "state.json"
    tensors, old = load_file(path), hashlib.sha256(path.read_bytes()).hexdigest()
    key = min(tensors)
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    state.write_text(state.read_text().replace(old, hashlib.sha256(path.read_bytes()).hexdigest()))
    assert place.refuse(["--run", str(place.run)], exit_code=4) == (
        f"{folder} has NaN or infinity in {key}: delete {place.root}/{ROUND} to use the round before, or train again"
    )


def test_base_that_has_moved_is_named_and_another_one_is_refused(place: Place, tmp_path: Path) -> None:
    model, moved, command = place.root / "model", tmp_path / "moved", ["--run", str(place.run)]
    model.rename(moved)
    assert place.refuse(command, exit_code=2) == (
        f"model.path '{model}' is neither a directory, nor a GGUF file, nor a hub id that can be reached from "
        "here: check the path, or download the model first; if the base has moved, say where it is with --model.path"
    )
    differs = (
        f"the base model, or its chat template, differs from the one that {place.run} was trained over (see "
        f"{place.run}/model.json): its adapters mean nothing on another; set model.path to the right one"
    )
    other = tiny.make_model(tmp_path / "other", seed=1)
    assert place.refuse([*command, "--model.path", str(other)], exit_code=4) == differs
    other.rename(model)
    assert place.refuse(command, exit_code=4) == differs
    assert "2 clients, 2 tasks, 8 instances" in table(place.evaluate("--model.path", str(moved)))


def test_weighting_by_instance_without_references(tmp_path: Path, model: Path, federation: Path) -> None:
    place = Place(tmp_path / "fedit")
    train(place, model, federation, method__name="fedit")
    assert place.refuse(["--run", str(place.run), "--weighting", "cosine"], exit_code=4) == (
        "weighting.kind cosine compares a prompt with reference prompts, but the run kept none for client_0 colour0, "
        "because its method does not weight by instance: use weighting.kind global, local or fixed"
    )
    assert "global adapter alone" in place.evaluate().output
