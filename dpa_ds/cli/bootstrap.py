"""From a process that some launcher started to a job whose ranks agree on what they run."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

from dpa_ds.cli.args import command_line
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import to_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.config.shipped import as_started_here
from dpa_ds.distributed.job_store import JOIN_TIMEOUT_SECONDS, JobStore, code_fingerprint, package_versions
from dpa_ds.distributed.launchers import Launch, check_environment, check_hostfile_of_launcher, discover_launch
from dpa_ds.errors import ClusterError, DpaError

Work = Callable[[JobStore], None]
"""What a job does. Collective: every rank of the job."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The newer name and the older one, which is read by every version of torch."""
MARGIN_SECONDS = 5.0
"""Beyond `cluster.timeout_seconds`: the waits that have a bound of their own say more."""
RANK_VARIABLES = {
    "RANK": "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "SLURM_PROCID": "SLURM_STEP_NUM_TASKS",
}
"""Variables in which launchers say a rank, and the number of ranks."""


def run_job(argv: Sequence[str] | None, prepare: Callable[[Sequence[str]], tuple[RunConfig, Work]]) -> None:
    """Find this rank's place, `prepare(argv)` config and work, agree with the other ranks, and do the work.

    Torch is imported by the work, not before: what is wrong with recipe or ranks is reported without that wait. Ends
    the process with the error's exit code if anything fails on this rank; one rank of the job reports what.
    Collective: every rank of the job.
    """
    # torch reads it when it is first imported. Below ERROR each rank adds 40 lines of C++ stack to a peer's one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    set_allocator_defaults(os.environ, importlib.metadata.version("torch"))
    try:
        launch = discover_launch()
    except DpaError as error:
        if not _is_further_rank(os.environ):
            _report(error)
        sys.exit(error.exit_code)
    config: RunConfig | None = None
    problem: DpaError | None = None
    facts: dict[str, str] = {}
    try:
        check_hostfile_of_launcher()
        check_environment()
        with _stdout_of(launch.global_rank == 0):  # --help and --print_config are written once
            config, work = prepare(command_line(argv))
        facts = _facts(config.engine.deepspeed_config, to_yaml(config))
    except DpaError as error:
        problem = error
    timeout_seconds = JOIN_TIMEOUT_SECONDS
    if config is not None:
        timeout_seconds = config.cluster.timeout_seconds
    job = None
    try:
        with _give_up_after(timeout_seconds + MARGIN_SECONDS, launch):
            job = JobStore(launch, timeout_seconds=timeout_seconds)
            job.check_consistency(facts, problem, timeout_seconds)
        assert config is not None  # else there was a problem, and check_consistency raised it
        if config.cluster.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported
        work(job)
        job.finish()
    except BaseException as error:
        if job is None:  # no store, no agreement on who speaks: one rank of each host
            if launch.local_rank == 0:
                _report(error)
            launch.exit(getattr(error, "exit_code", 1))
        job.fail(error)


@contextlib.contextmanager
def _give_up_after(seconds: float, launch: Launch) -> Iterator[None]:
    """End this process with one line if the block takes longer.

    What waits there for a rank or a port that accepts and says nothing waits in C++, some of it without a bound.
    """

    def give_up() -> None:
        if launch.global_rank <= 1:  # one rank speaks: rank 0, or where it is the silent one, the next
            _report(
                ClusterError(
                    f"rank {launch.global_rank} waited {seconds:g} s (cluster.timeout_seconds) in vain at "
                    f"{launch.meeting_place}: rank 0 is silent, or another program listens there; "
                    "look at its output, or choose another MASTER_PORT (deepspeed --master_port)"
                )
            )
        launch.exit(ClusterError.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def set_allocator_defaults(environ: MutableMapping[str, str], torch_version: str) -> None:
    """Settings of torch's allocators on a GPU, unless the user has any. torch reads them when it is first imported.

    Micro-batches differ in size: with segments that grow, what one leaves free is of use to the next. Pinned memory
    of more than 1 MB is not kept for another use, and so not rounded up to a power of two: an offloaded base would
    need up to twice its size.
    """
    if any(name in environ for name in ALLOCATOR_VARIABLES):
        return
    settings = "expandable_segments:True"
    major, minor = torch_version.split(".")[:2]
    if (int(major), int(minor)) >= (2, 13):  # an older torch ends where it does not know a setting (2.11)
        settings += ",pinned_max_cached_size_mb:1"
    environ["PYTORCH_CUDA_ALLOC_CONF"] = settings


def run_alone(work: Callable[[], None]) -> int:
    """Do the work of a program that is one process without a launcher.

    Returns:
        The exit status: 0, or that of the error, which is reported in one line.
    """
    try:
        work()
        sys.stdout.flush()
    except DpaError as error:
        _report(error)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough; Python flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(error: BaseException) -> None:
    sys.stderr.write(f"error: {as_started_here(str(error))}\n")


def _is_further_rank(environ: Mapping[str, str]) -> bool:
    """Whether this is surely not rank 0, which reports what is wrong with the environment of all."""
    for rank_name, size_name in RANK_VARIABLES.items():
        if rank_name in environ:
            rank, size = environ[rank_name], environ.get(size_name, "")
            are_numbers = re.fullmatch("[0-9]{1,9}", rank) and re.fullmatch("[0-9]{1,9}", size)
            return bool(are_numbers) and 0 < int(rank) < int(size)
    return False


def _facts(deepspeed_config: str, recipe: str) -> dict[str, str]:
    """What must be equal on all ranks."""
    return {
        "the code of dpa_ds": code_fingerprint(),
        "package versions": package_versions(),
        "the DeepSpeed JSON": json.dumps(load_deepspeed_json(deepspeed_config)),
        "the resolved config": hashlib.sha256(recipe.encode()).hexdigest()[:16],
    }


@contextlib.contextmanager
def _stdout_of(speaks: bool) -> Iterator[None]:
    """What is written to stdout is dropped unless this rank speaks."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
