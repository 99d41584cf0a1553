"""The table of adapters, and FedDPA and its baselines as schedules of phases: data, not branches.

A round of a client runs the phases `before` the aggregation, those that `overlap` it because they
need nothing of it, and those `after` it; when all rounds are over, those in `final` once. Source:
FedDPA (arXiv 2403.19211) sections 3.2 and 3.3; `local_first` is the order of the authors' published
code.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from dpa_ds.config.schema import LoraConfig, MethodConfig

GLOBAL: Final = "global"
"""Name of the adapter that all clients share; also of the encoder and the weighting that use it alone."""
LOCAL: Final = "local"
"""Name of the adapter that each client keeps; also of the encoder, the weighting and the baseline
that use it alone."""

Matrix = Literal["A", "B"]
BOTH: tuple[Matrix, ...] = get_args(Matrix)


@dataclass(frozen=True)
class AdapterSpec:
    """One row of the table of adapters."""

    name: str
    rank: int
    shared: tuple[Matrix, ...] = ()
    """Matrices whose changes leave the client and are aggregated; empty: the client keeps the
    adapter to itself."""
    trained: tuple[Matrix, ...] = BOTH
    """Matrices that its phases train; the others keep their initial values."""

    @property
    def federated(self) -> bool:
        """Whether anything of the adapter leaves the client."""
        return bool(self.shared)

    def is_shared(self, key: str) -> bool:
        """Whether the parameter under PEFT's `key` leaves the client."""
        return _matrix(key) in self.shared

    def is_trained(self, key: str) -> bool:
        """Whether the parameter under PEFT's `key` is trained in the adapter's phases."""
        return _matrix(key) in self.trained


def adapter_table(lora: LoraConfig) -> tuple[AdapterSpec, AdapterSpec]:
    """The two adapters of FedDPA: the global one, of which all is shared, and the local one, of
    which nothing is."""
    return (
        AdapterSpec(GLOBAL, lora.rank, shared=BOTH),
        AdapterSpec(LOCAL, lora.local_rank or lora.rank),
    )


Stage = Literal["before", "overlap", "after", "final"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order of a client's round."""


@dataclass(frozen=True)
class Phase:
    """One adapter being trained."""

    trainable: str
    """The trainable adapter; the other is frozen, but stays in the graph where it is mixed in."""
    alpha: float
    """Weight of the local adapter in the forward pass; the global one has 1 - alpha."""


@dataclass(frozen=True)
class Schedule:
    """What a client does in a round, and what leaves it."""

    before: tuple[Phase, ...] = ()
    """Phases of every round, before this round's aggregation."""
    overlap: tuple[Phase, ...] = ()
    """Phases of every round, beside the client's own global adapter, while the leaders average."""
    after: tuple[Phase, ...] = ()
    """Phases of every round, beside this round's aggregated global adapter."""
    final: tuple[Phase, ...] = ()
    """Phases once, after the last round, starting from a local adapter copied from the global one."""
    federated: bool = True
    """The global adapter is averaged over clients each round."""
    pooled: bool = False
    """All clients' data form a single client."""
    local_from_round: int = 1
    """First round in which local phases run."""
    weighted_by_instance: bool = False
    """Inference mixes both adapters, with a weight for each instance."""
    inference_alpha: float = 0.0
    """Fixed weight of the local adapter when no per-instance weight is used (0 for a client that
    never trained it)."""

    def phases(self, stage: Stage, server_round: int) -> tuple[Phase, ...]:
        """Phases of `stage` that run in `server_round`."""
        phases: tuple[Phase, ...] = getattr(self, stage)
        if server_round >= self.local_from_round:
            return phases
        return tuple(phase for phase in phases if phase.trainable != LOCAL)


def build_schedule(config: MethodConfig) -> Schedule:
    """The schedule of `method.name`."""
    global_alone = Phase(GLOBAL, alpha=0.0)
    local_alone = Phase(LOCAL, alpha=1.0)
    local_beside = Phase(LOCAL, alpha=config.alpha)
    match config.name:
        case "feddpa_t" if config.phase_order == "local_first":
            schedule = Schedule(before=(local_beside, global_alone), local_from_round=2)
        case "feddpa_t" if config.global_source == "aggregated":
            schedule = Schedule(before=(global_alone,), after=(local_beside,))
        case "feddpa_t":
            schedule = Schedule(before=(global_alone,), overlap=(local_beside,))
        case "feddpa_f":
            schedule = Schedule(before=(global_alone,), final=(local_alone,))
        case "fedit":
            return Schedule(before=(global_alone,))
        case "fedlora":
            return Schedule(before=(global_alone,), final=(local_alone,), inference_alpha=1.0)
        case "local":
            return Schedule(before=(local_alone,), federated=False, inference_alpha=1.0)
        case "centralized":
            return Schedule(before=(global_alone,), pooled=True)
    return replace(schedule, weighted_by_instance=True, inference_alpha=config.alpha)


def _matrix(key: str) -> str:
    """`...q_proj.lora_A.weight` -> `A`."""
    return key.rsplit(".lora_", 1)[1][0]
