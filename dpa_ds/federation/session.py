"""A run, ready to start: everything that the round loop needs, built once and in the right order."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from dpa_ds.config.schema import FederationConfig
from dpa_ds.distributed.world import World
from dpa_ds.engine.profiling import Profile
from dpa_ds.federation.aggregation.pipeline import Aggregation
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.round_evaluation import RoundEvaluation
from dpa_ds.federation.round_state import RoundCommit, RoundState
from dpa_ds.federation.trainer import Trainer
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.resume import RunLock
from dpa_ds.runs.storage import BackgroundWriter
from dpa_ds.runs.tracking import Tracker


@dataclass
class RoundTimer:
    """Seconds of each part of the current round; with `--profile` also reported to the profile."""

    profile: Profile
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's duration to the part `name`."""
        started = time.monotonic()
        self.profile.enter(name)
        yield
        self.profile.enter("")
        self.seconds[name] += time.monotonic() - started

    def end_round(self, server_round: int) -> None:
        """Forget the round's times; with `--profile` report those of the first."""
        now = time.monotonic()
        self.profile.report(server_round, self.seconds, now - self.began)
        self.seconds.clear()
        self.began = now


@dataclass(frozen=True)
class Session:
    """One rank's view of a run before its first round."""

    seed: int
    federation: FederationConfig
    share: Literal["per_client", "sums"]
    """What of the clients' numbers leaves their rank group."""
    world: World
    clients: Sequence[HostedClient]
    """Hosted by this rank group, in order."""
    labels: Sequence[str]
    """Of all clients, for messages."""
    trainer: Trainer
    aggregation: Aggregation
    evaluation: RoundEvaluation
    round_state: RoundState
    commit: RoundCommit
    folder: RunFolder
    lock: RunLock
    """Of the run, on rank 0: held as long as the session lives."""
    writer: BackgroundWriter
    tracker: Tracker
    timer: RoundTimer
    started: float
    """When building began, by `time.monotonic`."""

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.federation.num_rounds
