"""Entry point of launch/run.py: federated training of dual adapters."""

from collections.abc import Sequence

from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore


def main(argv: Sequence[str]) -> int:
    """Exit status. Under every launcher: deepspeed, torchrun, srun, mpirun, python. Collective: every rank of the job."""
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The recipe; all options are its own, and its loader prints the help."""
    return load_config(argv), work


def work(config: RunConfig, job: JobStore) -> None:
    """Train. Collective: every rank of the job."""
    from dpa_ds.cli.session import train  # imports DeepSpeed: only once config and ranks are in order

    train(config, job)
