"""Do harm to real runs, start them again, and look whether anything is lost: `make faults N=100`."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.elastic import ElasticHarness, ElasticTrial, draw_elastic_trials
from tests.faults.full_disk import FullDiskHarness, FullDiskTrial, can_mount, draw_full_disk_trials
from tests.faults.harness import Harness, Trial, draw_trials
from tests.faults.planted import BUGS

Trials = Sequence[Trial] | Sequence[ElasticTrial] | Sequence[FullDiskTrial]


def main() -> None:
    """Exit status 0: all survived; with --plant: the bug was found."""
    args = parse()
    if args.mode == "disk" and not can_mount():
        mount_for_oneself()
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        match args.mode:
            case "launcher":
                trials: Trials = one_launcher(args, Path(folder))
            case "elastic":
                trials = elastic(args, Path(folder))
            case "disk":
                trials = full_disk(args, Path(folder))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
    lost = sum(bool(trial.problem) for trial in trials)
    if args.plant:
        print(f"planted bug {args.plant}: {'found' if lost else 'NOT found'} ({lost} of {len(trials)} trials)")
        sys.exit(0 if lost else 1)
    sys.exit(1 if lost else 0)


def mount_for_oneself() -> None:
    """Start this program again where it may have file systems of its own."""
    command = ["unshare", "--mount", "--map-root-user", sys.executable, "-m", "tests.faults", *sys.argv[1:]]
    os.execvp(command[0], command)


# ---- the modes -------------------------------------------------------------------------------------------------


def one_launcher(args: argparse.Namespace, folder: Path) -> list[Trial]:
    """Kills at moments that are drawn, under one launcher."""
    trials = draw_trials(args.trials, args.seed)
    program = ["tests/faults/planted.py", args.plant] if args.plant else ["launch/run.py"]
    harness = Harness(folder)
    for number, trial in enumerate(trials, 1):
        started = time.monotonic()
        harness.run(trial, f"trial_{number:04d}", program)
        times = ", ".join(f"{moment:.2f}" for moment in trial.moments)
        what = f"{trial.layout}; killed: {', then '.join(trial.victims)} at {times} of the run"
        report(number, len(trials), what, trial.problem, time.monotonic() - started)
    print(render(trials))
    return trials


def elastic(args: argparse.Namespace, folder: Path) -> list[ElasticTrial]:
    """Kills of groups with launchers of their own, at named steps."""
    drawn = draw_elastic_trials(args.trials, args.seed)
    harness = ElasticHarness(folder)
    trials = []
    for number, trial in enumerate(drawn, 1):
        if args.only and number not in args.only:
            continue
        harness.run(trial, f"trial_{number:04d}")
        trials.append(trial)
        report(number, len(drawn), f"{trial}; reached {len(trial.kills)}", trial.problem, trial.seconds)
    kills_of: dict[str, int] = defaultdict(int)
    for trial in trials:
        for kill in trial.kills:
            kills_of[kill.rpartition(" ")[0]] += 1
    print("\nkilled at: " + ", ".join(f"{step} {count}" for step, count in kills_of.items()))
    survived = [trial for trial in trials if not trial.problem]
    print(
        f"{sum(len(trial.kills) for trial in survived)} of {sum(kills_of.values())} kills survived, in {len(survived)} "
        f"of {len(trials)} runs; {sum(trial.rounds_without for trial in trials)} rounds were completed without a group"
    )
    return trials


def full_disk(args: argparse.Namespace, folder: Path) -> list[FullDiskTrial]:
    """A disk that is full from one write on."""
    harness = FullDiskHarness(folder)
    trials = draw_full_disk_trials(args.trials, harness.num_writes, args.seed)
    outcomes: dict[str, int] = defaultdict(int)
    for number, trial in enumerate(trials, 1):
        harness.run(trial, f"trial_{number:04d}")
        outcomes[trial.outcome] += 1
        what = f"full at write {trial.write} of {harness.num_writes}, {trial.bytes_left} bytes left: {trial.outcome}"
        report(number, len(trials), what, trial.problem, trial.seconds)
    print("\n" + "\n".join(f"{count:4} {outcome}" for outcome, count in sorted(outcomes.items())))
    print(f"{sum(not trial.problem for trial in trials)} of {len(trials)} moments of a full disk survived")
    return trials


# ---- reporting -------------------------------------------------------------------------------------------------


def report(number: int, num_trials: int, what: str, problem: str, seconds: float) -> None:
    """A line for a trial."""
    outcome = f"NOT SURVIVED: {problem.splitlines()[0][:400]}" if problem else "survived"
    print(f"{number}/{num_trials} {what}: {outcome} ({seconds:.0f} s)", flush=True)


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
        description="Starts real runs (a tiny model, a few clients), does harm to them, starts the same command again, and "
        "looks whether a client, a round, a record or a point of a curve is lost. Exit status 1 if one trial is not "
        "survived.",
    )
    parser.add_argument(
        "--mode",
        choices=("launcher", "elastic", "disk"),
        default="launcher",
        help="launcher: a rank, a rank group, the launcher or everything is killed at a random moment; the result must be "
        "equal to the bit. elastic: 2 or 3 groups with launchers of their own are killed at named steps of a round and "
        "come back; every global adapter must be the mean of the updates that count. disk: the disk is full from one "
        "write on; with room, the result must be equal to the bit (%(default)s)",
    )
    parser.add_argument("--trials", type=int, default=20, help="elastic: number of kills, over all runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws victims and moments (%(default)s)")
    parser.add_argument(
        "--plant",
        choices=BUGS,
        help="launcher: start again with this bug in the program: exit status 0 if the trials find it, else 1",
    )
    parser.add_argument("--only", type=int, nargs="+", help="elastic: of these runs only those with these numbers")
    parser.add_argument("--json", help="write the trials here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
