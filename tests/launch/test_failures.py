"""A rank that fails ends the whole job: soon, with an exit status that is not 0, and with one rank saying why."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.processes import (
    PYTHON,
    RUN,
    Ended,
    Running,
    beside_python,
    free_port,
    run,
    run_by_hand,
    start_by_hand,
)

pytestmark = pytest.mark.launch
DEADLINE_SECONDS = 120.0
SCRIPT = "tests/launch/raises_on_rank_1.py"


def deepspeed(script: str, arguments: list[str]) -> Ended:
    command = [beside_python("deepspeed"), "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
    return run([*command, script, *arguments], DEADLINE_SECONDS)


def torchrun(script: str, arguments: list[str]) -> Ended:
    command = [beside_python("torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    return run([*command, script, *arguments], DEADLINE_SECONDS)


def mpirun(script: str, arguments: list[str]) -> Ended:
    return run([beside_python("mpirun"), "-n", "2", PYTHON, script, *arguments], DEADLINE_SECONDS)


def by_hand(script: str, arguments: list[str]) -> Ended:
    """No launcher that ends the others: each rank must find out for itself."""
    ended = run_by_hand(start_by_hand([PYTHON, script, *arguments], 2), DEADLINE_SECONDS)
    assert len({one.returncode for one in ended}) == 1, [one.returncode for one in ended]
    return Ended(ended[0].returncode, ended[0].output + ended[1].output, max(one.seconds for one in ended))


def python(script: str, arguments: list[str]) -> Ended:
    """One rank that hosts both clients."""
    return run([PYTHON, script, *arguments], DEADLINE_SECONDS)


def without_torchruns_own(output: str) -> str:
    """torchrun ends with a summary, and a traceback of its own that names no rank."""
    return re.sub(r"Traceback \(most recent call last\):\n  File \"[^\n]*torchrun\".*", "", output, flags=re.DOTALL)


LAUNCHERS = {launcher.__name__: launcher for launcher in (deepspeed, torchrun, mpirun, by_hand, python)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_malformed_data_that_one_rank_sees(launcher: str, tmp_path: Path, model: Path, federation: Path) -> None:
    data = shutil.copytree(federation, tmp_path / "federation")
    broken = data / "2" / "local_training_1.json"
    broken.write_text('[{"instruction": "a", "output": "b"},\n {"instruction": \n]')
    ended = LAUNCHERS[launcher]("launch/run.py", tiny.recipe(model, data, tmp_path / "runs"))
    assert ended.returncode == (1 if launcher == "torchrun" else 2), ended.output
    (error,) = ended.errors
    assert f"error: {broken}:3: not JSON" in error
    assert launcher == "python" or error.startswith("[rank 1 on ")
    assert "Traceback" not in without_torchruns_own(ended.output), ended.output
    assert "Exception raised from" not in ended.output, "C++ stack of a rank that lost its peer"
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize("where", ["all_reduce", "store"])
@pytest.mark.parametrize("launcher", ["mpirun", "by_hand"])
def test_programmers_error_gives_one_traceback(
    launcher: str, where: str, tmp_path: Path, model: Path, federation: Path
) -> None:
    # The timeouts of the recipe are longer than the deadline: nobody may wait for them.
    long = {"cluster__timeout_seconds": 600, "federation__timeout_seconds": 600}
    ended = LAUNCHERS[launcher](SCRIPT, [where, *tiny.recipe(model, federation, tmp_path / "runs", **long)])
    assert ended.returncode == 1, ended.output
    assert ended.num_tracebacks == 1, ended.output
    assert "ZeroDivisionError: a fault of the programmer" in ended.output
    assert not ended.errors, ended.output


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_killed_rank_ends_the_job(launcher: str, tmp_path: Path, model: Path, federation: Path) -> None:
    """As the kernel's out-of-memory killer does it. DeepSpeed's and MPI's launchers must not call it success."""
    ended = LAUNCHERS[launcher](SCRIPT, ["killed", *tiny.recipe(model, federation, tmp_path / "runs")])
    assert ended.returncode != 0, ended.output
    assert ended.num_tracebacks == 0, ended.output
    assert len(ended.errors) <= 1, ended.output


def test_rank_that_never_arrives_is_named(tmp_path: Path, model: Path, federation: Path) -> None:
    recipe = tiny.recipe(model, federation, tmp_path / "runs", cluster__timeout_seconds=3)
    here = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = run([*RUN, *recipe], DEADLINE_SECONDS, **here)
    assert ended.returncode == 3
    (error,) = ended.errors
    assert "waited 3 s (cluster.timeout_seconds) in vain for rank 1, rank 2" in error


def test_port_that_another_program_holds(tmp_path: Path, model: Path, federation: Path) -> None:
    """It accepts connections, and says nothing. Eight seconds: the bound of a start, and its margin."""
    import socket

    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = tiny.recipe(model, federation, tmp_path / "runs", cluster__timeout_seconds=1)
        with Running([*RUN, *argv], RANK="1", LOCAL_RANK="1", **ranks) as second:
            first = run([*RUN, *argv], DEADLINE_SECONDS, RANK="0", **ranks)
            last = second.wait(DEADLINE_SECONDS)
    for ended in (first, last):
        assert ended.returncode == 3, ended.output
        assert ended.num_tracebacks == 0
    (error,) = first.errors
    assert f"cannot serve the job's store at 127.0.0.1:{port}" in error
    assert "choose another MASTER_PORT" in error
    (error,) = last.errors
    assert f"rank 1 waited 6 s (cluster.timeout_seconds) in vain at 127.0.0.1:{port}" in error


# ---- ranks that do not belong together --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["PMI", "OMPI_COMM_WORLD"])
def test_mpirun_and_libmpi_of_different_mpis(prefix: str, tmp_path: Path, model: Path, federation: Path) -> None:
    """A foreign mpirun announces 4 ranks; the libmpi beside this python sees 4 worlds of one."""
    recipe = tiny.recipe(model, federation, tmp_path / "runs")
    ranks = [Running([*RUN, *recipe], **{f"{prefix}_SIZE": "4", f"{prefix}_RANK": str(i)}) for i in range(2)]
    ended = run_by_hand(ranks, DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [3, 3]
    (error,) = [error for one in ended for error in one.errors]
    assert "mpirun started 4 ranks, but libmpi" in error
    assert "sees a world of 1" in error
    assert sum(one.num_tracebacks for one in ended) == 0
    assert not (tmp_path / "runs").exists()


def test_mistyped_hostfile(tmp_path: Path, model: Path, federation: Path) -> None:
    recipe = tiny.recipe(model, federation, tmp_path / "runs")
    command = [beside_python("deepspeed"), "--hostfile", "/nonexistent", "--master_port", str(free_port())]
    ended = run([*command, "launch/run.py", *recipe], DEADLINE_SECONDS)
    assert ended.returncode == 3, ended.output
    (error,) = ended.errors
    assert "error: hostfile '/nonexistent' does not exist" in error
    assert ended.num_tracebacks == 0
    assert not (tmp_path / "runs").exists()


def other_config(_: Path) -> tuple[list[str], dict[str, str]]:
    return ["--train.learning_rate", "3e-4"], {}


def other_code(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    import dpa_ds

    copy = shutil.copytree(Path(dpa_ds.__file__).parent, tmp_path / "copy" / "dpa_ds")
    with (copy / "errors.py").open("a") as file:
        file.write("# one comment more\n")
    return [], {"PYTHONPATH": str(tmp_path / "copy")}


def other_packages(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    metadata = tmp_path / "site" / "peft-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return [], {"PYTHONPATH": os.pathsep.join(paths)}


def other_recipe_missing(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    return ["--config", str(tmp_path / "only_there.yaml")], {}


@pytest.mark.parametrize(
    ("change", "named", "exit_code"),
    [
        (other_config, "hosts differ in the resolved config", 3),
        (other_code, "hosts differ in the code of dpa_ds", 3),
        (other_packages, "hosts differ in package versions", 3),
        (other_recipe_missing, "--config: no such file", 2),
    ],
)
def test_two_hosts_that_differ(
    change: Callable[[Path], tuple[list[str], dict[str, str]]],
    named: str,
    exit_code: int,
    tmp_path: Path,
    model: Path,
    federation: Path,
) -> None:
    recipe = tiny.recipe(model, federation, tmp_path / "runs")
    arguments, variables = change(tmp_path)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Running([*RUN, *recipe], **common, RANK="0"),
        Running([*RUN, *recipe, *arguments], **common, RANK="1", **variables),
    ]
    ended = run_by_hand(ranks, DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [exit_code] * 2, [one.output for one in ended]
    (error,) = [error for one in ended for error in one.errors]
    assert named in error
    assert sum(one.num_tracebacks for one in ended) == 0
    assert all("Exception raised from" not in one.output for one in ended)
    assert not (tmp_path / "runs").exists()


def test_deepspeed_json_with_owned_keys_names_the_file(tmp_path: Path, model: Path, federation: Path) -> None:
    """Seen by all ranks at once: still one line, from one of them."""
    owned = tmp_path / "mine.json"
    owned.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1}}))
    recipe = tiny.recipe(model, federation, tmp_path / "runs", engine__deepspeed_config=owned)
    ended = mpirun("launch/run.py", recipe)
    assert ended.returncode == 2, ended.output
    (error,) = ended.errors
    assert f"{owned} sets what the recipe owns: train_batch_size" in error
    assert not (tmp_path / "runs" / "tiny").exists()
