"""This process's place, read from what each launcher puts into the environment."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.distributed.launchers import (
    Launch,
    check_environment,
    check_hostfile_of_launcher,
    discover_launch,
    expand_hostlist,
)
from dpa_ds.errors import ClusterError

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[01-02]",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}

PLACES = {
    "python": ({}, Launch("single", 0, 1, 0, "127.0.0.1", 0, on_one_host=True)),
    "deepspeed": (DEEPSPEED | {"CROSS_SIZE": "2"}, Launch("env", 3, 4, 1, "n1", 29500)),
    "deepspeed on one host": (
        DEEPSPEED | {"CROSS_SIZE": "1"},
        Launch("env", 3, 4, 1, "127.0.0.1", 29500, on_one_host=True),
    ),
    "torchrun": (
        DEEPSPEED | {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"},
        Launch("env", 3, 4, 1, "n1", 29500, agent_store=True),
    ),
    "torchrun on one host": (  # its agent's store is where it says
        DEEPSPEED | {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "4"},
        Launch("env", 3, 4, 1, "n1", 29500, on_one_host=True, agent_store=True),
    ),
    "by hand, least": ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("env", 0, 1, 0, "127.0.0.1", 29500, on_one_host=True)),
    "srun": (SLURM, Launch("slurm", 5, 8, 1, "n01", 20000 + 41 * 7 + 2)),
    "srun with an address": (
        SLURM | {"MASTER_ADDR": "n9", "MASTER_PORT": "77"},
        Launch("slurm", 5, 8, 1, "n9", 77),
    ),
    "srun on one host": (
        SLURM | {"SLURM_STEP_NODELIST": "n01"},
        Launch("slurm", 5, 8, 1, "127.0.0.1", 20000 + 41 * 7 + 2, on_one_host=True),
    ),
    "srun of one task with PMI2": (
        SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "PMI_SIZE": "1"},
        Launch("slurm", 0, 1, 0, "n01", 20000 + 41 * 7 + 2),
    ),
    "PMI2 left in the environment": ({"PMI_SIZE": "1"}, Launch("single", 0, 1, 0, "127.0.0.1", 0, on_one_host=True)),
    "mpirun of one rank": (
        {"OMPI_COMM_WORLD_SIZE": "1"},
        Launch("single", 0, 1, 0, "127.0.0.1", 0, on_one_host=True),
    ),
    "torchrun inside srun": (SLURM | DEEPSPEED, Launch("env", 3, 4, 1, "n1", 29500)),
    "python in a batch script": (
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "41", "SLURM_NTASKS": "8"},
        Launch("single", 0, 1, 0, "127.0.0.1", 0, on_one_host=True),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_place_under(name: str) -> None:
    environ, place = PLACES[name]
    assert discover_launch(environ) == place


CONTRADICTIONS = [
    (DEEPSPEED | {"RANK": "zero"}, "environment variable RANK must be an integer, got 'zero'"),
    (DEEPSPEED | {"LOCAL_RANK": ""}, "environment variable LOCAL_RANK must be an integer, got ''"),
    (DEEPSPEED | {"MASTER_PORT": "http"}, "environment variable MASTER_PORT must be an integer, got 'http'"),
    (DEEPSPEED | {"RANK": "4"}, "RANK is 4, but the job has 4 ranks: RANK must be in 0..3"),
    (DEEPSPEED | {"RANK": "-1"}, "RANK is -1, but the job has 4 ranks: RANK must be in 0..3"),
    ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not: set both, or neither for a job of one rank"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
    (
        DEEPSPEED | {"WORLD_SIZE": "1" + "0" * 9},
        "must be the number of ranks of the job, at most 100000, got 1000000000",
    ),
    (DEEPSPEED | {"LOCAL_RANK": "-1"}, "LOCAL_RANK must be the number of this rank on its host, 0 or more, got -1"),
    ({"PMI_SIZE": "many"}, "environment variable PMI_SIZE must be an integer, got 'many'"),
    (SLURM | {"SLURM_PROCID": "x"}, "environment variable SLURM_PROCID must be an integer, got 'x'"),
]


@pytest.mark.parametrize(("environ", "message"), CONTRADICTIONS)
def test_contradiction(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        discover_launch(environ)
    assert message in str(caught.value)


def test_steps_and_jobs_of_one_host_do_not_meet() -> None:
    ports = {
        discover_launch(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(100, 120)
        for step in range(7)
    }
    assert len(ports) == 20 * 7
    assert all(1024 < port < 65536 for port in ports)


HOSTLISTS = [
    ("n1", ["n1"]),
    ("n1,n2", ["n1", "n2"]),
    ("n[1-3]", ["n1", "n2", "n3"]),
    ("n[08-10]", ["n08", "n09", "n10"]),
    ("n[1-2,07],login", ["n1", "n2", "n07", "login"]),
    ("gpu-a[1,3],gpu-b[2-3]", ["gpu-a1", "gpu-a3", "gpu-b2", "gpu-b3"]),
    ("rack1-n[1-2].site", ["rack1-n1.site", "rack1-n2.site"]),
    ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
]


@pytest.mark.parametrize(("text", "hosts"), HOSTLISTS)
def test_expand_hostlist(text: str, hosts: list[str]) -> None:
    assert expand_hostlist(text) == hosts


@given(st.integers(0, 200), st.integers(0, 30), st.integers(1, 5))
def test_expand_range(first: int, more: int, width: int) -> None:
    hosts = [f"n{i:0{width}d}" for i in range(first, first + more + 1)]
    assert expand_hostlist(f"n[{first:0{width}d}-{first + more:0{width}d}]") == hosts


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"GLOO_SOCKET_IFNAME": "ib9"},
            "GLOO_SOCKET_IFNAME names 'ib9', but this host has .*lo.*: set it to one of them",
        ),
        ({"GLOO_SOCKET_IFNAME": "lo,ib9"}, "GLOO_SOCKET_IFNAME names 'ib9'"),
        ({"DS_ACCELERATOR": "gpu"}, "DS_ACCELERATOR is 'gpu', but DeepSpeed knows cuda, cpu, "),
        ({"DS_ACCELERATOR": ""}, "DS_ACCELERATOR is '', but DeepSpeed knows"),
    ],
)
def test_variables_that_name_nothing(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_environment(environ)


def test_variables_that_name_something() -> None:
    check_environment({})
    check_environment({"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cuda"})


@pytest.mark.parametrize("library", ["mpi4py", "mpi4py.MPI"])
def test_ranks_of_mpi_without_mpi(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ClusterError, match=r"mpirun started 2 ranks, but MPI cannot be loaded here .*LD_LIBRARY_PATH"):
        discover_launch({"PMI_SIZE": "2", "PMI_RANK": "0"})


def test_hostfile(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=2\n")
    launcher = ["/usr/bin/python", "/usr/bin/deepspeed"]
    missing = str(tmp_path / "hostfil")
    check_hostfile_of_launcher([])
    check_hostfile_of_launcher([*launcher, "launch/run.py"])
    for option in (["--hostfile", str(hostfile)], [f"--hostfile={hostfile}"], ["-H", str(hostfile)]):
        check_hostfile_of_launcher([*launcher, *option, "launch/run.py"])
    for option in (["--hostfile", missing], [f"--hostfile={missing}"], ["-H", missing], ["-H", str(tmp_path)]):
        with pytest.raises(ClusterError, match="does not exist: deepspeed would silently use this host alone"):
            check_hostfile_of_launcher([*launcher, *option, "launch/run.py"])
    check_hostfile_of_launcher([*launcher, "launch/run.py", "--hostfile", missing])  # the script's own option
