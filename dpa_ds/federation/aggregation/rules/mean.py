"""The mean: the server is to go where the clients are on average (FedAvg, McMahan et al. 2017)."""

from dpa_ds.config.schema import FederationConfig
from dpa_ds.federation.aggregation.base import PseudoGradient, Reduced, Rule, ServerState


def mean(reduced: Reduced, state: ServerState, server_round: int, seed: int) -> PseudoGradient:
    """From the global adapter to the mean of A and of B separately. mean(B) mean(A) is not mean(B A)."""
    return PseudoGradient(state.adapter, reduced.mean)


def build(config: FederationConfig) -> Rule:
    """For `federation.aggregation: mean`."""
    return mean
