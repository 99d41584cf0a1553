"""How far a client has come in the current round: plain values, in memory."""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.adapters.state import AdapterState

Numbers = TypeVar("Numbers")


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
        """Inverse of `to_json`. LookupError, TypeError or ValueError: what it did not write."""
        return cls(
            initial=initial,
            phase=checked(content["phase"], int, "phase"),
            inside=_from_json(PhaseProgress, content["inside"]),
            metrics=_from_json(RoundMetrics, content["metrics"]),
            is_update_saved=checked(content["is_update_saved"], bool, "is_update_saved"),
        )


def steps_from_json(content: Any) -> dict[str, int]:
    """`ClientState.num_steps` as it was saved. LookupError, TypeError or ValueError: something else."""
    return {name: checked(content[name], int, f"steps of {name}") for name in (GLOBAL, LOCAL)}


def checked(value: Any, annotation: Any, name: str) -> Any:
    """`value` if it is of a type that this file's dataclasses have. ValueError: it is not."""
    if not _is(value, annotation):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _from_json(kind: type[Numbers], content: Mapping[str, Any]) -> Numbers:
    values = {}
    for name, annotation in typing.get_type_hints(kind).items():
        values[name] = checked(content[name], annotation, name)
    return kind(**values)


def _is(value: Any, annotation: Any) -> bool:
    """Counts are not negative; a bool is no number."""
    if typing.get_origin(annotation) is list:
        return isinstance(value, list) and all(_is(item, float) for item in value)
    if typing.get_origin(annotation) is dict:
        return isinstance(value, dict) and all(_is(item, float) for item in value.values())
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, annotation)
