"""Does a GPU compute what a CPU does? Whole runs of launch/run.py and launch/evaluate.py, several at a time, on both.

fp32: the largest relative difference of a tensor. 16 bit: Adam's first steps are signs, which rounding turns, so the
direction is compared: the cosine of all B.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.programs import Programs
from benchmarks.gpu.results import Results
from tests import tiny
from tests.launch.processes import PYTHON, adapters

LARGEST_RELATIVE = 1e-3
SMALLEST_COSINE = 0.95
LARGEST_ALPHA_APART = 1e-3
ZERO = ("zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu")
Adapters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One run on the GPU, compared with the CPU's fp32 run of the same recipe."""

    name: str
    overrides: Mapping[str, object]
    """Of the recipe, as `tests.tiny.recipe` takes them."""
    num_ranks: int = 1


def all_cases(folder: Path) -> list[Case]:
    """Layouts and precisions; a DeepSpeed JSON that is made for them goes to `folder`."""
    cases = []
    for stage in ZERO:
        cases.append(Case(f"fp32, {stage}", {"engine__deepspeed_config": f"ds_configs/{stage}.json"}))
    for stage in ZERO:
        overrides = {"model__precision": "bf16", "engine__deepspeed_config": f"ds_configs/{stage}.json"}
        cases.append(Case(f"bf16, {stage}", overrides))
    for stage in ("zero0", "zero3"):
        overrides = {"model__gradient_checkpointing": True, "engine__deepspeed_config": f"ds_configs/{stage}.json"}
        cases.append(Case(f"fp32, {stage}, recompute", overrides))
    for stage in (0, 2):
        overrides = {"model__precision": "fp16", "engine__deepspeed_config": fp16_json(folder, stage)}
        cases.append(Case(f"fp16, zero{stage}", overrides))
    cases.append(Case("fp32, eager attention", {"model__attention": "eager"}))
    cases.append(Case("fp32, two groups on one GPU", {}, num_ranks=2))
    return cases


def fp16_json(folder: Path, stage: int) -> Path:
    """From DeepSpeed's own first loss scale all few steps of a short run would overflow, and be skipped."""
    path = folder / f"fp16_zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": 8}}))
    return path


def main() -> int:
    """Entry point; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--at_a_time", type=int, default=8, help="runs (%(default)s)")
    parser.add_argument("--deadline", type=float, default=100.0, help="seconds for one run (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="one case, on a CPU")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        runs = Runs(folder, Programs(args.dry, args.deadline))
        cases, precisions = all_cases(folder), ["fp32", "bf16"]
        if args.dry:
            cases, precisions = cases[:1], ["fp32"]
        results = Results(args.results, "check")
        return int(not check(runs, cases, precisions, results, args.at_a_time))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Runs:
    """Runs of a small model on a small federation."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.device = programs.device
        self._programs = programs
        self._folder = folder
        self._model = tiny.make_model(
            folder / "model",
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            initializer_range=0.1,
        )
        self._data = tiny.make_federation(folder / "data", sizes=(14, 10, 9, 12))

    def train(self, name: str, device: str, overrides: Mapping[str, object], num_ranks: int = 1) -> Path:
        """The folder of the run. Raises AssertionError if it fails."""
        folder = self._folder / name.replace(" ", "_").replace(",", "")
        folder.mkdir()
        options = {"cluster__device": device, "train__learning_rate": 1e-3, **overrides}
        command = [PYTHON, "launch/run.py", *tiny.recipe(self._model, self._data, folder / "runs", **options)]
        if num_ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
            command[1:1] = launcher
        self._programs.run(command, device)
        return folder / "runs" / "tiny"

    def evaluate(self, run_dir: Path, device: str) -> dict[tuple[Any, ...], dict[str, Any]]:
        """(client, task, row) -> its answer. Raises AssertionError if it fails."""
        command = [PYTHON, "launch/evaluate.py", "--run", str(run_dir), f"--cluster.device={device}"]
        command += ["--generation.max_new_tokens=6", "--generation.num_beams=2"]
        self._programs.run(command, device)
        answers = {}
        for path in run_dir.glob("evaluations/*/answers/*.jsonl"):
            for line in path.read_text().splitlines():
                answer = json.loads(line)
                answers[answer["client"], answer["task"], answer["row"]] = answer
        assert answers, f"no answers in {run_dir}"
        return answers


def check(runs: Runs, cases: Sequence[Case], precisions: Sequence[str], results: Results, at_a_time: int) -> bool:
    """Run and judge all; False if anything differs or fails.

    Args:
        precisions: in which one run, with dropout, is made twice.
    """
    with ThreadPoolExecutor(at_a_time) as pool:
        reference = pool.submit(runs.train, "reference", "cpu", {})
        twice = {}
        for precision in precisions:
            overrides = {"model__precision": precision, "lora__dropout": 0.05}
            names = [f"{precision} {word}" for word in ("once", "again")]
            twice[precision] = [pool.submit(runs.train, name, runs.device, overrides) for name in names]
        started = [pool.submit(runs.train, case.name, runs.device, case.overrides, case.num_ranks) for case in cases]
        right = compare_cases(cases, started, adapters(reference.result()), results)
        for precision, futures in twice.items():
            right &= compare_to_the_bit(precision, futures, results)
    return compare_answers(runs, twice["fp32"][0], results) and right


def compare_cases(cases: Sequence[Case], started: Sequence[Future[Path]], expected: Adapters, results: Results) -> bool:
    """Put how far each run is from the reference, and how many of each precision are right; False if one is not."""
    right: dict[str, list[bool]] = {}
    for case, future in zip(cases, started, strict=True):
        precision = case.name.partition(",")[0]
        try:
            found = compare(adapters(future.result()), expected)
        except AssertionError as error:
            found = {"error": str(error)}
        is_right = "error" not in found and judge(precision, found)
        results.put("case", case.name, right=is_right, **found)
        right.setdefault(precision, []).append(is_right)
    for precision, ones in right.items():
        results.put("runs", precision, right=sum(ones), of=len(ones), share=sum(ones) / len(ones))
    return all(map(all, right.values()))


def compare_to_the_bit(precision: str, futures: Sequence[Future[Path]], results: Results) -> bool:
    """Put how many tensors of two runs of one recipe are equal; False if one is not."""
    try:
        first, second = (adapters(future.result()) for future in futures)
    except AssertionError as error:
        results.put("the same run twice", precision, error=str(error))
        return False
    equal = sum(torch.equal(first[key], second[key]) for key in first)
    results.put("the same run twice", precision, right=equal, of=len(first), share=equal / len(first))
    return equal == len(first)


def judge(precision: str, found: Mapping[str, Any]) -> bool:
    """Whether a run is as near to the reference as its precision allows."""
    if not found["finite"]:
        return False
    if precision == "fp32":
        return bool(found["largest_relative"] <= LARGEST_RELATIVE)
    return bool(found["cosine_of_b"] >= SMALLEST_COSINE)


def compare(actual: Adapters, expected: Adapters) -> dict[str, Any]:
    """How far two runs' adapters are apart."""
    assert actual.keys() == expected.keys()
    largest = 0.0
    for key, tensor in expected.items():
        largest = max(largest, float((actual[key] - tensor).norm() / tensor.norm().clamp_min(1e-12)))
    cosine = torch.nn.functional.cosine_similarity(_all_b(actual), _all_b(expected), dim=0)
    finite = all(bool(tensor.isfinite().all()) for tensor in actual.values())
    return {"largest_relative": largest, "cosine_of_b": float(cosine), "finite": finite}


def compare_answers(runs: Runs, future: Future[Path], results: Results) -> bool:
    """Put how many answers of one run are the same on the GPU and on the CPU (fp32, beams); False if one is not."""
    try:
        run_dir = future.result()
        copy = run_dir.parent / "copy"
        shutil.copytree(run_dir, copy, symlinks=True)
        with ThreadPoolExecutor(2) as pool:
            on_device = pool.submit(runs.evaluate, run_dir, runs.device)
            on_cpu = pool.submit(runs.evaluate, copy, "cpu")
            ours, theirs = on_device.result(), on_cpu.result()
    except AssertionError as error:
        results.put("answers", error=str(error))
        return False
    assert ours.keys() == theirs.keys()
    same = sum(ours[key]["text"] == theirs[key]["text"] for key in ours)
    alpha_apart = max(abs(ours[key]["alpha"] - theirs[key]["alpha"]) for key in ours)
    results.put("answers", right=same, of=len(ours), share=same / len(ours), alpha_apart=alpha_apart)
    return same == len(ours) and alpha_apart <= LARGEST_ALPHA_APART


def _all_b(tensors: Adapters) -> torch.Tensor:
    keys = [key for key in sorted(tensors) if ".lora_B." in key]
    return torch.cat([tensors[key].flatten() for key in keys])


if __name__ == "__main__":
    sys.exit(main())
