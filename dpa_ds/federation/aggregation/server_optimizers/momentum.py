"""Server momentum (FedAvgM, Hsu et al. 2019, arXiv 1909.06335): v = b v + D, theta += eta v."""

from dataclasses import replace

import torch

from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import FederationConfig
from dpa_ds.federation.aggregation.base import PseudoGradient, ServerState


class Momentum:
    """Keeps v, as large as the global adapter, in fp32."""

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self._learning_rate, self._momentum = learning_rate, momentum

    def initial_tensors(self, adapter: AdapterState) -> AdapterState:
        """v = 0."""
        return {key: torch.zeros_like(tensor) for key, tensor in adapter.items()}

    def step(self, state: ServerState, gradient: PseudoGradient, server_round: int) -> ServerState:
        """See `ServerOptimizer.step`."""
        adapter, velocities = {}, {}
        for key, velocity in state.optimizer.items():
            delta = gradient.delta(key)
            velocities[key] = self._momentum * velocity + delta
            # theta + eta v, written from the mean of the clients: with eta = 1 and b = 0 it is that mean to the bit.
            adapter[key] = gradient.end[key] + (self._learning_rate * velocities[key] - delta)
        return replace(state, adapter=adapter, optimizer=velocities)


def build(config: FederationConfig) -> Momentum:
    """For `federation.server_optimizer: momentum`."""
    return Momentum(config.server_learning_rate, config.server_momentum)
