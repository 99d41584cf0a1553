"""The package as a wheel, in an environment of its own, away from any checkout: everything works from what was installed.

The environment sees the libraries of this one by a .pth file, which does not reach an editable install: that one hangs
on a hook of its own. Two wheels are built (a second each), and programs start by themselves, each with its imports: minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpa_ds.cli.__main__ import PROGRAMS
from dpa_ds.config import shipped
from tests import tiny
from tests.launch.processes import REPOSITORY, Ended, run

NO_SOURCES = ("build", "dist", "runs")
"""Folders at the top of a checkout that a build or a run leaves."""
COMMANDS = {"preflight": "dpa-check"}
"""Program -> its console command, where it is not dpa-PROGRAM."""

pytestmark = pytest.mark.launch


@dataclass(frozen=True)
class Install:
    """An environment with the wheel, and a working directory far from the checkout."""

    environment: Path
    cwd: Path

    def run(self, command: str, *arguments: str, deadline_seconds: float = 300.0, **variables: str) -> Ended:
        """A program of the environment, as its user would call it."""
        path = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        program = str(self.environment / "bin" / command)
        # An empty PYTHONPATH: whoever runs these tests may have the checkout on theirs.
        variables = {"PATH": path, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **variables}
        return run([program, *arguments], deadline_seconds, self.cwd, **variables)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the package alone: a build in the checkout would leave its folders there, and find old ones."""
    folder = tmp_path_factory.mktemp("source")
    for path in REPOSITORY.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
        elif not path.name.startswith(".") and path.name not in NO_SOURCES and path.suffix != ".egg-info":
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    folder = tmp_path_factory.mktemp("install")
    environment, cwd = folder / "environment", folder / "work"
    cwd.mkdir()
    venv.create(environment)
    python = environment / "bin" / "python"
    packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "libraries.pth").write_text("\n".join(sorted(places)) + "\n")
    pip(f"--python={python}", "install", "--no-deps", "--no-index", str(wheel))
    # As pip would have written it for this environment.
    (environment / "bin" / "deepspeed").write_text(
        f"#!{python}\nfrom deepspeed.launcher.runner import main\n\nif __name__ == '__main__':\n    main()\n"
    )
    (environment / "bin" / "deepspeed").chmod(0o755)
    return Install(environment, cwd)


@pytest.fixture(scope="module")
def recipe(install: Install) -> list[str]:
    """Of a run of one round over a tiny model; its DeepSpeed JSON is one of the package."""
    model = tiny.make_model(install.cwd / "model")
    data = tiny.make_federation(install.cwd / "data", sizes=(7, 5))
    words = tiny.recipe(model, data, install.cwd / "runs", federation__num_rounds=1)
    return [*words, "--engine.deepspeed_config=ds_configs/zero0.json"]


@pytest.fixture(scope="module")
def trained(install: Install, recipe: list[str]) -> list[str]:
    ended = install.run("dpa-train", *recipe)
    assert ended.returncode == 0, ended.output
    return ["--run", str(install.cwd / "runs" / "tiny")]


def pip(*words: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "pip", "-q", *words], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def build_wheel(source: Path, folder: Path) -> Path:
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}", str(source))
    (wheel,) = folder.glob("dpa_ds-*.whl")
    return wheel


def python_says(install: Install, expression: str) -> str:
    ended = install.run("python", "-c", f"import dpa_ds.config.shipped as shipped; print({expression})")
    assert ended.returncode == 0, ended.output
    return ended.output.strip()


def test_the_package_is_the_installed_one(install: Install) -> None:
    inside = str(install.environment)
    assert python_says(install, "shipped.__file__").startswith(inside)
    assert python_says(install, "shipped.SHIPPED").startswith(inside)
    assert python_says(install, "shipped.IS_INSTALLED") == "True"
    assert not shipped.IS_INSTALLED


def test_the_wheel_holds_what_the_checkout_has(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder in ("launch", "launch/recipes", "launch/slurm", "ds_configs"):
        expected |= {
            f"dpa_ds/shipped/{folder}/{path.name}" for path in (REPOSITORY / folder).iterdir() if path.is_file()
        }
    assert len(expected) > 30
    assert expected == {name for name in held if name.startswith("dpa_ds/shipped/")}
    assert "dpa_ds/py.typed" in held
    assert {name.split("/")[0] for name in held} == {"dpa_ds", "dpa_ds-0.1.0.dist-info"}


def test_the_source_archive_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("dpa_ds-*/")
    again = build_wheel(unpacked, tmp_path / "wheel")
    assert contents(again) == contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_every_program_is_a_command(install: Install) -> None:
    """Programs of `python -m dpa_ds.cli`, console commands and modules are the same; each help names its own command."""
    commands = {COMMANDS.get(program, f"dpa-{program}") for program in PROGRAMS}
    assert {path.name for path in (install.environment / "bin").glob("dpa-*")} == commands
    for program in ("init", "plan", "preflight", "train"):
        command = COMMANDS.get(program, f"dpa-{program}")
        ended = install.run(command, "--help")
        assert ended.returncode == 0, ended.output
        assert "launch/run.py" not in ended.output
        assert command in ended.output or f"--module dpa_ds.cli.{program}" in ended.output


def test_a_recipe_is_found_by_its_name(install: Install) -> None:
    ended = install.run("dpa-train", "--recipe", "demo", "--print_config")
    assert ended.returncode == 0, ended.output
    assert ".cache/demo/SmolLM2-135M-Instruct" in ended.output
    by_path = install.run("dpa-train", "--config", "launch/recipes/demo.yaml", "--print_config")
    assert by_path.output == ended.output


def test_an_unknown_recipe_is_one_line(install: Install) -> None:
    ended = install.run("dpa-train", "--recipe", "demmo")
    assert ended.returncode == 2
    (line,) = ended.output.splitlines()
    assert line.startswith("error: --recipe 'demmo' is not a recipe of the package: it has chat, compare, demo")


def test_a_mistake_names_the_command(install: Install) -> None:
    ended = install.run("dpa-evaluate", "--run", "runs/none")
    assert ended.returncode == 2
    (line,) = ended.output.splitlines()
    assert "give a folder that dpa-train wrote" in line


def test_a_missing_deepspeed_json_says_where_it_was_looked_for(install: Install) -> None:
    ended = install.run("dpa-train", "--recipe", "demo", "--engine.deepspeed_config", "ds_configs/zero9.json")
    assert ended.returncode == 2
    (line,) = ended.output.splitlines()
    assert f"tried {install.cwd}/ds_configs/zero9.json and {install.environment}" in line


def test_init(install: Install) -> None:
    ended = install.run("dpa-init", "demo", "first")
    assert ended.returncode == 0, ended.output
    assert "dpa-train --config first/demo.yaml" in ended.output
    folder = install.cwd / "first"
    assert (folder / "demo.yaml").read_text() == (REPOSITORY / "launch" / "recipes" / "demo.yaml").read_text()
    assert "-m dpa_ds.cli.train" in (folder / "train.sbatch").read_text()
    (folder / "demo.yaml").write_text("name: edited\n")
    ended = install.run("dpa-init", "demo", "first")
    assert ended.returncode == 2
    assert ended.errors == [
        "error: first/demo.yaml is there already, and is not overwritten: move it away, or give another folder"
    ]
    assert (folder / "demo.yaml").read_text() == "name: edited\n"


def test_train_evaluate_generate(install: Install, trained: list[str]) -> None:
    ended = install.run("dpa-evaluate", *trained, "--instances", "1", "--max_new_tokens", "3", "--beams", "1")
    assert ended.returncode == 0, ended.output
    assert (install.cwd / "runs" / "tiny" / "evaluations").is_dir()
    assert "answers: " in ended.output
    ended = install.run("dpa-generate", *trained, "--client", "0", "--prompt", "colour0: red", "--max_new_tokens", "3")
    assert ended.returncode == 0, ended.output
    assert "alpha" in ended.output


def test_plan_and_check(install: Install, recipe: list[str]) -> None:
    ended = install.run("dpa-plan", *recipe, "--cluster", "nodes=1,gpus=2,gpu=cpu")
    assert ended.returncode == 0, ended.output
    ended = install.run("dpa-check", *recipe, "--json", "found.json")
    assert ended.returncode in (0, 3), ended.output
    assert json.loads((install.cwd / "found.json").read_text())


def test_programs_that_start_programs(install: Install, recipe: list[str]) -> None:
    """The scaling study starts the same run.py as the comparison."""
    words = [*recipe, "--name", "table", "--methods", "fedit", "--evaluation.instances_per_task", "1"]
    ended = install.run("dpa-compare", *words, "--generation.num_beams", "1", "--generation.max_new_tokens", "3")
    assert ended.returncode == 0, ended.output
    assert list((install.cwd / "runs" / "table" / "comparisons").glob("*/comparison.md"))


def test_modules_under_a_launcher(install: Install, recipe: list[str]) -> None:
    words = [*recipe, "--name", "two_ranks"]
    ended = install.run("deepspeed", "--module", "dpa_ds.cli.train", *words, LOCAL_SIZE="2")
    assert ended.returncode == 0, ended.output
    assert "(2 ranks)" in ended.output
    assert (install.cwd / "runs" / "two_ranks" / "results.json").is_file()
    by_module = install.run("python", "-m", "dpa_ds.cli.train", *words, "--print_config")
    assert by_module.output == install.run("dpa-train", *words, "--print_config").output


def test_an_editable_install_is_a_checkout() -> None:
    """Its own files are found, wherever it is called from."""
    assert shipped.SHIPPED == REPOSITORY
    assert shipped.find_recipe("demo").is_file()
