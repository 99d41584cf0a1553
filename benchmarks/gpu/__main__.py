"""One large GPU in less than nine minutes: is it correct, how fast is it, and does the memory fit the plan?

    python -m benchmarks.gpu                    # all parts, in order of value, as far as the budget goes
    python -m benchmarks.gpu --only facts check
    DRY=1 python -m benchmarks.gpu              # or --dry: everything tiny, on a CPU; the numbers mean nothing
    python -m benchmarks.gpu --predict          # the table of claims alone
    python -m benchmarks.gpu --predict --gpu h200-141g --results benchmarks/gpu/measured/h200.jsonl     # in docs/gpu.md

Every part is a process of its own with a limit of time. Results are appended to OUT/results.jsonl as they are found,
a part's output to OUT/log.txt when it has ended; OUT/summary.md has each measured value beside the predicted one, and
is written again after every part.
"""

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.claims import all_claims, markdown_table
from benchmarks.gpu.parts import PARTS, Options, Part, reason_to_skip, start
from benchmarks.gpu.results import Result, Results, find_result, read_results
from benchmarks.gpu.settings import DEFAULT_GPU
from dpa_ds.planning.hardware import GPUS

GRACE_SECONDS = 5.0
"""What ending a part takes."""
HANGS = 124
"""Exit status of a part that was ended."""
DRY_FACTOR = 6
"""A dry run on a shared CPU is slow to start."""


def main() -> int:
    """Entry point; the exit status is 1 if a part failed."""
    args = parse()
    if args.predict:
        results = read_results(args.results) if args.results else []
        print(markdown_table(all_claims(args.gpu), results))
        return 0
    options = Options(args.out.absolute(), args.gpu, args.dry)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in (options.results, options.log, options.summary):
        path.write_text("")
    budget = args.budget
    if args.dry:
        budget *= DRY_FACTOR
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    deadline = time.monotonic() + budget
    chosen = [part for part in PARTS if part.name in args.only and part.name not in args.skip]

    def run(part: Part) -> int:
        status = run_part(part, options, deadline - time.monotonic())
        write_summary(options)
        return status

    # What is timed runs alone. In a dry run nothing is, and most of it is imports: two at a time.
    with ThreadPoolExecutor(2 if args.dry else 1) as pool:
        statuses = list(pool.map(run, chosen))
    print(options.summary.read_text())
    return int(any(statuses))


def run_part(part: Part, options: Options, seconds_left: float) -> int:
    """Start `part`, end it after its limit; its exit status, which the results have too."""
    results = Results(options.results, part.name)
    reason = reason_to_skip(part, options)
    if seconds_left < part.least_seconds:
        reason = f"{seconds_left:.0f} s are left, it needs {part.least_seconds:g}"
    if reason:
        results.put("part", skipped=reason)
        return 0
    limit = part.limit_seconds
    if options.dry:
        limit *= DRY_FACTOR
    limit = min(limit, seconds_left - GRACE_SECONDS)
    with start(part, options, limit) as running:
        try:
            ended = running.wait(limit)
        except AssertionError as error:  # it hangs, or left ranks behind; nothing of it is left after this block
            status, output = HANGS, str(error)
        else:
            status, output = ended.returncode, ended.output
    with options.log.open("a") as log:
        log.write(f"\n$ {' '.join(running.command)}\n{output}")
    failure = {}
    if status != 0:
        failure = {"error": output[-1500:]}
    results.put("part", exit_status=status, seconds=round(results.seconds, 1), limit_seconds=round(limit), **failure)
    return status


def write_summary(options: Options) -> None:
    """The table of claims with what is known so far, how each part ended, and what failed."""
    results = read_results(options.results)
    title = "# One GPU"
    card = find_result(results, "facts", "card")
    if options.dry:
        title = "# A dry run on a CPU: the numbers mean nothing"
    elif card is not None:
        title += f": {card['card']}"
    lines = [title, "", markdown_table(all_claims(options.gpu), results)]
    lines += ["", "| part | ended | seconds |", "|---|---|---|"]
    failed = []
    for result in results:
        if result["measure"] == "part":
            how = result.get("skipped") or f"exit status {result['exit_status']}"
            lines.append(f"| {result['part']} | {how} | {result.get('seconds', '')} |")
        if "error" in result:
            failed.append(error_line(result))
    options.summary.write_text("\n".join([*lines, "", *failed, ""]))


def error_line(result: Result) -> str:
    """What failed, on one line; its end, where an exception says what it is."""
    words = " ".join(str(result["error"]).split())
    return f"- {result['part']}, {result['measure']} {result['variant']}: {words[-300:]}"


def parse() -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench-gpu"), help="folder of the results (%(default)s)")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for all parts (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], help="not these parts")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help="what predictions are for (%(default)s)")
    parser.add_argument("--dry", action="store_true", default=bool(os.environ.get("DRY")), help="tiny, on a CPU")
    parser.add_argument("--predict", action="store_true", help="print the claims, measure nothing")
    parser.add_argument("--results", type=Path, help="with --predict: put in what these lines of JSON have measured")
    args = parser.parse_args()
    if not args.dry and not args.predict and shutil.which("nvidia-smi") is None:
        parser.error("there is no NVIDIA GPU here: DRY=1 runs everything tiny on a CPU")
    return args


if __name__ == "__main__":
    sys.exit(main())
