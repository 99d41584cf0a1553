"""How far a client has come in the current round: plain values, in memory."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dpa_ds.adapters.state import AdapterState


@dataclass(frozen=True)
class ClientState:
    """What training changes of a client. Replaced as a whole, never written to: an older one undoes a round."""

    local_adapter: AdapterState
    """On its leader; empty on the other ranks of its group."""
    num_steps: dict[str, int]
    """Optimizer steps per adapter so far: the x axis of the client's curves."""
    local_optimizer: AdapterState | None = None
    """AdamW state of the local adapter, if `train.keep_optimizer_state` and there is one; empty on other ranks
    than its leader."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """fp16: the numbers of the dynamic loss scale after the client's last phase; else empty."""


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
    """1: the client diverged or changed too much, and what it did in this round was undone."""


@dataclass
class PhaseProgress:
    """How far a client has come in one phase."""

    step: int = 0
    """Optimizer steps done."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    """fp16: the numbers of the dynamic loss scale."""


@dataclass
class RoundProgress:
    """A client's way through a round. Phases of all stages are counted through: before, overlap, after, final."""

    initial: ClientState
    """The client as the round found it: what undoing the round returns to."""
    phase: int = 0
    """Phases done."""
    inside: PhaseProgress = field(default_factory=PhaseProgress)
    """Of the phase that comes next."""
    metrics: RoundMetrics = field(default_factory=RoundMetrics)
    update: AdapterState | None = None
    """The client's own global adapter, on its leader; None while it is the shared one, and once nobody here
    needs it."""
    is_update_saved: bool = False
    """The whole update is among the files of this round: it need not be kept in memory."""
    optimizer: AdapterState | None = None
    """Inside a phase that was interrupted: AdamW state of the adapter that it trains, on its leader."""

    def to_json(self) -> dict[str, Any]:
        """All but the tensors and the initial state."""
        return {
            "phase": self.phase,
            "inside": asdict(self.inside),
            "metrics": asdict(self.metrics),
            "is_update_saved": self.is_update_saved,
        }

    @classmethod
    def from_json(cls, initial: ClientState, content: dict[str, Any]) -> "RoundProgress":
        """Inverse of `to_json`."""
        return cls(
            initial=initial,
            phase=content["phase"],
            inside=PhaseProgress(**content["inside"]),
            metrics=RoundMetrics(**content["metrics"]),
            is_update_saved=content["is_update_saved"],
        )
