"""All programs under one name: `python -m dpa_ds.cli PROGRAM ...`, the same as `python launch/PROGRAM.py ...` of a
checkout, and as the console command `dpa-PROGRAM ...` of an install."""

import importlib
import sys
from collections.abc import Sequence

PROGRAMS = {
    "init": "Copy a recipe and a job script to edit.",
    "train": "Train federated dual adapters.",
    "evaluate": "Score a trained run on test instances.",
    "generate": "Answer as one client's model.",
    "compare": "Train, evaluate and tabulate several methods.",
    "plan": "Say what fits on a cluster, and how fast it is.",
    "scaling-study": "Run the same recipe at several sizes.",
    "preflight": "Check hosts, network, disk and software before a long job.",
    "rendezvous": "Let rank groups with launchers of their own find each other.",
    "prepare-demo": "Fetch the demo's model and build its data.",
}
"""Programs and what they do; dpa_ds/cli has a module for each."""


def main(argv: Sequence[str]) -> int:
    """Exit status of the program that the first word names."""
    # deepspeed --module puts its --local_rank before all words; the environment says the same.
    words = [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    program, *rest = words
    if program not in PROGRAMS:
        sys.stderr.write(f"error: {program!r} is not a program: give one of {', '.join(PROGRAMS)}\n")
        return 2
    # Only the one that is asked for: the others would be imported in vain.
    module = importlib.import_module(f"dpa_ds.cli.{program.replace('-', '_')}")
    status: int = module.main(rest)
    return status


def _usage() -> str:
    lines = ["usage: python -m dpa_ds.cli PROGRAM [--option VALUE ...]", ""]
    for program, does in PROGRAMS.items():
        lines.append(f"  {program:15}{does}")
    return "\n".join([*lines, "", "python -m dpa_ds.cli PROGRAM --help says more."]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
