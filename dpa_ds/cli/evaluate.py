"""Entry point of launch/evaluate.py: the scores of a trained run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dpa_ds.cli.args import option, parse
from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.cli.memory import generation_remedy, memory_errors
from dpa_ds.cli.trained_run import RunOptions, load_run_config
from dpa_ds.config.extras import require
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Every client of a trained run answers test instances of every task, its own and the others'.

    Prints a table of ROUGE-1 by client and task with P (own task), TTP (all tasks) and the floors that a score must
    beat, and writes summary.json, report.md and pictures to runs/NAME/evaluations/SETTINGS/PART/. The work is spread
    over all ranks that the launcher starts (deepspeed, torchrun, srun, mpirun or plain python). The same command
    continues an interrupted evaluation.

    --SECTION.FIELD VALUE sets any field of the sections weighting (but num_references), generation, evaluation,
    cluster, tracking, and --model.path (the base has moved), --model.precision, --model.quantization, --data.path,
    --data.test_path (tasks that no client trained on); launch/run.py --help lists them.

    examples
      deepspeed launch/evaluate.py --run runs/demo
      deepspeed launch/evaluate.py --run runs/demo --weighting cosine --instances 20
      deepspeed launch/evaluate.py --run runs/demo --data.test_path other_tasks.jsonl
    """

    clients: tuple[str, ...] | None = option("0,3", None, sets="evaluation.clients")
    """Only these clients, by their ids or names (default: all)."""
    tasks: tuple[str, ...] | None = option("NAME,NAME", None, sets="evaluation.tasks")
    """Only these tasks (default: all of the test data)."""
    instances: str | None = option("N", None, sets="evaluation.instances_per_task")
    """Only the first N instances of each task; null: all (default: the recipe's)."""
    split: str | None = option("test|held_out", None, sets="evaluation.split")
    """What is scored; held_out: the share of the training data that data.held_out_fraction kept back, for tuning."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do it under any launcher (deepspeed, torchrun, srun, mpirun) or none; the exit status.

    Collective: every rank of the job.
    """
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The run's recipe with what the command line changes, and the evaluation."""
    config = load(argv)
    require("metrics", "the scores of answers")

    def work(job: JobStore) -> None:
        from dpa_ds.evaluation.runner import evaluate  # imports torch: only once config and ranks are in order

        with memory_errors(generation_remedy(config.generation)):
            evaluate(config, job)

    return config, work


def load(argv: Sequence[str]) -> RunConfig:
    """The run's recipe with what the command line changes."""
    options, overrides = parse(argv, EvaluateOptions, "deepspeed launch/evaluate.py")
    return load_run_config(options, overrides)


if __name__ == "__main__":
    sys.exit(main())
