"""What is done to one client's update before it may leave, in this order."""

import math

from dpa_ds.config.schema import FederationConfig
from dpa_ds.errors import TrainingError
from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState, Transform


def build_transforms(config: FederationConfig) -> tuple[Transform, ...]:
    """The transforms that the recipe asks for."""
    if config.max_update_norm is None:
        return ()
    return (NormBound(config.max_update_norm),)


class NormBound:
    """Refuses an update whose change of the global adapter is longer than `max_update_norm` (L2, over all
    parameters)."""

    def __init__(self, max_update_norm: float) -> None:
        self._bound = max_update_norm

    def __call__(self, update: LocalUpdate, state: ServerState) -> LocalUpdate:
        """Raises TrainingError for an update that is too long."""
        squares = 0.0
        for key, trained in update.adapter.items():
            squares += float((trained - state.adapter[key]).double().square().sum())
        norm = math.sqrt(squares)
        if norm > self._bound:
            raise TrainingError(
                f"changed the global adapter by {norm:.4g}, more than federation.max_update_norm = {self._bound:g}"
            )
        return update
