"""launch/run.py that ends itself, or fills the disk, at a named step, and keeps what it hands in for a test to add up.

What it does is read from the environment, because the command is to be the same before and after:

    FAULT_STEP    "rename 3": SIGKILL itself at this step of round 3, as soon as it comes; "rename 0": of any round
    FAULT_FILL    "17 4096 FOLDER": with the 17th write below FOLDER, leave its file system 4096 bytes
    FAULT_DUMP    FOLDER: keep there every update that is handed in, and which of them a round counts
    FAULT_GROUPS  number of groups: while one of them is away the others wait a moment each round, for it to come back
"""

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dpa_ds.distributed.elastic import ElasticGroup
from dpa_ds.distributed.world import World
from dpa_ds.federation import loop
from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState
from dpa_ds.federation.aggregation.pipeline import Accumulator, Aggregation, ReducedRound
from dpa_ds.federation.round_state import RoundCommit, RoundState
from dpa_ds.federation.session import Session
from dpa_ds.federation.trainer import Trainer
from dpa_ds.runs import storage
from dpa_ds.runs.folder import META, RunFolder
from dpa_ds.runs.tracking import Tracker

REPOSITORY = Path(__file__).parents[2]
AWAY_SECONDS = 1.5
FILLER = "filler"
PAGE_BYTES = 4096

Step = tuple[Any, str, str]
"""Owner and name of a function, and whether the step is before or after it."""

STEPS: dict[str, Step] = {
    "sync": (ElasticGroup, "sync_round", "before"),
    "synced": (ElasticGroup, "sync_round", "after"),
    "phase": (Trainer, "_take_steps", "before"),
    "progress torn": (storage, "write_file", "before"),
    "progress": (RunFolder, "save_progress", "after"),
    "trained": (Trainer, "local_update", "after"),
    "hand in": (Accumulator, "reduce", "before"),
    "handed in": (Accumulator, "reduce", "after"),
    "stepped": (Aggregation, "step", "after"),
    "write": (RoundCommit, "start", "before"),
    "adapter torn": (storage, "write_file", "before"),
    "adapter": (RunFolder, "save_adapter", "after"),
    "written": (RoundCommit, "wait", "after"),
    "metrics": (loop, "exchange_metrics", "before"),
    "exchanged": (loop, "exchange_metrics", "after"),
    "record torn": (Tracker, "record", "before"),
    "record": (Tracker, "record", "after"),
    "recorded": (loop, "record_round", "after"),
    "manifest": (RunFolder, "_write_manifest", "before"),
    "rename": (RunFolder, "_write_manifest", "after"),
    "renamed": (RunFolder, "repair_link", "before"),
    "retention": (RunFolder, "_delete_old_rounds", "before"),
    "deletion torn": (RunFolder, "_delete_round", "before"),
    "deleted": (RunFolder, "_delete_round", "after"),
    "commit": (ElasticGroup, "all_reduce_", "before"),
    "committed": (ElasticGroup, "all_reduce_", "after"),
    "end of round": (RoundState, "end_round", "after"),
    "end of run": (World, "close", "before"),
}
"""The steps of a round, in their order."""
COORDINATOR_STEPS = (
    "record torn",
    "record",
    "recorded",
    "manifest",
    "rename",
    "renamed",
    "retention",
    "deletion torn",
    "deleted",
)
ELASTIC_STEPS = ("sync", "synced", "commit", "committed")
"""Of groups with launchers of their own only."""


class Now:
    """The round that this process is in."""

    server_round = 0


# ---- the end at a step -----------------------------------------------------------------------------------------


def end_at(step: str, server_round: int) -> None:
    """SIGKILL for this process when `step` of the round comes (0: of any round)."""
    owner, name, side = STEPS[step]
    original = getattr(owner, name)

    def ending(*args: Any, **kwargs: Any) -> Any:
        is_now = server_round in (0, Now.server_round) and is_meant(step, args)
        if is_now and side == "before":
            leave_torn(step, args, kwargs)
            end()
        result = original(*args, **kwargs)
        if is_now:
            end()
        return result

    setattr(owner, name, ending)


def is_meant(step: str, args: tuple[Any, ...]) -> bool:
    """Of functions that have several uses, the one that the step is about."""
    match step:
        case "progress torn":
            return bool(args[0].name == storage.STATE and "progress" in args[0].parts)
        case "adapter torn":
            return bool(args[0].name == storage.STATE and "progress" not in args[0].parts)
        case "commit" | "committed":
            return bool(args[2] == "commit")
    return True


def leave_torn(step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do the first half of what the step interrupts."""
    match step:
        case "progress torn" | "adapter torn":
            path, text, *_ = args
            path.with_name(f"{path.name}.here.1.tmp").write_text(text[: len(text) // 2])
        case "record torn":
            tracker, kind, server_round = args
            line = json.dumps({"kind": kind, "round": server_round, **kwargs})
            with tracker._records_path.open("a") as file:
                file.write(line[: len(line) // 2])
        case "deletion torn":
            folder, server_round = args
            (folder.round_dir(server_round) / META).unlink()


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0)  # the signal ends all threads, this one included


# ---- a full disk -----------------------------------------------------------------------------------------------


def fill_at(number: int, num_bytes_left: int, folder: str) -> None:
    """With the write `number` (from 1) below `folder`, leave its file system `num_bytes_left`. Numbers that are never
    reached are counted: the sum is in `folder`.writes."""
    count = 0

    def on_write(path: object) -> None:
        nonlocal count
        if not str(path).startswith(f"{folder}/"):
            return
        count += 1
        Path(f"{folder}.writes").write_text(str(count))
        if count == number:
            fill(Path(folder) / FILLER, num_bytes_left)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        match event, args:
            case "open", (path, _, int(flags)) if flags & (os.O_WRONLY | os.O_RDWR) and not str(path).endswith(FILLER):
                on_write(path)
            case "os.mkdir" | "os.symlink" | "os.rename", (path, *_):
                on_write(path)

    sys.addaudithook(on_event)
    save = storage.save_file

    def save_and_count(tensors: Any, path: Path, **kwargs: Any) -> None:
        on_write(path)  # of a library that Python does not see
        save(tensors, path, **kwargs)

    storage.save_file = save_and_count


def fill(filler: Path, num_bytes_left: int) -> None:
    """Take all room of the file system but whole pages below `num_bytes_left`."""
    free = os.statvfs(filler.parent).f_bavail * os.statvfs(filler.parent).f_frsize
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - num_bytes_left) // PAGE_BYTES * PAGE_BYTES))


# ---- what is handed in -----------------------------------------------------------------------------------------


def dump_into(folder: Path) -> None:
    """Keep updates by round and client, and of a round that counts its weight and its global adapter."""
    add, step, complete = Accumulator.add, Aggregation.step, RunFolder.complete_round
    weights: dict[int, float] = {}

    def add_and_keep(self: Accumulator, update: LocalUpdate) -> None:
        place = folder / f"round_{Now.server_round:06d}"
        place.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in update.adapter.items()}
        save_file(tensors, place / f"client_{update.client_id:02d}.{os.getpid()}.safetensors")
        add(self, update)

    def step_and_note(self: Aggregation, state: ServerState, reduced: ReducedRound | None, number: int) -> ServerState:
        assert reduced is not None
        weights[number] = reduced.updates.weight
        return step(self, state, reduced, number)

    def note_and_complete(self: RunFolder, server_round: int, *args: Any) -> None:
        if not self.is_complete(server_round):
            (folder / f"round_{server_round:06d}.json").write_text(json.dumps(weights[server_round]))
            adapter = self._unfinished(server_round) / "global" / "adapter_model.safetensors"
            (folder / f"round_{server_round:06d}.global").write_bytes(adapter.read_bytes())
        complete(self, server_round, *args)

    Accumulator.add = add_and_keep  # type: ignore[method-assign]
    Aggregation.step = step_and_note  # type: ignore[method-assign]
    RunFolder.complete_round = note_and_complete  # type: ignore[method-assign]


# ---- rounds ----------------------------------------------------------------------------------------------------


def follow_rounds(num_groups: int) -> None:
    """Know the round, and give groups that are away the time to come back."""
    sync, train, finish = loop.sync_round, loop.train_round, loop.finish_round

    def sync_next(session: Session, is_starting: bool = False) -> bool:
        Now.server_round = session.round_state.num_completed + 1
        return sync(session, is_starting)

    def train_this(session: Session, cohort: Any, server_round: int) -> None:
        Now.server_round = server_round
        leaders = session.world.leaders
        if isinstance(leaders, ElasticGroup) and leaders._manager.num_participants() < num_groups:
            time.sleep(AWAY_SECONDS)
        train(session, cohort, server_round)

    def finish_this(session: Session, cohort: Any, server_round: int) -> None:
        Now.server_round = server_round
        finish(session, cohort, server_round)

    loop.sync_round, loop.train_round, loop.finish_round = sync_next, train_this, finish_this


def observe(environ: Callable[[str], str | None]) -> None:
    """All that the environment asks for."""
    follow_rounds(int(environ("FAULT_GROUPS") or 0))
    if dump := environ("FAULT_DUMP"):
        dump_into(Path(dump))
    if step := environ("FAULT_STEP"):
        name, _, server_round = step.rpartition(" ")
        end_at(name, int(server_round))
    if fill_with := environ("FAULT_FILL"):
        number, num_bytes_left, folder = fill_with.split(" ", 2)
        fill_at(int(number), int(num_bytes_left), folder)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    observe(os.environ.get)
    sys.argv = ["launch/run.py", *sys.argv[1:]]
    runpy.run_path("launch/run.py", run_name="__main__")
