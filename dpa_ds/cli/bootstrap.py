"""From a process that some launcher started to a job whose ranks agree on what they run."""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.load import load_config, to_yaml
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JOIN_TIMEOUT_SECONDS, JobStore, code_fingerprint
from dpa_ds.distributed.launchers import check_hostfile_of_launcher, discover_launch
from dpa_ds.errors import DpaError

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
RANK_VARIABLES = {
    "RANK": "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "SLURM_PROCID": "SLURM_STEP_NUM_TASKS",
}
"""What launchers tell a rank, and the number of ranks."""


def run_job(
    argv: Sequence[str],
    work: Callable[[RunConfig, JobStore], None],
    load: Callable[[Sequence[str]], RunConfig] = load_config,
) -> None:
    """Find this rank's place, `load` the config, agree with the other ranks, and do `work(config, job)`.

    Ends the process with the error's exit code if anything fails on this rank; one rank of the job says what.
    Collective: every rank of the job.
    """
    try:
        launch = discover_launch()
    except DpaError as error:
        if not _is_further_rank(os.environ):
            sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    config, problem, facts = None, None, dict[str, str]()
    try:
        check_hostfile_of_launcher()
        with _silent_unless(launch.global_rank == 0):  # --help and --print_config are reported once
            config = load(argv)
        facts = _facts(config)
    except DpaError as error:
        problem = error
    job = None
    try:
        job = JobStore(launch)
        timeout = config.cluster.timeout_seconds if config else JOIN_TIMEOUT_SECONDS
        job.check_consistency(facts, problem, timeout)
        assert config is not None  # else there was a problem, and agree() raised it
        if config.cluster.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported
        work(config, job)
        job.finish()
    except BaseException as error:
        if job is None:  # no store, no agreement on who speaks: one rank of each host
            if launch.local_rank == 0:
                sys.stderr.write(f"error: {error}\n")
            launch.exit(getattr(error, "exit_code", 1))
        job.fail(error)


def _is_further_rank(environ: Mapping[str, str]) -> bool:
    """Whether this is surely not rank 0, which then says what is wrong with the environment of all."""
    for rank_name, size_name in RANK_VARIABLES.items():
        if rank_name in environ:
            rank, size = environ[rank_name], environ.get(size_name, "")
            return bool(
                re.fullmatch("[0-9]{1,9}", rank) and re.fullmatch("[0-9]{1,9}", size) and 0 < int(rank) < int(size)
            )
    return False


def _facts(config: RunConfig) -> dict[str, str]:
    versions = " ".join(f"{name}-{importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "the code of dpa_ds": code_fingerprint(),
        "package versions": versions,
        "the DeepSpeed JSON": json.dumps(load_deepspeed_json(config.engine.deepspeed_config)),
        "the resolved config": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
    }


class _silent_unless:
    """Let only one rank print what --help and --print_config write to stdout."""

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._stdout = speaks, sys.stdout

    def __enter__(self) -> None:
        if not self._speaks:
            sys.stdout = open(os.devnull, "w")

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stdout
