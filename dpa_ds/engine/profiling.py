"""`--profile`: a trace of a few steps of each phase, and a table of what a round's time went into.

The engine is wrapped, so that nothing of this is in the way of a run without it.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dpa_ds.adapters.methods import Phase
from dpa_ds.distributed.world import World
from dpa_ds.engine.engine import AdapterEngine

logger = logging.getLogger(__name__)

PARTS = {
    "train_step": "steps",
    "activate": "phase switch",
    "write_state": "install adapters",
    "write_optimizer_state": "install adapters",
    "read_state": "gather adapters",
    "read_optimizer_state": "gather adapters",
    "loss": "held-out loss",
}
"""Methods of the engine, and the part of a round that they are."""
ROUND_PARTS = {
    "train": "rest of training: batches, bookkeeping",
    "aggregate": "wait for the all-reduce",
    "save": "save: wait for the writer",
    "evaluate": "rest of evaluation",
    "record": "exchange the numbers, wait for the slowest group",
}
"""Parts that the round loop times, less those of the engine inside them."""
WAITS = ("aggregate", "record")
"""Of these nearly all is waiting for other groups, which they spend in steps."""
PROFILER = "the profiler itself"
TRACED_STEPS = 3


class Profile:
    """Watches the first round of this process, on every rank; the leader of each group writes.

    Args:
        folder: gets `<group>_<phase>.<time>.pt.trace.json.gz` (Perfetto, TensorBoard's profiler plugin), `round.json`, `round.md`.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._in_part = ""
        """The part of the round loop that is being timed."""
        self._inside: dict[str, float] = {}
        self._tracer: torch.profiler.profile | None = None
        self._traced: set[str] = set()
        self._done = False

    def watch(self, engine: AdapterEngine) -> AdapterEngine:
        """`engine` with its methods timed."""
        return cast(AdapterEngine, _Watched(engine, self))

    def enter(self, part: str) -> None:
        """The round loop begins `part`, or (empty) ends one."""
        self._in_part = part

    def call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the engine as a part of the round."""
        if self._done:
            return method(*args, **kwargs)
        if name == "activate":
            self._trace(partial(self._begin_trace, cast(Phase, args[0])))
        started = time.perf_counter()
        with torch.profiler.record_function(PARTS[name]):
            result = method(*args, **kwargs)
            _wait_for_device()
        self._add(PARTS[name], time.perf_counter() - started)
        if name == "train_step" and self._tracer is not None:
            self._trace(self._tracer.step)
        return result

    def report(self, server_round: int, seconds: Mapping[str, float], whole: float) -> None:
        """End the first trained round: write and say the table. Every rank calls it after every round.

        Args:
            seconds: of the round loop's parts.
            whole: seconds of the round.
        """
        if server_round == 0:
            self._seconds, self._calls, self._inside = {}, {}, {}
        if self._done or server_round == 0:
            return
        self._trace(self._end_trace)
        self._done = True
        parts = dict(self._seconds)
        for part, title in ROUND_PARTS.items():
            parts[title] = seconds.get(part, 0.0) - self._inside.get(part, 0.0)
        parts["not in a part"] = whole - sum(parts.values())
        if not self._world.is_leader:
            return
        table = render(parts, self._calls, whole)
        name = f"group_{self._world.group:02d}_round"
        found = {"round": server_round, "seconds": whole, "parts": parts, "calls": self._calls}
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}.json").write_text(json.dumps(found, indent=1))
        (self._folder / f"{name}.md").write_text(table + "\n")
        if self._world.is_coordinator:
            logger.info(f"round {server_round} in parts ({self._folder}):\n{table}")

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        self._calls[part] = self._calls.get(part, 0) + 1
        self._inside[self._in_part] = self._inside.get(self._in_part, 0.0) + seconds

    def _trace(self, work: Callable[[], None]) -> None:
        """Work of the profiler, which a run without it does not have."""
        started = time.perf_counter()
        work()
        self._add(PROFILER, time.perf_counter() - started)

    def _begin_trace(self, phase: Phase) -> None:
        self._end_trace()
        if not self._world.is_leader or phase.trainable in self._traced:
            return
        self._traced.add(phase.trainable)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"group_{self._world.group:02d}_{phase.trainable}"
        self._tracer = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._folder), name, use_gzip=True),
        )
        self._tracer.start()

    def _end_trace(self) -> None:
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer = None


class _Watched:
    """Stands for the engine: the same attributes, and the methods of PARTS timed."""

    def __init__(self, engine: AdapterEngine, profile: Profile) -> None:
        self._engine, self._profile = engine, profile

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        return partial(self._profile.call, name, found) if name in PARTS else found


def render(parts: Mapping[str, float], calls: Mapping[str, int], whole: float) -> str:
    """A Markdown table, the largest part first; the shares add up to 100 %. The last line leaves the profiler and the waits out."""
    lines = ["| part of the round | seconds | share | calls |", "|---|---|---|---|"]
    for part, seconds in sorted(parts.items(), key=lambda entry: -entry[1]):
        lines.append(f"| {part} | {seconds:.3f} | {seconds / whole:.2%} | {calls.get(part, '')} |")
    plain = whole - parts.get(PROFILER, 0.0)
    left_out = ("steps", "held-out loss", *(ROUND_PARTS[part] for part in WAITS))
    outside = plain - sum(parts.get(part, 0.0) for part in left_out)
    return "\n".join(
        [*lines, f"| **work outside steps and held-out loss** | {outside:.3f} | {outside / plain:.2%} | |"]
    )


def _wait_for_device() -> None:
    """Kernels run behind the program: without this, one part's time would be charged to the next."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
