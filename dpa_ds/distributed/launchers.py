"""Which rank am I: answered the same way under deepspeed, torchrun, srun, mpirun and a plain python."""

import itertools
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

import psutil

from dpa_ds.errors import ClusterError, list_some

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
ANY_PORT = 0
"""Rank 0 chooses one that is free."""
MAX_HOSTS = 100_000
MAX_RANKS = 100_000
"""Of a job. Rank 0 asks for each of them by name: with 10^9 it would do nothing else for hours."""
FORGETFUL = "deepspeed --launcher mpich"
"""Its helper above each rank ends with 0, however the rank ended (deepspeed 0.19.8, launcher/launcher_helper.py)."""
LAUNCHERS = {
    "launcher_helper.py": FORGETFUL,
    "deepspeed": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "launch/compare.py": "compare.py",
    "dpa_ds.cli.compare": "dpa-compare",
    "dpa-compare": "dpa-compare",
    "dpa_ds.cli": "dpa_ds.cli",
}
"""Word of a Python process's command line, or its end -> what messages call the launcher."""
ACCELERATORS = ("cuda", "cpu", "xpu", "npu", "mps", "hpu", "mlu", "sdaa", "supa", "klxpu")
"""What DS_ACCELERATOR may be (deepspeed 0.19.8, accelerator/real_accelerator.py)."""
THREADS = "OMP_NUM_THREADS"
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """Place of this process in the job, as its launcher reports it."""

    launcher: Literal["env", "slurm", "mpi", "single"]
    global_rank: int
    job_world_size: int
    local_rank: int
    """Node-local: picks the device."""
    master_addr: str
    master_port: int
    """ANY_PORT where nobody named one, and rank 0 can tell the others (meeting.py)."""
    on_one_host: bool = False
    """All ranks of the job are on this host: nothing need be reached from outside."""
    agent_store: bool = False
    """torchrun's agent already serves a store at the master address."""
    launchers: tuple[tuple[int, str], ...] = field(default=(), compare=False)
    """Process ids and names of the launchers above this process as it started: without them it would be an orphan."""

    @property
    def hostname(self) -> str:
        """Name of this host, for messages."""
        return socket.gethostname()

    @property
    def meeting_place(self) -> str:
        """Where the ranks find rank 0, for messages."""
        if self.master_port == ANY_PORT:
            return f"a free port of {self.hostname}"
        return f"{self.master_addr}:{self.master_port}"

    @property
    def launcher_process(self) -> int:
        """Process id of the launcher that started this rank."""
        return self.launchers[0][0]

    def exit(self, code: int) -> NoReturn:
        """End this process at once; under MPI end every rank, since a rank that just exits leaves its peers hanging."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.launcher == "mpi" and code != 0:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(code)
        if code != 0 and self.launchers:
            process, name = self.launchers[0]
            if name == FORGETFUL:
                os.kill(process, signal.SIGTERM)
        os._exit(code)  # interpreter teardown may wait for a peer's sockets


def discover_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read this process's place from the launcher's environment variables, or from MPI.

    RANK and WORLD_SIZE (deepspeed, torchrun) come first, then a Slurm step, then MPI, then a job of one rank.
    Collective under mpirun: all ranks of the job.

    Raises:
        ClusterError: variables are missing or contradict each other, mpirun and libmpi do not belong together, or
            deepspeed's launcher is gone already.
    """
    launchers = tuple(launchers_above() or ())
    if "CROSS_RANK" in environ and not launchers and Path("/proc/self").exists():  # set by deepspeed.launcher.launch
        raise ClusterError(
            "the deepspeed launcher that started this rank was killed meanwhile: run the same command again"
        )
    launch = replace(_discover(environ), launchers=launchers)
    if launch.on_one_host and not launch.agent_store:
        launch = replace(launch, master_addr=LOOPBACK)
        if "CROSS_RANK" in environ and launchers and sys.platform == "linux" and not _names_port():
            launch = replace(launch, master_port=ANY_PORT)  # deepspeed says 29500, to every job of this host
    return launch


def launchers_above() -> list[tuple[int, str]] | None:
    """Process ids and names of the launchers above this process, the nearest first.

    `deepspeed` starts ranks through a second process, and does not report its own end to them. Not a shell, which a
    process may well outlive (nohup). Empty where there is no /proc; None if it cannot be read just now.
    """
    found: list[tuple[int, str]] = []
    process = os.getppid()
    try:
        while True:
            folder = Path("/proc") / str(process)
            name = _name_of_launcher((folder / "cmdline").read_text(errors="replace"))
            if not name:
                break
            found.append((process, name))
            # "pid (name) state parent ...", where the name itself may hold blanks and parentheses.
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # no /proc, or gone while looking
        pass
    except OSError:
        return None
    return found


def threads_are_chosen(launch: Launch, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has said how many threads a rank has, by OMP_NUM_THREADS.

    torchrun sets the variable to 1 where it is not set and starts several ranks, and leaves no mark. But the kernel
    shows the environment that a process was started with: in torchrun's own the variable is there only if the user set
    it.
    """
    if THREADS not in environ:
        return False
    if environ[THREADS] != "1" or not launch.launchers:
        return True
    process, name = launch.launchers[0]
    if name != "torchrun":
        return True
    try:
        started_with = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return True
    return any(variable.startswith(f"{THREADS}=".encode()) for variable in started_with)


def _name_of_launcher(command_line: str) -> str:
    """Empty for any other process."""
    program, *words = command_line.split("\0")
    if "python" not in program:
        return ""
    for end, name in LAUNCHERS.items():
        for word in words:
            if word == end or word.endswith(f"/{end}"):
                return name
    return ""


def _discover(environ: Mapping[str, str]) -> Launch:
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_environment(environ)
    # SLURM_PROCID alone is also set in a batch script; only a step has SLURM_STEP_NUM_TASKS.
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ and not _slurm_step_of_one(environ):
        return _from_slurm(environ)
    num_mpi_ranks = _num_mpi_ranks(environ)
    if num_mpi_ranks > 1:
        return _from_mpi(num_mpi_ranks)
    return Launch("single", 0, 1, 0, LOOPBACK, ANY_PORT, on_one_host=True)


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what libraries would end in a traceback at, or wait for in vain, seconds or minutes later.

    Raises:
        ClusterError: a variable names a network interface or a kind of accelerator that does not exist.
    """
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if name and name not in interfaces:
            raise ClusterError(
                f"GLOO_SOCKET_IFNAME names {name[:40]!r}, but this host has {list_some(interfaces)}: set it to one of "
                "them, or unset it"
            )
    accelerator = environ.get("DS_ACCELERATOR")
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise ClusterError(
            f"DS_ACCELERATOR is {accelerator[:40]!r}, but DeepSpeed knows {', '.join(ACCELERATORS)}: set it to one of "
            "them, or unset it"
        )


def check_hostfile_of_launcher(commandline: list[str] | None = None) -> None:
    """Refuse a `--hostfile` that does not exist: deepspeed only warns and starts on the local host alone.

    Args:
        commandline: words of the launcher's command; found among this process's ancestors if not given.

    Raises:
        ClusterError: the file named on the deepspeed command line is missing.
    """
    words = commandline
    if words is None:
        words = _deepspeed_commandline()
    for i, word in enumerate(words):
        if word.endswith(".py"):  # what follows belongs to the script
            return
        match = re.fullmatch(r"(?:--hostfile|-H)(?:=(.*))?", word)
        if match is None:
            continue
        path = match[1]
        if path is None:  # --hostfile PATH, in two words
            path = "".join(words[i + 1 : i + 2])
        if not Path(path).is_file():
            raise ClusterError(
                f"hostfile {path!r} does not exist: deepspeed would silently use this host alone; "
                "correct the path (format: one `hostname slots=N` a line, see hostfile.example)"
            )


def _deepspeed_commandline() -> list[str]:
    try:
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            if any(Path(word).name in ("deepspeed", "ds") for word in words[:3]):
                return words
    except psutil.Error:  # an ancestor of another user: then it is not our launcher
        pass
    return []


def _from_environment(environ: Mapping[str, str]) -> Launch:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if other not in environ:  # each process would take itself for a whole job, all writing to one folder
            raise ClusterError(f"{name} is set, but {other} is not: set both, or neither for a job of one rank")
    rank, size = _rank_and_size(environ, "RANK", "WORLD_SIZE")
    if size > 1 and not environ.get("MASTER_ADDR"):
        raise ClusterError(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set: set it to the host of rank 0")
    return Launch(
        launcher="env",
        global_rank=rank,
        job_world_size=size,
        local_rank=_local_rank(environ, "LOCAL_RANK"),
        master_addr=environ.get("MASTER_ADDR", LOOPBACK),
        master_port=_port(environ, DEFAULT_PORT),
        on_one_host=_is_on_one_host(environ),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _is_on_one_host(environ: Mapping[str, str]) -> bool:
    """By what deepspeed or torchrun says, else by an address that no other host has."""
    if "CROSS_SIZE" in environ:  # deepspeed
        return environ["CROSS_SIZE"] == "1"
    if "LOCAL_WORLD_SIZE" in environ:  # torchrun
        return environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"]
    return environ.get("MASTER_ADDR", LOOPBACK) in (LOOPBACK, "localhost", "::1")


def _names_port() -> bool:
    """Whether the deepspeed command line, as far as it can be seen, names a port."""
    words = _deepspeed_commandline()
    if not words:
        return True
    for word in words:
        if word.endswith(".py"):  # what follows belongs to the script
            return False
        if word.startswith("--master_port"):
            return True
    return False


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in environ and default is not None:
        return default
    try:
        return int(environ[name])
    except ValueError:
        raise ClusterError(f"environment variable {name} must be an integer, got {environ[name][:80]!r}") from None


def _rank_and_size(environ: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank = _integer(environ, rank_name)
    size = _integer(environ, size_name)
    if size < 1:
        raise ClusterError(f"{size_name} must be the number of ranks of the job, at least 1, got {size}")
    if size > MAX_RANKS:
        raise ClusterError(f"{size_name} must be the number of ranks of the job, at most {MAX_RANKS}, got {size}")
    if not 0 <= rank < size:
        raise ClusterError(f"{rank_name} is {rank}, but the job has {size} ranks: {rank_name} must be in 0..{size - 1}")
    return rank, size


def _local_rank(environ: Mapping[str, str], name: str) -> int:
    local_rank = _integer(environ, name, 0)
    if not 0 <= local_rank < MAX_RANKS:
        raise ClusterError(f"{name} must be the number of this rank on its host, 0 or more, got {local_rank}")
    return local_rank


def _port(environ: Mapping[str, str], default: int) -> int:
    port = _integer(environ, "MASTER_PORT", default)
    if not 1 <= port <= 65535:
        raise ClusterError(f"MASTER_PORT must be a port in 1..65535, got {port}")
    return port


def _slurm_step_of_one(environ: Mapping[str, str]) -> bool:
    """`srun -n1 mpirun -n 4 ...`: MPI knows better."""
    return environ["SLURM_STEP_NUM_TASKS"] == "1" and _num_mpi_ranks(environ) > 1


def _num_mpi_ranks(environ: Mapping[str, str]) -> int:
    """Ranks that mpirun started; 1 without it. One rank needs no MPI, and Slurm sets PMI_SIZE=1 for a step of one."""
    for name in MPI_SIZE_VARIABLES:
        if name in environ:
            return _integer(environ, name)
    return 1


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    rank, size = _rank_and_size(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    hosts = expand_hostlist(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost")
    job_id = _integer(environ, "SLURM_JOB_ID", 0)
    step_id = _integer(environ, "SLURM_STEP_ID", 0)
    return Launch(
        launcher="slurm",
        global_rank=rank,
        job_world_size=size,
        local_rank=_local_rank(environ, "SLURM_LOCALID"),
        master_addr=environ.get("MASTER_ADDR", hosts[0]),
        # Two jobs or steps on one host must not meet: ports that differ by job, and for seven steps of each.
        master_port=_port(environ, 20000 + (job_id * 7 + step_id) % 20000),
        on_one_host=len(hosts) == 1,
    )


def expand_hostlist(text: str) -> list[str]:
    """Expand Slurm's compact host list, e.g. `n[1-2,07],login` -> n1, n2, n07, login (zero padding kept).

    Raises:
        ClusterError: it is none, or of more than MAX_HOSTS hosts.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]+|\[[^\]]*\])+", text):
        hosts += _expand_item(item, text)
    if not hosts:
        raise _no_hostlist(text)
    return hosts


def _expand_item(item: str, text: str) -> list[str]:
    """One item such as `r[1-2]n[1-2]`: every start goes with every end, the last bracket counting fastest."""
    expanded = [""]
    for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
        ends = [literal]
        if not literal:
            ends = []
            for part in ranges.split(","):
                ends += _expand_range(part, text)
        if len(expanded) * len(ends) > MAX_HOSTS:
            raise _no_hostlist(text)
        expanded = [start + end for start, end in itertools.product(expanded, ends)]
    return expanded


def _expand_range(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
    if match is None:
        raise _no_hostlist(text)
    first = int(match[1])
    last = int(match[2] or match[1])
    if not first <= last < first + MAX_HOSTS:
        raise _no_hostlist(text)
    width = len(match[1])  # zero padding is part of the names
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _no_hostlist(text: str) -> ClusterError:
    return ClusterError(
        f"SLURM_STEP_NODELIST must be a list of hosts such as n[1-4],login, got {text[:80]!r}: set MASTER_ADDR to the "
        "host of rank 0, and SLURM_STEP_NODELIST to that, too"
    )


def _from_mpi(promised: int) -> Launch:
    """Args: promised: number of ranks that mpirun says it started."""
    try:
        from mpi4py import MPI  # starts MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, libmpi is not
        raise ClusterError(
            f"mpirun started {promised} ranks, but MPI cannot be loaded here ({' '.join(str(error).split())[:200]}): "
            "put libmpi where the loader finds it (LD_LIBRARY_PATH), or start with deepspeed, torchrun or srun"
        ) from error

    comm = MPI.COMM_WORLD
    if comm.Get_size() != promised:
        library = MPI.Get_library_version().splitlines()[0].split(",")[0]
        raise ClusterError(
            f"mpirun started {promised} ranks, but libmpi ({library}) sees a world of {comm.Get_size()}: mpirun and "
            "the libmpi that mpi4py loads come from different MPIs; use the mpirun that lies beside this python, or "
            "set MPI4PY_MPIABI / LD_LIBRARY_PATH"
        )
    on_host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    address = None
    if comm.Get_rank() == 0:
        address = _free_address()
    host, port = comm.bcast(address, root=0)
    on_one_host = on_host.Get_size() == comm.Get_size()
    return Launch("mpi", comm.Get_rank(), comm.Get_size(), on_host.Get_rank(), host, port, on_one_host)


def _free_address() -> tuple[str, int]:
    """This host's name as other hosts reach it, and a port that is free now."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], _port(os.environ, DEFAULT_PORT)
    with socket.socket() as probe:
        probe.bind(("", 0))
        return reachable_hostname(), int(probe.getsockname()[1])


def reachable_hostname() -> str:
    """This host's name; 127.0.0.1 where it cannot be resolved: such a machine has no peers elsewhere."""
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return LOOPBACK
    return host
