"""What the round loop holds between its steps."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.world import World
from dpa_ds.engine.profiling import Profile
from dpa_ds.evaluation.while_training import Scorer
from dpa_ds.federation.aggregation.mean import Aggregator, Shared
from dpa_ds.federation.trainer import ClientTrainer, HostedClient
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter
from dpa_ds.runs.tracking import Tracker


@dataclass
class Federation:
    """One rank's view of the run between rounds."""

    config: RunConfig
    world: World
    trainer: ClientTrainer
    aggregator: Aggregator
    clients: Sequence[HostedClient]
    """Hosted by this rank group, in order."""
    labels: Sequence[str]
    """Of all clients, for messages."""
    shared: Shared
    folder: RunFolder
    writer: BackgroundWriter
    tracker: Tracker
    scorer: Scorer | None
    """Where `evaluation.scores_every_rounds` asks for answers while training."""
    profile: Profile
    """Watches the first round where `--profile` asks for it."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time of each part of the current round."""
    round_began: float = field(default_factory=time.monotonic)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's duration to `seconds[part]`."""
        started = time.monotonic()
        self.profile.enter(part)
        yield
        self.profile.enter("")
        self.seconds[part] += time.monotonic() - started

    def end_round(self, server_round: int) -> None:
        """Forget the round's times; with `--profile` tell those of the first."""
        now = time.monotonic()
        self.profile.report(server_round, self.seconds, now - self.round_began)
        self.seconds.clear()
        self.round_began = now
