"""Entry point of launch/compare.py: several methods side by side."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpa_ds.cli.args import option, parse
from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.cli.precision import settle_precision
from dpa_ds.config.extras import require
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Trains every method with every seed (launch/run.py), evaluates each (launch/evaluate.py), and writes tables.

    The tables: P and TTP as mean +- standard error over seeds, their differences to fedit and between weightings,
    paired by seed and test instance, with 95 % intervals, the weight of the local adapter on own and other tasks, and
    the convergence curves. What is done already is not done again: interrupted, the same command resumes. All runs lie
    in <output_dir>/<name>, the tables below <output_dir>/<name>/comparisons, for each plan a folder of its own.
    feddpa_f, fedlora and fedit share their federated rounds, which are trained once.

    --config RECIPE and --SECTION.FIELD VALUE as for launch/run.py, such as --evaluation.instances_per_task 50;
    method.name, seed and weighting.* of the recipe are set by this program, and method.phase_order and
    method.global_source are for feddpa_t.

    examples
      deepspeed launch/compare.py --config launch/recipes/compare.yaml
      deepspeed launch/compare.py --config launch/recipes/compare.yaml --methods feddpa_t,fedit --seeds 0,1,2 \\
          --weightings "cosine,centred_cosine:0.5|1|2,fixed:0.25|0.5|0.75,global,local"
    """

    methods: str = option("LIST", "feddpa_t,feddpa_f,fedit,fedlora,local,centralized")
    """Methods of the table."""
    seeds: str = option("LIST", "0")
    """Seeds, each a training of its own."""
    weightings: str | None = option("LIST", None)
    """For feddpa_t and feddpa_f (default: cosine,centred_cosine): KIND, KIND:LAMBDA, or KIND:LAMBDA|LAMBDA|..., of
    which the best on held-out training data is taken (data.held_out_fraction > 0); fixed:ALPHA|ALPHA|... likewise.
    With global and local among them the table has an oracle, too: the better adapter for each client and task."""
    tuning_instances: str = option("N", "15")
    """Held-out instances of each task for that choice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do it under any launcher (deepspeed, torchrun, srun, mpirun) or none; the exit status.

    Collective: every rank of the job.
    """
    run_job(argv, prepare)
    return 0


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The recipe, and the comparison, which refuses an unknown method or weighting, and what is no number."""
    options, recipe = parse(argv, CompareOptions, "deepspeed launch/compare.py --config RECIPE")
    config = load_config(recipe)
    if config.private_dir is not None:
        raise ConfigError(
            "launch/compare.py is for one operator, who sees all answers: leave private_dir out (--private_dir null)"
        )

    require("metrics", "the scores of answers")

    def work(job: JobStore) -> None:
        from dpa_ds.experiments.compare import build_plan, compare  # imports torch: only once ranks are in order

        plan = build_plan(options.methods, options.seeds, options.weightings, options.tuning_instances)
        settled = replace(config, model=settle_precision(config.model, config.run_dir, job))
        compare(settled, job, plan, recipe)

    return config, work


if __name__ == "__main__":
    sys.exit(main())
