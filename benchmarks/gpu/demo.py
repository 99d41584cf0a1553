"""A real model with real data on the GPU: SmolLM2-135M-Instruct and the demo's federation, one round without dropout.

fp32 and bf16 on the GPU beside the same on the CPU of the same machine, all at once: held-out losses and adapters
compared. bf16 is compared with fp32 too: before training that shows what rounding does to the base, after it what it
does to a young adapter, which changes a layer's outputs by less than their last bit (docs/performance.md).
`prepare.sh --model` brings both to a machine without a network, the GGUF file in parts.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import compare
from benchmarks.gpu.programs import Programs
from benchmarks.gpu.results import Results
from dpa_ds.model.gguf.convert import convert_gguf
from tests.launch.processes import PYTHON, adapters

CARRIED = Path(".model")
"""What prepare.sh wrote: part_00, part_01, ... of the GGUF file, its checksum in sha256, and federation/."""


@dataclass(frozen=True)
class Run:
    """One run of the demo's recipe."""

    name: str
    device: str
    precision: str


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--deadline", type=float, default=100.0, help="seconds for one run (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="a tiny model, on a CPU")
    args = parser.parse_args()
    results = Results(args.results, "demo")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        carried = CARRIED
        if args.dry:
            carried = carry_tiny_model(work / "carried")
        programs = Programs(args.dry, args.deadline)
        runs = [Run("cpu fp32", "cpu", "fp32"), Run("gpu fp32", programs.device, "fp32")]
        if not args.dry:
            runs.append(Run("gpu bf16", programs.device, "bf16"))
        if not args.dry and computes_bf16():
            runs.append(Run("cpu bf16", "cpu", "bf16"))
        return demo(work, carried, programs, runs, results)


def demo(work: Path, carried: Path, programs: Programs, runs: list[Run], results: Results) -> int:
    """Train all `runs` at once, and compare each with the CPU's; the number that failed, at most 1."""
    model = convert_gguf(join_parts(carried, work / "model.gguf"), work / "model")
    threads = str(max(1, (os.cpu_count() or 1) // len(runs)))

    def train(run: Run) -> Path:
        programs.run(command(run, work, model, carried / "federation"), run.device, OMP_NUM_THREADS=threads)
        return work / "runs" / run.name.replace(" ", "_")

    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(train, run) for run in runs]
    folders: dict[str, Path] = {}
    failed = 0
    for run, future in zip(runs, futures, strict=True):
        try:
            folders[run.name] = future.result()
        except AssertionError as error:
            results.put("run", run.name, error=str(error))
            failed = 1
    for run in runs[1:]:
        for reference in ("cpu fp32", "cpu bf16"):
            if run.name != reference and {run.name, reference} <= folders.keys():
                variant = run.name
                if reference != "cpu fp32":
                    variant += f" against {reference}"
                results.put("run", variant, **compare_runs(folders[run.name], folders[reference]))
    return failed


def compare_runs(folder: Path, expected: Path) -> dict[str, Any]:
    """How far two runs are apart: held-out losses, relative, before and after training, and adapters."""
    before, after = [], []
    for ours, theirs in zip(held_out_losses(folder), held_out_losses(expected), strict=True):
        apart = [abs(one / other - 1) for one, other in zip(ours, theirs, strict=True)]
        before.append(apart[0])
        after += apart[1:]
    return {
        "loss_apart": max(before + after),
        "loss_apart_before": max(before),
        **compare(adapters(folder), adapters(expected)),
    }


def computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16: where it is emulated, a run takes minutes."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def command(run: Run, work: Path, model: Path, federation: Path) -> list[str]:
    """One round of one step a phase, by the demo's recipe."""
    fields = {
        "name": run.name.replace(" ", "_"),
        "output_dir": work / "runs",
        "model.path": model,
        "model.precision": run.precision,
        "data.path": federation,
        "data.cache_dir": work / "cache",
        "cluster.device": run.device,
        "lora.dropout": 0,
        "federation.num_rounds": 1,
        "train.max_steps": 1,
        "evaluation.max_examples": 4,
        "evaluation.every_rounds": 0,
        "tracking.tensorboard": "false",
    }
    options = [f"--{key}={value}" for key, value in fields.items()]
    return [PYTHON, "launch/run.py", "--config", "launch/recipes/demo.yaml", *options]


def held_out_losses(folder: Path) -> list[list[float]]:
    """Of each client: before training, and after every round."""
    losses = []
    for client in json.loads((folder / "results.json").read_text())["clients"]:
        losses.append([loss for _, loss in client["held_out_loss"]])
    assert losses, folder
    return losses


def join_parts(carried: Path, path: Path) -> Path:
    """The GGUF file from its parts."""
    with path.open("wb") as whole:
        for part in sorted(carried.glob("part_*")):
            whole.write(part.read_bytes())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = (carried / "sha256").read_text().split()[0]
    assert found == wanted, f"{carried}: parts are missing, or belong to another file"
    return path


def carry_tiny_model(folder: Path) -> Path:
    """A tiny model and federation as prepare.sh would carry them."""
    from tests.tiny import make_federation
    from tests.unit.test_gguf import tiny_llama, write_gguf

    folder.mkdir()
    whole = folder / "tiny.gguf"
    write_gguf(whole, tiny_llama(tied=True))
    content = whole.read_bytes()
    (folder / "part_00").write_bytes(content[:50_000])
    (folder / "part_01").write_bytes(content[50_000:])
    (folder / "sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {whole.name}\n")
    make_federation(folder / "federation")
    return folder


if __name__ == "__main__":
    sys.exit(main())
