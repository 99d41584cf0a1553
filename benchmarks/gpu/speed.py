"""Speed and memory of one setting: `python -m benchmarks.gpu.speed speed_7b --results results.jsonl`.

A setting of another size, on a CPU too:

    python -m benchmarks.gpu.speed speed_7b --results r.jsonl --device cpu --precision fp32 --measures answers \
        --model .cache/demo/SmolLM2-135M-Instruct --answer_rows 16
"""

import argparse
import logging
import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results
from benchmarks.gpu.settings import DEFAULT_GPU, SETTINGS, Setting
from dpa_ds.planning.hardware import GPUS


def main() -> int:
    """Entry point; the exit status is 1 if a measure failed."""
    args = parse()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is first imported
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return measure(chosen_setting(args), Results(args.results, args.part), args.gpu, args.seconds)


def measure(setting: Setting, results: Results, gpu: str, seconds: float) -> int:
    """Build the bench, and take the measures of `setting` in their order; the number that failed, at most 1.

    A measure that would begin after `seconds` is left out.
    """
    # Here, after the device was chosen.
    from benchmarks.gpu.bench import PHASE, Bench
    from benchmarks.gpu.measures import MEASURES

    bench = Bench(setting, gpu, results)
    results.put(
        "build",
        device=str(bench.device),
        seconds=round(results.seconds, 1),
        parameters=bench.shape.parameters,
        optimizer=type(bench.engine.optimizer).__name__,
        **bench.memory(),
    )
    failed = 0
    for name in setting.measures:
        if results.seconds > seconds:
            results.put(name, skipped=f"{seconds:g} s are over")
            continue
        try:
            bench.engine.activate(PHASE)  # whatever the measure before has left
            MEASURES[name](bench)
        except Exception as error:  # a machine with a GPU is rare: what one measure breaks must not cost the others
            traceback.print_exc()
            results.put(name, error=f"{type(error).__name__}: {error}"[:500])
            failed = 1
        bench.free()
    return failed


def chosen_setting(args: argparse.Namespace) -> Setting:
    """The part's setting with what the command line changes."""
    setting = SETTINGS[args.part]
    if args.dry:
        setting = setting.dry()
    changes: dict[str, Any] = {}
    for name in ("model", "precision", "measures", "answer_rows", "prompt", "new_tokens", "repeats"):
        value = getattr(args, name)
        if value is not None:
            changes[name] = value
    return replace(setting, **changes)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SETTINGS, help="whose setting")
    parser.add_argument("--results", type=Path, required=True, help="lines of JSON are appended to this file")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help="whose peak is meant (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="no measure begins later (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="everything tiny, on a CPU")
    parser.add_argument("--model", help="a preset of the planner, or a directory with a config.json")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--measures", nargs="+")
    parser.add_argument("--answer_rows", type=int, nargs="+")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--new_tokens", type=int)
    parser.add_argument("--repeats", type=int)
    args = parser.parse_args()
    if args.dry:
        args.device = "cpu"
    return args


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of NCCL and gloo are not waited for
