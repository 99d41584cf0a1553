"""Send intruders to running jobs, and compare with undisturbed ones: `make intruders N=20`."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.intruders.harness import INTRUDERS, Harness


def main() -> None:
    """Exit status 0: no job was disturbed."""
    args = parse()
    num_disturbed = 0
    with tempfile.TemporaryDirectory(prefix="intruders_") as folder:
        harness = Harness(Path(folder))
        for mode in args.modes:
            intruders = list(INTRUDERS[mode]) * args.number
            random.Random(args.seed).shuffle(intruders)
            try:
                harness.disturb(mode, intruders, args.seed, report=lambda line: print(line, flush=True))
                print(
                    f"{mode}: {len(intruders)} intruders, and the results are those of an undisturbed run, to the bit"
                )
            except AssertionError as error:
                num_disturbed += 1
                print(f"{mode}: DISTURBED: {error}", flush=True)
    sys.exit(1 if num_disturbed else 0)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.intruders",
        description="Starts real jobs (a tiny model, two clients), and while they train lets others come to where they listen: "
        "programs with a mistake, another recipe, the same recipe or another number of ranks, a port scanner, garbage, "
        "silent connections. Each program must end with one line, and the jobs with the results of undisturbed ones.",
    )
    parser.add_argument("--number", type=int, default=20, help="of intruders of each kind (%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=INTRUDERS, default=list(INTRUDERS), help="(all)")
    parser.add_argument("--seed", type=int, default=0, help="draws their order (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
