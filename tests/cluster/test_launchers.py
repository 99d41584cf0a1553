"""One recipe on two hosts, by every launcher: the adapters are those of one host."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.machines import Machines
from tests.launch.processes import (
    RUN,
    Running,
    adapters,
    assert_same_adapters,
    beside_python,
    free_port,
    run_by_hand,
    start_by_hand,
)

pytestmark = pytest.mark.cluster
DEADLINE_SECONDS = 150.0
Launcher = Callable[[Machines, Path, Sequence[str]], list[Running]]


def deepspeed(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """By pdsh over ssh; the environment of the ranks is that of a file."""
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    (folder / "environment").write_text("OMP_NUM_THREADS=1\n")
    words = ["--hostfile", str(folder / "hostfile"), "--master_port", str(free_port()), "launch/run.py", *argv]
    command = machines.on(1, [beside_python("deepspeed"), *words])
    return [Running(command, DS_ENV_FILE=str(folder / "environment"))]


def mpirun(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """MPICH's, over ssh. UCX would take the two hosts, which share a kernel, for one, and look for shared memory."""
    words = ["-launcher", "ssh", "-hosts", "n1,n2", "-ppn", "1", "-n", "2", *RUN, *argv]
    return [Running(machines.on(1, [beside_python("mpirun"), *words]), UCX_TLS="tcp,self")]


def srun(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """Two tasks on each of two nodes."""
    words = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--kill-on-bad-exit=1"]
    return [Running(machines.on(1, ["srun", *words, *RUN, *argv]))]


def torchrun(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """One agent a host."""
    port = str(free_port())
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", machines.address(1), "--master-port", port]
    return [
        Running(machines.on(n, [beside_python("torchrun"), *where, "--node-rank", str(n - 1), "launch/run.py", *argv]))
        for n in (1, 2)
    ]


def deepspeed_mpich(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """`deepspeed --launcher mpich`: DeepSpeed calls the mpirun in PATH."""
    return _deepspeed_by(machines, folder, argv, "mpich", "-launcher ssh", beside_python("mpirun").rpartition("/")[0])


def deepspeed_openmpi(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """`deepspeed --launcher openmpi`, with the system's Open MPI. It must be reported that root may do this."""
    if shutil.which("mpirun.openmpi") is None:
        pytest.skip("not installed: openmpi-bin")
    (folder / "bin").mkdir()
    (folder / "bin" / "mpirun").symlink_to("/usr/bin/mpirun.openmpi")
    return _deepspeed_by(
        machines,
        folder,
        argv,
        "openmpi",
        "--allow-run-as-root --prefix /usr -x MPI4PY_MPIABI=openmpi -x OMP_NUM_THREADS=1",
        str(folder / "bin"),
    )


def deepspeed_slurm(machines: Machines, folder: Path, argv: Sequence[str]) -> list[Running]:
    """`deepspeed --launcher slurm`: DeepSpeed calls srun."""
    return _deepspeed_by(machines, folder, argv, "slurm", "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1", "/usr/bin")


def _deepspeed_by(
    machines: Machines, folder: Path, argv: Sequence[str], launcher: str, launcher_args: str, programs: str
) -> list[Running]:
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    words = ["--hostfile", str(folder / "hostfile"), "--master_port", str(free_port()), "--launcher", launcher]
    command = [beside_python("deepspeed"), *words, f"--launcher_args={launcher_args}", "launch/run.py", *argv]
    variables = {"UCX_TLS": "tcp,self", "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return [Running(machines.on(1, command), **variables)]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory, model: Path, federation: Path) -> Path:
    """The run that all others must equal: two ranks, a client each."""
    folder = tmp_path_factory.mktemp("one_host")
    argv = tiny.recipe(model, federation, folder / "runs")
    ended = run_by_hand(start_by_hand([*RUN, *argv], 2), DEADLINE_SECONDS)
    assert [one.returncode for one in ended] == [0, 0], ended[0].output
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(
    ("launcher", "layout", "groups"),
    [
        (deepspeed, ["--cluster.ranks_per_group", "2"], ["group 0: 2 ranks on n1, n2; clients 0, 1"]),
        (mpirun, [], ["group 0: 1 rank on n1; clients 0", "group 1: 1 rank on n2; clients 1"]),
        (srun, [], ["group 0: 2 ranks on n1; clients 0", "group 1: 2 ranks on n2; clients 1"]),
        (torchrun, ["--cluster.ranks_per_group", "2"], ["group 0: 2 ranks on n1, n2; clients 0, 1"]),
        (deepspeed_mpich, [], ["group 0: 1 rank on n1; clients 0", "group 1: 1 rank on n2; clients 1"]),
        (deepspeed_openmpi, [], ["group 0: 1 rank on n1; clients 0", "group 1: 1 rank on n2; clients 1"]),
        (deepspeed_slurm, [], ["group 0: 1 rank on n1; clients 0", "group 1: 1 rank on n2; clients 1"]),
    ],
)
def test_the_adapters_are_those_of_one_host(
    launcher: Launcher,
    layout: list[str],
    groups: list[str],
    machines: Machines,
    model: Path,
    federation: Path,
    one_host: Path,
    tmp_path: Path,
) -> None:
    argv = [*tiny.recipe(model, federation, tmp_path / "runs"), *layout]
    ended = run_by_hand(launcher(machines, tmp_path, argv), DEADLINE_SECONDS)
    output = "\n\n".join(one.output for one in ended)
    assert [one.returncode for one in ended] == [0] * len(ended), output
    assert all(group in output for group in groups), output
    assert_same_adapters(adapters(tmp_path / "runs" / "tiny"), adapters(one_host), tolerance=1e-6)


@pytest.mark.parametrize(
    "launcher", [deepspeed, mpirun, srun, torchrun, deepspeed_mpich, deepspeed_openmpi, deepspeed_slurm]
)
def test_no_launcher_calls_a_failure_a_success(
    launcher: Launcher, machines: Machines, federation: Path, tmp_path: Path
) -> None:
    """The recipe's model is not there: reported once, whatever the number of hosts."""
    argv = tiny.recipe(tmp_path / "no_model", federation, tmp_path / "runs")
    ended = run_by_hand(launcher(machines, tmp_path, argv), DEADLINE_SECONDS)
    assert all(one.returncode != 0 for one in ended), ended
    errors = [line for one in ended for line in one.errors if str(tmp_path / "no_model") in line]
    assert len(errors) == 1, "\n\n".join(one.output for one in ended)


def test_what_crosses_the_network_is_adapters(machines: Machines, tmp_path: Path) -> None:
    """Counted on the cable between two hosts with a client each: the bytes of the rounds, however much data there is."""
    model = tiny.make_model(tmp_path / "model", hidden_size=512, intermediate_size=512)
    few, many = (tiny.make_federation(tmp_path / str(size), sizes=(size, size)) for size in (7, 3000))

    def num_bytes(data: Path, num_rounds: int) -> tuple[int, int]:
        """On the cable, and of one adapter."""
        folder = tmp_path / f"{data.name}_{num_rounds}"
        folder.mkdir()
        settings = {"lora__rank": 16, "train__max_steps": 1, "federation__num_rounds": num_rounds}
        argv = tiny.recipe(model, data, folder / "runs", **settings)
        before = machines.num_bytes(2)
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": machines.address(1), "MASTER_PORT": str(free_port())}
        ranks = [Running(machines.on(r + 1, [*RUN, *argv]), **common, RANK=str(r), LOCAL_RANK="0") for r in (0, 1)]
        ended = run_by_hand(ranks, DEADLINE_SECONDS)
        assert [one.returncode for one in ended] == [0, 0], ended[0].output
        shared = {key: tensor for key, tensor in adapters(folder / "runs" / "tiny").items() if key.startswith("global")}
        return machines.num_bytes(2) - before, 4 * sum(tensor.numel() for tensor in shared.values())

    (one_round, adapter), (nine_rounds, _), (much_data, _) = (
        num_bytes(few, 1),
        num_bytes(few, 9),
        num_bytes(many, 9),
    )
    assert 1.0 < (nine_rounds - one_round) / 8 / (2 * adapter) < 1.05, "sent once, received once, and headers"
    size = sum(path.stat().st_size for path in many.glob("*/*.json")) - sum(
        path.stat().st_size for path in few.glob("*/*.json")
    )
    print(
        f"{nine_rounds - one_round} bytes for 8 rounds of {adapter}; {much_data - nine_rounds} for {size} more of data"
    )
    assert abs(much_data - nine_rounds) < size / 10
