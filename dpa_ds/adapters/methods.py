"""FedDPA and its baselines as schedules of phases: data, not branches.

A round of a client runs the phases `before` the aggregation, those that `overlap` it because they need nothing of
it, and those `after` it; when all rounds are over, those in `final` once. Source: FedDPA (arXiv 2403.19211) sections
3.2 and 3.3; `local_first` is the order of the authors' published code.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from dpa_ds.adapters.dual_lora import Adapter
from dpa_ds.config.schema import MethodConfig

GLOBAL: Adapter = "global"
LOCAL: Adapter = "local"

Stage = Literal["before", "overlap", "after", "final"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order of a client's round."""


@dataclass(frozen=True)
class Phase:
    """One adapter being trained."""

    trainable: Adapter
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
    """Fixed weight of the local adapter when no per-instance weight is used (0 for a client that never trained it)."""

    def phases(self, stage: Stage, server_round: int) -> tuple[Phase, ...]:
        """Phases of `stage` that run in `server_round`."""
        phases: tuple[Phase, ...] = getattr(self, stage)
        return tuple(p for p in phases if p.trainable == "global" or server_round >= self.local_from_round)


def build_schedule(config: MethodConfig) -> Schedule:
    """The schedule of `method.name`."""
    global_alone = Phase(trainable="global", alpha=0.0)
    local_alone = Phase(trainable="local", alpha=1.0)
    local_beside = Phase(trainable="local", alpha=config.alpha)
    dual = partial(Schedule, weighted_by_instance=True, inference_alpha=config.alpha)
    match config.name:
        case "feddpa_t" if config.phase_order == "local_first":
            return dual((local_beside, global_alone), local_from_round=2)
        case "feddpa_t" if config.global_source == "aggregated":
            return dual((global_alone,), after=(local_beside,))
        case "feddpa_t":
            return dual((global_alone,), overlap=(local_beside,))
        case "feddpa_f":
            return dual((global_alone,), final=(local_alone,))
        case "fedit":
            return Schedule((global_alone,))
        case "fedlora":
            return Schedule((global_alone,), final=(local_alone,), inference_alpha=1.0)
        case "local":
            return Schedule((local_alone,), federated=False, inference_alpha=1.0)
        case "centralized":
            return Schedule((global_alone,), pooled=True)
