"""Kill real runs at random moments, start them again, and compare: `make faults N=100`."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from tests.faults.harness import Harness, Trial, draw_trials
from tests.faults.planted import BUGS


def main() -> None:
    """Exit status 0: all survived; with --plant: the bug was found."""
    args = parse()
    trials = draw_trials(args.trials, args.seed)
    program = ["tests/faults/planted.py", args.plant] if args.plant else ["launch/run.py"]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        harness = Harness(Path(folder))
        for number, trial in enumerate(trials, 1):
            started = time.monotonic()
            harness.run(trial, f"trial_{number:04d}", program)
            times = ", ".join(f"{moment:.2f}" for moment in trial.moments)
            outcome = f"NOT SURVIVED: {trial.problem.splitlines()[0][:200]}" if trial.problem else "survived"
            what = f"{trial.layout}; killed: {', then '.join(trial.victims)} at {times} of the run"
            print(f"{number}/{len(trials)} {what}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    print(render(trials))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
    lost = sum(bool(trial.problem) for trial in trials)
    if args.plant:
        print(f"planted bug {args.plant}: {'found' if lost else 'NOT found'} ({lost} of {len(trials)} trials)")
        sys.exit(0 if lost else 1)
    sys.exit(1 if lost else 0)


def render(trials: list[Trial]) -> str:
    """Survived / tried by what was killed first, and the times to recover."""
    by_victim: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_victim[trial.victims[0]].append(trial)
        by_victim["all"].append(trial)
    lines = ["", f"{'killed first':20}{'survived / tried':>18}{'seconds to recover: median (longest)':>40}"]
    for victim, of_victim in sorted(by_victim.items(), key=lambda item: item[0] == "all"):
        survived = sum(not trial.problem for trial in of_victim)
        seconds = [s for trial in of_victim for s in trial.seconds_to_recover]
        recovery = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
        lines.append(f"{victim:20}{f'{survived} / {len(of_victim)}':>18}{recovery:>40}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Starts real runs (a tiny model, four clients, several layouts, the deepspeed launcher), kills a rank, a "
        "rank group, the launcher or everything at a random moment, starts the same command again, and compares adapters and "
        "metrics with those of an undisturbed run: they must be equal to the bit. Exit status 1 if one trial is not survived.",
    )
    parser.add_argument("--trials", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws victims and moments (%(default)s)")
    parser.add_argument(
        "--plant",
        choices=BUGS,
        help="start again with this bug in the program: exit status 0 if the trials find it, else 1",
    )
    parser.add_argument("--json", help="write the trials here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
