"""How far each hosted client has come in the current round: kept while it trains, saved, and restored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dpa_ds.adapters.state import AdapterState
from dpa_ds.errors import CheckpointError
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter, SavedFolder
from dpa_ds.runs.tracking import logger


@dataclass
class RoundMetrics:
    """Numbers of one client and round, summed over its phases. Losses are means per label token."""

    num_steps: int = 0
    seconds: float = 0.0
    real_tokens: int = 0
    restored_tokens: int = 0
    """Of `real_tokens`: those of an earlier process that was interrupted in this round."""
    computed_tokens: int = 0
    global_loss: float = 0.0
    """Mean training loss of the global phase's steps."""
    local_loss: float = 0.0
    skipped_steps: int = 0
    """Steps that DeepSpeed left out because their gradient was not finite (fp16: while the loss scale settles)."""
    rejected: int = 0
    """1: it diverged or changed too much, and what it did in this round was undone."""


@dataclass
class PhaseProgress:
    """Inside a phase."""

    step: int = 0
    """Optimizer steps done."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    """fp16: state of the loss scale."""


@dataclass
class RoundProgress:
    """A client's way through a round: the phases before the aggregation, after it, and the final ones, counted through."""

    phase: int = 0
    """Phases done."""
    inside: PhaseProgress = field(default_factory=PhaseProgress)
    """Of the phase that comes next."""
    metrics: RoundMetrics = field(default_factory=RoundMetrics)
    update: AdapterState | None = None
    """The client's own global adapter, as far as it was trained in this round; None while it is the shared one."""
    counts_references: bool = False
    """The mean state of its references goes with this round's update: it was not counted before."""
    optimizer: AdapterState | None = None
    """Inside a phase that was interrupted: AdamW state of the adapter that it trains."""


class ProgressKeeper:
    """Saves and finds the progress of this group's clients.

    Args:
        layout: what must be equal for work inside a round to be restored bit for bit: ranks, ZeRO stage, ...
        is_leader: this rank writes.
    """

    def __init__(self, folder: RunFolder, writer: BackgroundWriter, layout: Mapping[str, Any], is_leader: bool) -> None:
        self._folder, self._writer, self._layout, self._is_leader = folder, writer, dict(layout), is_leader

    def save(
        self,
        server_round: int,
        client: int,
        progress: RoundProgress,
        local: Mapping[str, AdapterState],
        steps_taken: Mapping[str, int],
    ) -> None:
        """Write in the background.

        Args:
            local: the client's local adapter as `local`, and its kept AdamW state as `local_optimizer` if there is one.
        """
        if not self._is_leader:
            return
        tensors = dict(local)
        if progress.update is not None:
            tensors["update"] = progress.update
        if progress.optimizer is not None:
            tensors["optimizer"] = progress.optimizer
        info = {
            "layout": self._layout,
            "phase": progress.phase,
            "inside": asdict(progress.inside),
            "metrics": asdict(progress.metrics),
            "counts_references": progress.counts_references,
            "steps_taken": dict(steps_taken),
        }
        self._writer.submit(lambda: self._folder.save_progress(server_round, client, tensors, info))

    def find(self, server_round: int, client: int) -> tuple[RoundProgress, SavedFolder] | None:
        """The progress of a client in `server_round`, and what was saved with it; None: the round starts from scratch."""
        saved = self._folder.load_progress(server_round, client, self._warn)
        if saved is None:
            return None
        if saved.info.get("layout") != self._layout:
            if self._is_leader:
                logger.warning(
                    f"client {client} starts round {server_round} from scratch: what it had done of it was done with another layout "
                    f"({saved.info.get('layout')}, now {self._layout})"
                )
            return None
        info, tensors = saved.info, saved.tensors
        progress = RoundProgress(
            info["phase"],
            PhaseProgress(**info["inside"]),
            RoundMetrics(**info["metrics"]),
            tensors.get("update"),
            info["counts_references"],
            tensors.get("optimizer"),
        )
        return progress, saved

    def _warn(self, damage: CheckpointError) -> None:
        if self._is_leader:
            logger.warning(damage)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._writer.wait()
