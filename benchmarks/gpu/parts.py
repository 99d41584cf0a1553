"""The parts of the kit, in order of value, each with its own limit of time."""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.settings import SETTINGS
from dpa_ds.cli.bootstrap import set_allocator_defaults
from tests.launch.processes import PYTHON, REPOSITORY, Forked, Running

SHARE_TO_BEGIN = 0.8
"""Of a part's time, after which its program begins no further measure."""


@dataclass(frozen=True)
class Part:
    """A program that writes results, in a process of its own."""

    name: str
    limit_seconds: float
    """It is ended after that."""
    least_seconds: float
    """Left out where less is left: it would be ended before it has found anything."""


PARTS = (
    Part("facts", 60, 20),
    Part("check", 130, 60),
    Part("demo", 110, 60),
    Part("speed_7b", 200, 60),
    Part("speed_13b", 90, 50),
    Part("dropout_7b", 50, 40),
    Part("recompute_7b", 50, 40),
    Part("offload_7b", 70, 50),
    Part("int8_13b", 70, 50),
    Part("nf4_70b", 100, 70),
    Part("compile_7b", 90, 60),
    Part("test_gpu", 120, 80),
)
"""Correct first, then a real model, then speed; the project's own test last, because `check` has its cases and more."""


@dataclass(frozen=True)
class Options:
    """What all parts of a call have in common."""

    out: Path
    gpu: str
    dry: bool

    @property
    def results(self) -> Path:
        """The lines of all parts."""
        return self.out / "results.jsonl"

    @property
    def log(self) -> Path:
        """What all parts print."""
        return self.out / "log.txt"

    @property
    def summary(self) -> Path:
        """The table."""
        return self.out / "summary.md"


def start(part: Part, options: Options, limit_seconds: float) -> Running:
    """The started program of `part`."""
    variables = {"PYTHONPATH": path_of_checkout(), "PYTHONUNBUFFERED": "1"}
    if options.dry:
        # A run of a tiny setting is mostly imports: it is forked from a process that has them. With a GPU that is not
        # possible, because DeepSpeed's import starts CUDA; nor for parts that fork themselves.
        kind = Forked if part.name in SETTINGS else Running
    else:
        kind = Running
        variables["OMP_NUM_THREADS"] = str(os.cpu_count())
        set_allocator_defaults(variables, importlib.metadata.version("torch"))  # as launch/*.py do
    return kind(command(part, options, limit_seconds), REPOSITORY, **variables)


def command(part: Part, options: Options, limit_seconds: float) -> list[str]:
    """How `part` is started."""
    if part.name == "test_gpu":
        workers = "0" if options.dry else "7"
        return [PYTHON, "-m", "pytest", "tests/launch/test_gpu.py", "-q", "-n", workers, "-p", "no:cacheprovider"]
    arguments = ["--results", str(options.results)]
    program = part.name
    if part.name in SETTINGS:
        program = "speed"
        seconds = SHARE_TO_BEGIN * limit_seconds
        arguments = [part.name, *arguments, "--gpu", options.gpu, "--seconds", f"{seconds:.0f}"]
    if options.dry:
        arguments.append("--dry")
    return [PYTHON, f"benchmarks/gpu/{program}.py", *arguments]


def path_of_checkout() -> str:
    """PYTHONPATH with which the project need not be installed."""
    path = [str(REPOSITORY)]
    if os.environ.get("PYTHONPATH"):
        path.append(os.environ["PYTHONPATH"])
    return os.pathsep.join(path)


def reason_to_skip(part: Part, options: Options) -> str:
    """Why this machine cannot run `part`; empty where it can."""
    if part.name == "demo" and not options.dry and not (REPOSITORY / ".model" / "sha256").is_file():
        return "the demo's model is not here (prepare.sh --model brings it)"
    is_quantized = part.name in SETTINGS and SETTINGS[part.name].quantization != "none"
    if is_quantized and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not here (pip install 'dpa_ds[quantization]')"
    return ""
