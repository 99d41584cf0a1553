"""launch/run.py with one deliberate fault of resuming, to see whether the fault trials find it: planted.py BUG ARGUMENTS."""

import dataclasses
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from dpa_ds.engine import engine
from dpa_ds.federation import round_state, trainer
from dpa_ds.runs import folder

REPOSITORY = Path(__file__).parents[2]


def random_state() -> None:
    """The random numbers of a resumed phase are others than before."""
    find, fold = round_state.RoundState._find, trainer._fold
    resumed = False

    def find_and_note(*args: Any) -> Any:
        nonlocal resumed
        found = find(*args)
        resumed |= found is not None
        return found

    round_state.RoundState._find = find_and_note  # type: ignore[method-assign]
    trainer._fold = lambda *words: fold(*words) + resumed


def optimizer() -> None:
    """A resumed phase begins with an empty optimizer."""
    engine.AdapterEngine.write_optimizer_state = lambda *args: None  # type: ignore[method-assign]


def data_position() -> None:
    """A resumed phase does its last step again."""
    find = round_state.RoundState._find

    def find_a_step_before(*args: Any) -> Any:
        found = find(*args)
        if found is not None and found.info["inside"]["step"]:
            found.info["inside"]["step"] -= 1
        return found

    round_state.RoundState._find = find_a_step_before  # type: ignore[method-assign]


def stale_adapter() -> None:
    """A resumed client has the local adapter of a round before."""
    load = folder.RunFolder.load_adapter

    def load_older(self: folder.RunFolder, server_round: int, name: str) -> Any:
        saved = load(self, server_round, name)
        older = self.round_dir(server_round - 1) / name
        if name.startswith("local") and older.is_dir():
            saved = dataclasses.replace(saved, weights=load(self, server_round - 1, name).weights)
        return saved

    folder.RunFolder.load_adapter = load_older  # type: ignore[method-assign]


BUGS = {f.__name__: f for f in (random_state, optimizer, data_position, stale_adapter)}

if __name__ == "__main__":
    os.chdir(REPOSITORY)
    BUGS[next(word for word in sys.argv if word in BUGS)]()
    sys.argv = ["launch/run.py", *(word for word in sys.argv[1:] if word not in BUGS)]
    runpy.run_path("launch/run.py", run_name="__main__")
