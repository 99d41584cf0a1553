"""Give bad input to every program, and look how it is refused: `make mutations N=2000`."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.mutations.harm import try_all
from tests.mutations.inputs import draw_inputs


def main() -> None:
    """Exit status 0: each was refused in one line, or was good after all."""
    args = parse()
    chosen = dict(enumerate(draw_inputs(args.inputs, args.seed)))
    if args.only:
        chosen = {number: chosen[number] for number in args.only}
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        outcomes = try_all(Path(folder), chosen, args.workers)
    inputs = list(chosen.values())
    tried = Counter(one.program for one in inputs)
    refused = Counter(one.program for one, outcome in zip(inputs, outcomes, strict=True) if outcome.status)
    wrong = Counter(one.program for one, outcome in zip(inputs, outcomes, strict=True) if outcome.problem)
    print(f"{'program':16}{'inputs':>8}{'refused':>9}{'wrong':>7}")
    for program in sorted(tried):
        print(f"{program:16}{tried[program]:8}{refused[program]:9}{wrong[program]:7}")
    print(f"{'all':16}{len(inputs):8}{refused.total():9}{wrong.total():7}")
    print(f"longest: {max(outcome.seconds for outcome in outcomes):.1f} s")
    sys.exit(1 if wrong.total() else 0)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description="Mutated recipes, command lines, run folders, DeepSpeed JSON, data and models for each program of "
        "launch/. Each must be taken, or refused within 30 s in one line, with an exit status and nothing half-written.",
    )
    parser.add_argument("--inputs", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the inputs (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="inputs at a time (%(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="of these inputs only those with these numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
