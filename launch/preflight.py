"""Before a long job, are hosts, network, disk and software in order? `deepspeed launch/preflight.py --config RECIPE`."""

import os
import sys

USAGE = """\
usage: deepspeed launch/preflight.py --config RECIPE [--json FILE] [--SECTION.FIELD VALUE]

Starts the ranks that launch/run.py would start, on the same hosts and with the same recipe, and in less than a minute looks at
what a long job stands on: the same code, packages and config on every rank; a device of its own for each; the network inside
each rank group and between the groups, with the bytes that a round will send; disk and memory; clocks; whether all hosts write
to the same folder. Prints a table. Exit status 0: go ahead (warnings are reported); 3: something is off, with the remedy.

  --config RECIPE         the run's recipe; overrides as for launch/run.py
  --json FILE             write what was found to FILE, too

examples
  deepspeed --hostfile hostfile launch/preflight.py --config launch/recipes/paper.yaml
  sbatch launch/slurm/preflight.sbatch --config launch/recipes/paper.yaml
"""


def main() -> None:
    """Entry point under every launcher: deepspeed, torchrun, srun, mpirun, python."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported; see run.py
    from dpa_ds.cli.bootstrap import run_job

    own: dict[str, str] = {}

    def load(argv):  # type: ignore[no-untyped-def]
        from dpa_ds.cli.args import take_options
        from dpa_ds.config.load import load_config

        if any(word in ("-h", "--help") for word in argv):
            sys.stdout.write(USAGE)
            raise SystemExit(0)
        options, recipe_arguments = take_options(argv, ("json",))
        own.update(options)
        return load_config(recipe_arguments)

    def work(config, job):  # type: ignore[no-untyped-def]
        from dpa_ds.cli.preflight import check

        check(config, job, own.get("json"))

    run_job(sys.argv[1:], work, load=load)


if __name__ == "__main__":
    main()
