"""Entry point of launch/run.py: federated training of dual adapters."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.cli.memory import expected_memory, memory_errors, training_remedy
from dpa_ds.cli.precision import settle_precision
from dpa_ds.config.extras import require
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore


def main(argv: Sequence[str] | None = None) -> int:
    """Do it under any launcher (deepspeed, torchrun, srun, mpirun) or none; the exit status.

    Collective: every rank of the job.
    """
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The recipe, and its training. All options are the recipe's, and its loader prints the help."""
    config = load_config(argv)
    if config.cluster.group is not None:
        require("elastic", "cluster.group")
    if config.evaluation.scores_every_rounds:
        require("metrics", "evaluation.scores_every_rounds")
    if config.tracking.wandb != "off":
        require("wandb", f"tracking.wandb {config.tracking.wandb}")
    if config.tracking.mlflow is not None:
        require("mlflow", "tracking.mlflow")

    def work(job: JobStore) -> None:
        from dpa_ds.cli.session import train  # imports DeepSpeed: only once config and ranks are in order

        settled = replace(config, model=settle_precision(config.model, config.run_dir, job))
        with memory_errors(training_remedy(config.train, config.generation), partial(expected_memory, settled, job)):
            train(settled, job)

    return config, work


if __name__ == "__main__":
    sys.exit(main())
