"""Entry point of launch/preflight.py: are hosts, network, disk and software in order before a long job?"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpa_ds.cli.args import option, parse
from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.cli.precision import settle_precision
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """Looks, in less than a minute, at what a long job stands on.

    Starts the ranks that launch/run.py would start, on the same hosts and with the same recipe. Checks: the same code,
    packages and config on every rank; a device of its own for each; the network inside each rank group and between the
    groups, with the bytes that a round will send; disk and memory; clocks; whether all hosts write to the same folder.
    Prints a table. Exit status 0: go ahead (warnings are reported); 3: something is off, with the remedy.

    --SECTION.FIELD VALUE changes the recipe as for launch/run.py.

    examples
      deepspeed --hostfile hostfile launch/preflight.py --config launch/recipes/paper.yaml
      sbatch launch/slurm/preflight.sbatch --config launch/recipes/paper.yaml
    """

    json: str | None = option("FILE", None)
    """Write what was found to FILE, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do it under any launcher (deepspeed, torchrun, srun, mpirun) or none; the exit status.

    Collective: every rank of the job.
    """
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The recipe, and the checks."""
    options, recipe = parse(argv, PreflightOptions, "deepspeed launch/preflight.py --config RECIPE")
    config = load_config(recipe)

    def work(job: JobStore) -> None:
        from dpa_ds.cli.checks import preflight  # imports torch: only once config and ranks are in order

        settled = replace(config, model=settle_precision(config.model, config.run_dir, job))
        preflight(settled, job, options.json)

    return config, work


if __name__ == "__main__":
    sys.exit(main())
