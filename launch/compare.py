"""Set methods side by side: `deepspeed launch/compare.py --config RECIPE --methods feddpa_t,fedit --seeds 0,1,2`."""

import os
import sys

USAGE = """\
usage: deepspeed launch/compare.py --config RECIPE [--methods A,B] [--seeds 0,1,2] [--weightings W,W] [--SECTION.FIELD VALUE]

Trains every method with every seed (launch/run.py), evaluates each (launch/evaluate.py), and writes tables: P and TTP as
mean +- standard error over seeds, their differences to fedit and between weightings, paired by seed and test instance, with
95 % intervals, the weight of the local adapter on own and other tasks, and the convergence curves. What is done already is
not done again: interrupted, the same command resumes. All runs lie in <output_dir>/<name>, the tables below
<output_dir>/<name>/comparisons, for each plan a folder of its own. feddpa_f, fedlora and fedit share their federated rounds,
which are trained once.

  --config RECIPE          as for launch/run.py; method.name, seed and weighting.* of the recipe are set by this program, and
                           method.phase_order and method.global_source are for feddpa_t
  --methods LIST           of feddpa_t, feddpa_f, fedit, fedlora, local, centralized (default: all)
  --seeds LIST             (default: 0)
  --weightings LIST        for feddpa_t and feddpa_f (default: cosine,centred_cosine). KIND, KIND:LAMBDA, or
                           KIND:LAMBDA|LAMBDA|..., of which the best on held-out training data is taken
                           (data.held_out_fraction > 0); fixed:ALPHA|ALPHA|... likewise. With global and local among them
                           the table has an oracle, too: the better adapter for each client and task
  --tuning_instances N     held-out instances of each task for that choice (default: 15)
  --SECTION.FIELD VALUE    any field of the recipe, such as --evaluation.instances_per_task 50

examples
  deepspeed launch/compare.py --config launch/recipes/compare.yaml
  deepspeed launch/compare.py --config launch/recipes/compare.yaml --methods feddpa_t,fedit --seeds 0,1,2 \\
      --weightings "cosine,centred_cosine:0.5|1|2,fixed:0.25|0.5|0.75,global,local"
"""
DEFAULTS = {
    "methods": "feddpa_t,feddpa_f,fedit,fedlora,local,centralized",
    "seeds": "0",
    "tuning_instances": "15",
}


def main() -> None:
    """Entry point under every launcher: deepspeed, torchrun, srun, mpirun, python."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; see run.py
    from dpa_ds.cli.args import take_options
    from dpa_ds.cli.bootstrap import run_job
    from dpa_ds.config.load import load_config

    own, recipe_arguments = dict(DEFAULTS), []

    def load(argv):  # type: ignore[no-untyped-def]
        if any(word in ("-h", "--help") for word in argv):
            sys.stdout.write(USAGE)
            raise SystemExit(0)
        taken, others = take_options(argv, (*DEFAULTS, "weightings"))
        own.update(taken)
        recipe_arguments[:] = others
        return load_config(others)

    def work(config, job):  # type: ignore[no-untyped-def]
        from dpa_ds.experiments.compare import build_plan, compare

        plan = build_plan(own["methods"], own["seeds"], own.get("weightings"), own["tuning_instances"])
        compare(config, job, plan, recipe_arguments)

    run_job(sys.argv[1:], work, load=load)


if __name__ == "__main__":
    main()
