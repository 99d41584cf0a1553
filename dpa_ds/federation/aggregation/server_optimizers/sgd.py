"""A plain step along the pseudo-gradient: theta += eta D. With eta = 1 it is FedAvg."""

from dataclasses import replace

import torch

from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import FederationConfig
from dpa_ds.errors import ConfigError
from dpa_ds.federation.aggregation.base import PseudoGradient, ServerState


class Sgd:
    """Keeps nothing from round to round."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate

    def initial_tensors(self, adapter: AdapterState) -> AdapterState:
        """None."""
        return {}

    def step(self, state: ServerState, gradient: PseudoGradient, server_round: int) -> ServerState:
        """See `ServerOptimizer.step`."""
        if self._learning_rate == 1.0:  # to the bit, and without another pass over the parameters
            return replace(state, adapter=gradient.end)
        adapter = {
            key: torch.add(old, gradient.delta(key), alpha=self._learning_rate) for key, old in state.adapter.items()
        }
        return replace(state, adapter=adapter)


def build(config: FederationConfig) -> Sgd:
    """For `federation.server_optimizer: sgd`.

    Raises:
        ConfigError: a momentum is given, which has no effect here.
    """
    if config.server_momentum != FederationConfig().server_momentum:
        raise ConfigError(
            f"federation.server_momentum: {config.server_momentum:g} has no effect with federation.server_optimizer "
            "sgd: leave it out, or choose another optimizer"
        )
    return Sgd(config.server_learning_rate)
