"""Files of the package are found by the names that they have in a checkout, and programs by those of an install."""

from pathlib import Path

import pytest

from dpa_ds.cli import init
from dpa_ds.config.shipped import as_started_here, find_file, find_recipe, recipe_names
from dpa_ds.errors import ConfigError


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("ds_configs/zero1.json")
    shipped = find_file(name, "x", "y")
    assert shipped.is_absolute()
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text("{}")
    assert find_file(name, "x", "y") == name
    with pytest.raises(ConfigError) as found:
        find_file(Path("ds_configs/zero9.json"), "field", "remedy")
    tried = f"{tmp_path}/ds_configs/zero9.json and {shipped.parent}/zero9.json"
    assert str(found.value) == f"field: no such file: ds_configs/zero9.json (tried {tried}): remedy"


@pytest.mark.parametrize("name", ["../recipes/demo", "demo.yaml", "", "Demo", "/etc/passwd"])
def test_a_name_of_a_recipe_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a recipe of the package: it has chat, compare, demo"):
        find_recipe(name)


def test_every_recipe_is_found() -> None:
    assert all(find_recipe(name).is_file() for name in recipe_names())


@pytest.mark.parametrize(
    ("checkout", "install"),
    [
        ("python launch/run.py --config R", "dpa-train --config R"),
        ("deepspeed --hostfile h launch/preflight.py", "deepspeed --hostfile h --module dpa_ds.cli.preflight"),
        ("torchrun --nproc-per-node 4 launch/run.py", "torchrun --nproc-per-node 4 -m dpa_ds.cli.train"),
        ("srun --ntasks 4 python launch/scaling_study.py", "srun --ntasks 4 dpa-scaling-study"),
        ("as for launch/preflight.py;", "as for dpa-check;"),
        ("launch/recipes/demo.yaml", "launch/recipes/demo.yaml"),
    ],
)
def test_programs_are_named_as_they_are_started(checkout: str, install: str) -> None:
    assert as_started_here(checkout, is_installed=True) == install
    assert as_started_here(checkout) == checkout


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["demmo"], 2, "--recipe 'demmo' is not a recipe of the package: it has chat"),
        (["demo", "new", "more"], 2, "unexpected argument 'more'"),
        (
            ["demo", "new", "--job", "sweeep"],
            2,
            "--job 'sweeep' is not a job script: it is none or evaluate, preflight",
        ),
        (["demo", "new", "--jobs=train"], 2, "--jobs is not an option; options are --job, --list"),
        (["demo", "file"], 4, "cannot write file"),
        (["demo", "file/below"], 4, "cannot write file/below"),
        (["demo", "x" * 300], 4, "cannot write x"),
        (["demo", "$NO_SUCH_VARIABLE/x"], 2, "DIR: $NO_SUCH_VARIABLE is not set"),
    ],
)
def test_init_refuses_in_one_line(
    words: list[str],
    status: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert init.main(words) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_init_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main([]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"own_data.yaml", "train.sbatch"}
    assert init.main(["demo", "new", "--job=none"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo.yaml"]
    capsys.readouterr()
    assert init.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in recipe_names())
