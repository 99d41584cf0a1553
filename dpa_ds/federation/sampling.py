"""Who takes part in a round: a pure function of seed and round, so every rank knows it without asking."""

import math

import numpy as np

from dpa_ds.distributed.topology import Topology


def sample_clients(
    topology: Topology,
    fraction: float,
    seed: int,
    server_round: int,
    stratify_by_group: bool = False,
) -> tuple[int, ...]:
    """Clients of round `server_round`, ascending: max(1, round(fraction * C)) of C, without replacement.

    With `stratify_by_group` the same number (at least one) is drawn from each rank group, so that no group idles;
    groups that host fewer give all they have.
    """
    random = np.random.Generator(np.random.PCG64([seed, server_round, 0x5A]))
    strata = (
        [topology.clients_of_group(g) for g in range(topology.num_groups)]
        if stratify_by_group
        else [tuple(range(topology.num_clients))]
    )
    per_stratum = max(1, _round_half_up(fraction * topology.num_clients / len(strata)))
    drawn = [random.choice(s, min(per_stratum, len(s)), replace=False).tolist() for s in strata]
    return tuple(sorted(client for part in drawn for client in part))


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)
