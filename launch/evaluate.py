"""Score a trained run on test instances: `deepspeed launch/evaluate.py --run runs/NAME [--option VALUE ...]`."""

import os
import sys

USAGE = """\
usage: deepspeed launch/evaluate.py --run runs/NAME [--option VALUE ...]

Every client of a trained run answers test instances of every task, its own and the others'. Prints a table of ROUGE-1 by
client and task with P (own task), TTP (all tasks) and the floors that a score must beat, and writes summary.json, report.md
and pictures to runs/NAME/evaluations/SETTINGS/PART/. The work is spread over all ranks that the launcher starts (deepspeed, torchrun,
srun, mpirun or plain python). The same command continues an interrupted evaluation.

  --run FOLDER            the run, as launch/run.py wrote it
  --clients 0,3           only these clients (default: all)
  --tasks NAME,NAME       only these tasks (default: all of the test data)
  --instances N           only the first N instances of each task; null: all (default: the recipe's)
  --split test|held_out   held_out: the share of the training data that data.held_out_fraction kept back, for tuning
  --weighting KIND        weight of the local adapter: centred_cosine, cosine (the paper's), pearson, l2, fixed, global,
                          local, swapped (the published code's convention); default: the recipe's, else what fits the method
  --lambda X              scale of the similarity (cosine 0.5, centred_cosine 1.0)
  --alpha X               with --weighting fixed: the weight
  --beams N               beams (default: the recipe's; 1: greedy)
  --max_new_tokens N      longest answer
  --SECTION.FIELD VALUE   any field of the sections weighting (but num_references), generation, evaluation, cluster, tracking, and
                          --model.path (the base has moved), --model.precision, --data.path, --data.test_path (tasks that
                          no client trained on); launch/run.py --help lists them

examples
  deepspeed launch/evaluate.py --run runs/demo
  deepspeed launch/evaluate.py --run runs/demo --weighting cosine --instances 20
  deepspeed launch/evaluate.py --run runs/demo --data.test_path other_tasks.jsonl
"""


def main() -> None:
    """Entry point under every launcher: deepspeed, torchrun, srun, mpirun, python."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; see run.py
    from dpa_ds.cli.args import load_run_config
    from dpa_ds.cli.bootstrap import run_job

    def work(config, job):  # type: ignore[no-untyped-def]
        from dpa_ds.cli.evaluate import evaluate

        evaluate(config, job)

    run_job(sys.argv[1:], work, load=lambda argv: load_run_config(argv, USAGE))


if __name__ == "__main__":
    main()
