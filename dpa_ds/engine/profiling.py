"""`--profile`: a trace of a few steps of each phase, and a table of what a round's time went into.

The engine marks its work by regions, the round loop its parts. After the first round, and without
`--profile`, a mark is a call that does nothing.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from dpa_ds.distributed.world import World

logger = logging.getLogger(__name__)

Region = Literal["steps", "phase switch", "install adapters", "gather adapters", "held-out loss"]
"""Work of the engine."""
ROUND_PARTS = {
    "train": "rest of training: batches, bookkeeping",
    "aggregate": "wait for the all-reduce",
    "save": "save: wait for the writer",
    "evaluate": "rest of evaluation",
    "record": "exchange the numbers, wait for the slowest group",
}
"""Parts that the round loop times, less the engine's regions inside them."""
WAITS = ("aggregate", "record")
"""Of these nearly all is waiting for other groups, which they spend in steps."""
PROFILER = "the profiler itself"
TRACED_STEPS = 3
NOTHING = nullcontext()


class Profile:
    """Watches the first round of this process, on every rank; the leader of each group writes.

    Args:
        folder: gets `<group>_<phase>.<time>.pt.trace.json.gz` (Perfetto, TensorBoard's profiler
            plugin), `round.json` and `round.md`. None: nothing is watched.
    """

    def __init__(self, folder: Path | None, world: World) -> None:
        self._folder = folder
        self._world = world
        self._watching = folder is not None
        self._seconds: dict[str, float] = defaultdict(float)
        """Of each region."""
        self._calls: dict[str, int] = defaultdict(int)
        self._part = ""
        """The part of the round loop that is being timed."""
        self._seconds_inside: dict[str, float] = defaultdict(float)
        """Of the regions inside each part."""
        self._tracer: torch.profiler.profile | None = None
        self._traced: set[str] = set()

    # ---- called by the engine ---------------------------------------------------------------------------------

    def region(self, name: Region) -> AbstractContextManager[None]:
        """Time the block as work of the engine, and name it in the trace."""
        return self._timed(name) if self._watching else NOTHING

    def begin_phase(self, adapter: str) -> None:
        """The engine starts to train `adapter`: its next steps are traced, the first time."""
        if self._watching:
            self._charge_to_profiler(partial(self._begin_trace, adapter))

    def end_step(self) -> None:
        """The engine has taken a step."""
        if self._tracer is not None:
            self._charge_to_profiler(self._tracer.step)

    # ---- called by the round loop -----------------------------------------------------------------------------

    def enter(self, part: str) -> None:
        """The round loop begins `part` (a key of ROUND_PARTS), or (empty) ends one."""
        self._part = part

    def report(self, server_round: int, seconds: Mapping[str, float], whole: float) -> None:
        """End the first trained round: write and log the table. Every rank calls it after every round.

        Args:
            seconds: of the round loop's parts.
            whole: seconds of the round.
        """
        if not self._watching:
            return
        if server_round == 0:  # the state before training is evaluated and saved, which is no round
            self._seconds.clear()
            self._calls.clear()
            self._seconds_inside.clear()
            return
        self._charge_to_profiler(self._end_trace)
        self._watching = False
        parts = dict(self._seconds)
        for part, title in ROUND_PARTS.items():
            parts[title] = seconds.get(part, 0.0) - self._seconds_inside.get(part, 0.0)
        parts["not in a part"] = whole - sum(parts.values())
        if self._world.is_leader:
            self._write(server_round, parts, whole)

    # ---- times ------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            # Kernels run behind the program: without this, one region's time would be charged to the next.
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        self._add(name, time.perf_counter() - started)

    def _charge_to_profiler(self, work: Callable[[], None]) -> None:
        """Do work that a run without the profiler does not have."""
        started = time.perf_counter()
        work()
        self._add(PROFILER, time.perf_counter() - started)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds
        self._calls[name] += 1
        self._seconds_inside[self._part] += seconds

    def _write(self, server_round: int, parts: Mapping[str, float], whole: float) -> None:
        assert self._folder is not None
        table = render(parts, self._calls, whole)
        found = {"round": server_round, "seconds": whole, "parts": parts, "calls": self._calls}
        name = f"group_{self._world.group:02d}_round"
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{name}.json").write_text(json.dumps(found, indent=1))
        (self._folder / f"{name}.md").write_text(table + "\n")
        if self._world.is_coordinator:
            logger.info(f"round {server_round} in parts ({self._folder}):\n{table}")

    # ---- traces -----------------------------------------------------------------------------------------------

    def _begin_trace(self, adapter: str) -> None:
        self._end_trace()
        if not self._world.is_leader or adapter in self._traced:
            return
        self._traced.add(adapter)
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"group_{self._world.group:02d}_{adapter}"
        self._tracer = torch.profiler.profile(
            # The first step warms up: it builds what later ones find.
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED_STEPS, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._folder), name, use_gzip=True),
        )
        self._tracer.start()

    def _end_trace(self) -> None:
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer = None


def render(parts: Mapping[str, float], calls: Mapping[str, int], whole: float) -> str:
    """A Markdown table, the largest part first; the shares add up to 100 %. The last line leaves
    the profiler and the waits out."""
    lines = ["| part of the round | seconds | share | calls |", "|---|---|---|---|"]
    for part in sorted(parts, key=parts.__getitem__, reverse=True):
        lines.append(f"| {part} | {parts[part]:.3f} | {parts[part] / whole:.2%} | {calls.get(part, '')} |")
    plain = whole - parts.get(PROFILER, 0.0)
    outside = plain
    for part in ("steps", "held-out loss", *(ROUND_PARTS[wait] for wait in WAITS)):
        outside -= parts.get(part, 0.0)
    lines.append(f"| **work outside steps and held-out loss** | {outside:.3f} | {outside / plain:.2%} | |")
    return "\n".join(lines)
