"""launch/scaling_study.py: real runs of two sizes, a table and a picture; what is wrong is one line, before anything runs."""

import json
from pathlib import Path

import pytest

from dpa_ds.cli.scaling_study import main
from tests import tiny
from tests.launch.processes import PYTHON, run, run_forked

pytestmark = pytest.mark.launch


def test_two_sizes_and_a_prediction(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    recipe = tiny.recipe(model, data, tmp_path / "unused", train__max_steps=4)
    folder = tmp_path / "scale"
    argv = [*recipe, "--over", "groups=1,2", "--output", str(folder), "--predict", "ranks=1024,clients=1000,net=100Gb"]
    ended = run([PYTHON, "launch/scaling_study.py", *argv], 240.0)
    assert ended.returncode == 0, ended.output
    found = json.loads((folder / "points.json").read_text())
    assert [len(point["groups"]) for point in found["points"]] == [1, 2]
    for point in found["points"]:  # four clients, two phases of four steps of four examples
        clients = [client for group in point["groups"] for client in group]
        assert [client["steps"] for client in clients] == [8.0] * 4
        assert point["seconds"] > 0
    table = (folder / "scale.md").read_text()
    assert table in ended.output
    assert "| 1 | 1 | 1 | 4 |" in table
    assert "| 2 | 2 | 2 | 4 |" in table
    assert "1024 ranks, 1000 clients in 1000 groups of 1" in ended.output
    assert (folder / "scale.png").read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("results.json")}
    assert len(times) == 2
    again = run_forked(argv, program="launch/scaling_study.py")
    assert again.returncode == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a run that was done ran again"
    for words, reported in (
        (["--train.max_steps", "5"], "(train.max_steps: 4 -> 5)"),
        (["--train.micro_batch_tokens", "77"], "(train.micro_batch_tokens: "),
        (["--ranks_per_group", "2"], "(--ranks_per_group: 1 -> 2)"),
    ):
        other = run_forked([*argv, *words], program="launch/scaling_study.py")
        assert other.returncode == 2, other.output
        assert f"error: {folder} holds the runs of another experiment {reported}" in other.output
    assert (folder / "scale.md").read_text() == table


def test_a_field_that_the_recipe_itself_lacks(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_federation(tmp_path / "data")
    recipe = tiny.recipe(model, data / "test.jsonl", tmp_path / "unused", data__format="table", train__max_steps=2)
    recipe += ["--data.partition.kind=iid", "--data.task_column=null"]
    argv = [*recipe, "--over", "data.partition.num_clients=2,3", "--output", str(tmp_path / "scale")]
    ended = run_forked(argv, 240.0, "launch/scaling_study.py")
    assert ended.returncode == 0, ended.output
    found = json.loads((tmp_path / "scale" / "points.json").read_text())
    assert [[len(group) for group in point["groups"]] for point in found["points"]] == [[2], [3]]


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["--over", "groups"], "--over says what is varied"),
        (["--over", "ranks=1,2"], "--over says what is varied"),
        (["--over", "groups=1,zwei"], "'zwei' is not a number of groups"),
        (["--over", "groups=2,2"], "two are alike"),
        (["--over", "model.path=a/x,b/x"], "two are alike"),
        (["--over", "groups=1,2", "--mode", "strange"], "--mode is strong or weak"),
        (["--over", "groups=1,2", "--mode", "weak"], "needs data that can be divided"),
        (["--over", "groups=1,2", "--ranks_per_group", "0"], "--ranks_per_group must be a whole number"),
        (["--over", "groups=1,2", "--predict", "ranks=1024"], "write it like ranks=1024,clients=1000"),
        (["--over", "lora.rankk=1,2"], "lora.rankk"),
        (["--over", "lora.rank=1,-2"], "lora.rank must be >= 1, got -2"),
        (["--over", "lora.rank=1,2", "--mode", "weak"], "not for lora.rank"),
        (["--over", "groups=1,2", "--train.batch_sise", "3"], "train.batch_sise"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], reported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path / "model", tmp_path / "data", tmp_path / "unused")
    assert main([*recipe, "--output", str(tmp_path / "scale"), *words]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reported in line
    assert not (tmp_path / "scale").exists()
