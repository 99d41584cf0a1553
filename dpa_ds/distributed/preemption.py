"""How the ranks of a group agree, without a collective of its own, before which step they save or stop."""

import time
from typing import Literal

from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World

Action = Literal["go", "save", "stop"]
"""What to do before the next step: take it, save first, or save and end."""


class PreemptionSync:
    """The leader decides, the other ranks follow. All ranks of the group make the same calls of `check`."""

    def __init__(self, job: JobStore, world: World, save_every_minutes: float | None) -> None:
        self._job = job
        self._world = world
        self._save_every_seconds = float("inf")
        if save_every_minutes is not None:
            self._save_every_seconds = 60 * save_every_minutes
        self._saved_at = time.monotonic()
        self._num_checks = 0

    def check(self) -> Action:
        """What to do before the next step: the same answer on every rank of the group.

        The leader writes its decision into the job's store for the check after this one. A rank that reaches that check
        has taken a step together with the leader in between, and so finds what was written. Collective in this sense:
        between two calls there must be a collective of the group.
        """
        self._num_checks += 1
        if self._world.world_size == 1:
            return self._note(self._wish())
        store = self._job.store
        prefix = f"preemption/{self._world.group}"
        if self._world.is_leader:
            wish = self._wish()
            if wish != "go":
                store.set(f"{prefix}/{self._num_checks + 1}", wish)
        key = f"{prefix}/{self._num_checks}"
        if not store.check([key]):
            return "go"
        return self._note(store.get(key).decode())

    def _wish(self) -> Action:
        if self._job.stop_requested:
            return "stop"
        if time.monotonic() - self._saved_at > self._save_every_seconds:
            return "save"
        return "go"

    def _note(self, action: str) -> Action:
        match action:
            case "save":
                self._saved_at = time.monotonic()
                return "save"
            case "stop":
                return "stop"
        assert action == "go", action
        return "go"
