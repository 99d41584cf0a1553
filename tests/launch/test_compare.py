"""launch/compare.py: every training and evaluation once, one table at the end, and the same again for nothing."""

import json
import re
import signal
from pathlib import Path

import pytest

from dpa_ds.errors import Preempted
from tests import tiny
from tests.launch.processes import PYTHON, Ended, Running, beside_python, free_port, run, wait_for

pytestmark = pytest.mark.launch
LINES = [
    "feddpa_f cosine",
    "feddpa_f centred_cosine",
    "feddpa_f global",
    "feddpa_f local",
    "fedit global",
    "fedlora local",
]


def compare(argv: list[str], *more: str) -> Ended:
    return run([PYTHON, "launch/compare.py", *argv, *more], deadline_seconds=300.0)


def stages(ended: Ended) -> list[str]:
    return [line.removeprefix("=== ") for line in ended.output.splitlines() if line.startswith("=== ")]


def test_trains_evaluates_tunes_and_compares_and_does_nothing_twice(
    tmp_path: Path, model: Path, federation: Path
) -> None:
    argv = tiny.recipe(
        model,
        federation,
        tmp_path / "runs",
        name="cmp",
        federation__num_rounds=1,
        train__local_epochs=8.0,
        data__held_out_fraction=0.3,
        generation__num_beams=1,
        generation__max_new_tokens=8,
    )
    options = ["--methods", "feddpa_f,fedit,fedlora", "--weightings", "cosine,centred_cosine:0.5|1,global,local"]
    ended = compare(argv, *options)
    assert ended.returncode == 0, ended.output
    (chosen,) = re.findall(r"TTP on held-out training data .*; chosen (\S+)", ended.output)
    assert stages(ended) == [
        "train feddpa_f, seed 0",  # the only training: the adapters of the three methods are in it
        "evaluate feddpa_f, seed 0: cosine, test",
        "evaluate feddpa_f, seed 0: centred_cosine 0.5, held_out",
        "evaluate feddpa_f, seed 0: centred_cosine 1, held_out",
        f"evaluate feddpa_f, seed 0: centred_cosine {chosen}, test",
        "evaluate feddpa_f, seed 0: global, test",
        "evaluate feddpa_f, seed 0: local, test",
    ]
    (folder,) = (tmp_path / "runs" / "cmp" / "comparisons").iterdir()
    assert folder.name.startswith("feddpa_f+fedit+fedlora-seeds_0-all-")
    comparison = json.loads((folder / "comparison.json").read_text())
    by_line = {f"{m['method']} {m['weighting'].split()[0]}".rstrip(":"): m for m in comparison["methods"]}
    assert list(by_line) == [*LINES, "feddpa_f oracle"]
    assert by_line["fedit global"]["TTP"] == by_line["feddpa_f global"]["TTP"]
    assert by_line["fedlora local"]["P"] == by_line["feddpa_f local"]["P"]
    assert by_line["fedit global"]["TTP_difference"] is None
    for quantity in ("P", "TTP"):
        ceiling = by_line["feddpa_f oracle"][quantity]["mean"]
        assert ceiling >= max(by_line[f"feddpa_f {kind}"][quantity]["mean"] for kind in ("global", "local"))
        difference = by_line["fedlora local"][f"{quantity}_difference"]
        expected = by_line["fedlora local"][quantity]["mean"] - by_line["fedit global"][quantity]["mean"]
        assert difference["mean"] == pytest.approx(expected)
    assert [[r for r, _ in course] for course in comparison["curves"].values()] == [[0, 1]]
    for name in ("comparison.md", "convergence.png", "p_against_ttp.png"):
        assert (folder / name).stat().st_size > 500

    again = compare(argv, *options)
    assert again.returncode == 0, again.output
    assert stages(again) == []
    assert json.loads((folder / "comparison.json").read_text()) == comparison


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--evaluation.tasks": "[swimming]"}, "the test data has no task ['swimming']"),
        (
            {"--weightings": "cosine:0.5|1"},
            "--weightings with several scales chooses among them on held-out training data, but data.held_out_fraction is 0",
        ),
        (
            {"--methods": "feddpa_t,feddpa_f", "--lora.local_rank": "2"},
            "feddpa_f starts the local adapter from the global",
        ),
        (
            {"--data.test_path": "{unseen}"},
            "so P and TTP have no value: choose among ['colour0', 'count1'] with evaluation",
        ),
        ({"--data.path": "{single}"}, "with one client is the client's own, and leaves nothing"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    tmp_path: Path, model: Path, federation: Path, options: dict[str, str], message: str
) -> None:
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text('{"instruction": "which cat sings", "output": "b", "category": "riddle"}\n')
    single = tiny.make_federation(tmp_path / "single", sizes=(5,))
    words = [word.format(unseen=unseen, single=single) for option in options.items() for word in option]
    ended = compare(tiny.recipe(model, federation, tmp_path / "runs", name="cmp"), *words)
    assert ended.returncode == 2, ended.output
    (error,) = ended.errors
    assert message in error
    assert ended.num_tracebacks == 0
    assert not (tmp_path / "runs" / "cmp").exists()


def test_the_order_of_phases_is_for_feddpa_t_and_rounds_cannot_shrink(
    tmp_path: Path, model: Path, federation: Path
) -> None:
    settings = {"generation__num_beams": 1, "generation__max_new_tokens": 4, "evaluation__instances_per_task": 1}
    argv = tiny.recipe(model, federation, tmp_path / "runs", name="cmp", method__global_source="aggregated", **settings)
    ended = compare(argv, "--methods", "feddpa_t,fedit", "--weightings", "global")
    assert ended.returncode == 0, ended.output
    recipes = {
        method: (tmp_path / f"runs/cmp/{method}-seed0/config.yaml").read_text() for method in ("feddpa_t", "fedit")
    }
    assert "global_source: aggregated" in recipes["feddpa_t"]
    assert "global_source: own" in recipes["fedit"]

    ended = compare(argv, "--methods", "feddpa_t,fedit", "--federation.num_rounds", "1")
    assert ended.returncode == 2, ended.output
    (error,) = ended.errors
    assert f"federation.num_rounds is 1, but {tmp_path}/runs/cmp/feddpa_t-seed0 has completed 2 rounds" in error
    assert stages(ended) == []


def test_help_is_printed_once() -> None:
    command = [beside_python("deepspeed"), "--master_port", str(free_port()), "launch/compare.py", "--help"]
    ended = run(command, LOCAL_SIZE="2")
    assert ended.returncode == 0, ended.output
    assert ended.output.count("usage: deepspeed launch/compare.py --config RECIPE") == 1


def test_two_ranks_of_a_launcher_compare_as_one(tmp_path: Path, model: Path, federation: Path) -> None:
    settings = {"federation__num_rounds": 1, "generation__num_beams": 1, "generation__max_new_tokens": 4}
    options = ["--methods", "feddpa_t", "--weightings", "cosine"]
    found = []
    for name, num_ranks in (("one", 1), ("two", 2)):
        argv = tiny.recipe(model, federation, tmp_path / name, name="cmp", **settings)
        launcher = [beside_python("deepspeed"), "--master_port", str(free_port())]
        ended = run([*launcher, "launch/compare.py", *argv, *options], 300.0, LOCAL_SIZE=str(num_ranks))
        assert ended.returncode == 0, ended.output
        assert stages(ended) == ["train feddpa_t, seed 0", "evaluate feddpa_t, seed 0: cosine, test"]
        (path,) = (tmp_path / name).glob("cmp/comparisons/*/comparison.json")
        found.append(json.loads(path.read_text()))
        files = {path.name for path in (tmp_path / name).glob("cmp/*/evaluations/*/answers/*")}
        assert files, "each rank writes its own; one that starts late may find all work items taken"
        assert files <= {f"rank_{rank:04d}.jsonl" for rank in range(num_ranks)}
    one, two = (
        [{q: (m["weighting"], m[q]["mean"]) for q in ("P", "TTP")} for m in whole["methods"]] for whole in found
    )
    assert one == two


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_stops_what_the_comparison_runs(
    number: signal.Signals, tmp_path: Path, model: Path, federation: Path
) -> None:
    """The training saves and ends (`Running.wait` asserts that nothing is left); the same command resumes from there."""
    argv = tiny.recipe(model, federation, tmp_path / "runs", name="cmp", federation__num_rounds=40)
    command = [PYTHON, "launch/compare.py", *argv, "--methods", "fedit"]
    with Running(command) as running:
        wait_for(tmp_path, "runs/cmp/fedit-seed0/rounds/round_000002", [running], 60.0)
        running.process.send_signal(number)
        ended = running.wait(60.0)
    assert ended.returncode == (Preempted.exit_code if number == signal.SIGTERM else -number), ended.output
    assert ended.num_tracebacks == 0, ended.output
    assert not ended.errors, ended.output
    assert not (tmp_path / "runs/cmp/comparisons").exists(), "stopped too late to tell anything"

    ended = run(command, 300.0)
    assert ended.returncode == 0, ended.output
    assert re.search(r"continues after round \d+ of 40", ended.output)


def test_a_training_that_fails_ends_the_comparison_with_its_status(
    tmp_path: Path, model: Path, federation: Path
) -> None:
    argv = tiny.recipe(model, federation, tmp_path / "runs", name="cmp", lora__target_modules=["no_such_layer"])
    ended = compare(argv, "--methods", "fedit")
    assert ended.returncode == 2, ended.output
    assert "lora.target_modules ['no_such_layer'] are not linear layers" in ended.errors[0]
    assert "could not train fedit, seed 0 (see above)" in ended.errors[1]
    assert len(ended.errors) == 2
