"""A job whose rank 1 has a programmer's error while rank 0 waits: `... raises_on_rank_1.py WHERE --config RECIPE`.

WHERE: all_reduce or store, what rank 0 waits in; killed, if rank 1 is to die without a word.
"""

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from dpa_ds.cli.bootstrap import Work, run_job
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import build_world


def wait_for_each_other(config: RunConfig, job: JobStore) -> None:
    """Rank 0 waits for a rank 1 that never comes."""
    import torch

    where = sys.argv[1]
    world = build_world(job, Topology((1, 1), 2), config.cluster, config.federation.timeout_seconds)
    assert world.leaders is not None
    world.leaders.all_reduce_(torch.ones(3), "metrics")  # both are here
    if job.launch.global_rank == 1:
        if where == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a fault of the programmer")
    if where == "store":
        job.lookup("never published")
    world.leaders.all_reduce_(torch.ones(3), "update")


def prepare(argv: Sequence[str]) -> tuple[RunConfig, Work]:
    """The recipe, and the work."""
    config = load_config(argv)
    return config, partial(wait_for_each_other, config)


if __name__ == "__main__":
    run_job([argument for argument in sys.argv[2:] if not argument.startswith("--local")], prepare)
