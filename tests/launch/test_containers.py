"""The container recipes, as far as a machine without a container engine can tell.

They are read by rules of their formats, every source exists, both run the same steps of containers/install.sh, and what
they copy builds a wheel. `make containers` runs the steps that build and install, for which pip needs a package index and
minutes.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.processes import PYTHON, REPOSITORY

CONTAINERS = REPOSITORY / "containers"
INSTRUCTIONS = {"ARG", "FROM", "COPY", "RUN", "ENV", "WORKDIR", "CMD"}
SECTIONS = {"arguments", "files", "post", "environment", "runscript", "test"}
STEPS = ("system", "wheel", "package")


def dockerfile() -> list[tuple[str, list[str]]]:
    """Instructions and their words, in order."""
    text = (CONTAINERS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def definition() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The header of dpa_ds.def, and the lines of its sections."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in (CONTAINERS / "dpa_ds.def").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("%"):
            lines = sections.setdefault(line[1:].strip(), [])
        elif lines is None:
            key, _, value = line.partition(": ")
            header[key] = value
        else:
            lines.append(line.strip())
    return header, sections


def steps_of(commands: list[str]) -> list[tuple[str, int]]:
    """Steps of install.sh that are run, and the number of their arguments."""
    found = []
    for command in commands:
        words = shlex.split(command)
        if len(words) > 2 and words[1].endswith("install.sh"):
            found.append((words[2], len(words) - 3))
    return found


def test_the_dockerfile() -> None:
    lines = dockerfile()
    assert {name for name, _ in lines} == INSTRUCTIONS
    stages = [words[2] for name, words in lines if name == "FROM" and len(words) == 3]
    sources = []
    for name, words in lines:
        if name == "COPY" and not words[0].startswith("--"):
            sources += words[:-1]
        elif name == "COPY":
            assert words[0].removeprefix("--from=") in stages
    assert {"setup.py", "dpa_ds", "launch", "ds_configs"} <= set(sources)
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    declared = {words[0].partition("=")[0] for name, words in lines if name == "ARG"}
    used = set(re.findall(r"\$\{(\w+)\}", (CONTAINERS / "Dockerfile").read_text()))
    assert used == declared
    commands = [shlex.join(words) for name, words in lines if name == "RUN"]
    assert steps_of(commands) == [("system", 0), ("wheel", 2), ("system", 0), ("package", 4)]


def test_the_apptainer_definition() -> None:
    header, sections = definition()
    assert header == {"Bootstrap": "docker", "From": "{{ BASE }}"}
    assert set(sections) == SECTIONS
    declared = {line.partition("=")[0] for line in sections["arguments"]}
    assert set(re.findall(r"\{\{ (\w+) \}\}", (CONTAINERS / "dpa_ds.def").read_text())) == declared
    sources = [line.split()[0] for line in sections["files"]]
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert steps_of(sections["post"]) == [("system", 0), ("wheel", 2), ("package", 4)]


def test_both_have_the_same_arguments() -> None:
    in_docker = {tuple(words[0].split("=", 1)) for name, words in dockerfile() if name == "ARG"}
    in_apptainer = {tuple(line.split("=", 1)) for line in definition()[1]["arguments"]}
    assert in_docker == in_apptainer


def test_the_shell_can_read_the_steps() -> None:
    script = CONTAINERS / "install.sh"
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    cases = re.findall(r"^(\w+)\)$", script.read_text(), flags=re.M)
    assert tuple(cases) == STEPS
    assert subprocess.run(["sh", str(script), "sytem"], capture_output=True, check=False).returncode == 2


@pytest.mark.launch
def test_the_sources_that_are_copied_are_enough(tmp_path: Path) -> None:
    """What the containers copy builds a wheel, from which the recipes are found."""
    _, sections = definition()
    for line in sections["files"]:
        source, target = line.split()
        if target.startswith("/source/"):
            place = tmp_path / target[1:]
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(REPOSITORY / source), str(place)], check=True)
    code = "from setuptools import build_meta; build_meta.build_wheel('..')"
    ended = subprocess.run(
        [PYTHON, "-c", code], cwd=tmp_path / "source", capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (wheel,) = tmp_path.glob("dpa_ds-*.whl")
    listed = subprocess.run([PYTHON, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True)
    assert "dpa_ds/shipped/launch/recipes/demo.yaml" in listed.stdout
