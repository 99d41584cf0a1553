"""How the ranks of a group agree, without a collective of its own, before which step they save or stop."""

import time
from typing import Literal

from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World

Action = Literal["go", "save", "stop"]


class PreemptionSync:
    """The leader steers, the other ranks follow. All ranks of the group make the same calls of `check`."""

    def __init__(self, job: JobStore, world: World, save_every_minutes: float | None) -> None:
        self._job, self._world = job, world
        self._save_every_seconds = save_every_minutes * 60 if save_every_minutes else float("inf")
        self._saved, self._count = time.monotonic(), 0

    def check(self) -> Action:
        """What to do before the next step: the same answer on every rank of the group.

        The leader writes an order for the boundary after this one into the job's store. Whoever reaches that one has taken
        a step together with the leader in between, and so finds what was written. Collective in this sense: between two calls there
        must be a collective of the group.
        """
        self._count += 1
        if self._world.world_size == 1:
            return self._noted(self._wish())
        store, prefix = self._job.store, f"preemption/{self._world.group}"
        if self._world.is_leader and (wish := self._wish()) != "go":
            store.set(f"{prefix}/{self._count + 1}", wish)
        key = f"{prefix}/{self._count}"
        return self._noted(store.get(key).decode() if store.check([key]) else "go")

    def _wish(self) -> str:
        if self._job.stop_requested:
            return "stop"
        return "save" if time.monotonic() - self._saved > self._save_every_seconds else "go"

    def _noted(self, order: str) -> Action:
        assert order in ("go", "save", "stop"), order
        if order == "save":
            self._saved = time.monotonic()
        return order  # type: ignore[return-value]
