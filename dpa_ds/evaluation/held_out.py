"""Held-out loss of one client while training: cheap, and the same number on any layout of ranks."""

from dpa_ds.data.batches import Batching, build_step
from dpa_ds.data.prompts import TokenizedExamples
from dpa_ds.distributed.world import World
from dpa_ds.model.engine import AdapterEngine


def held_out_loss(
    engine: AdapterEngine,
    world: World,
    examples: TokenizedExamples,
    alpha: float,
    max_examples: int,
    batching: Batching,
) -> float:
    """Mean loss per label token of the first `max_examples` examples, the adapters mixed as (1 - alpha, alpha).

    The adapters must already be in the engine. Collective: all ranks of the group.
    """
    indices = range(min(len(examples), max_examples))
    step = build_step(examples, indices, world.rank, world.world_size, batching)
    return engine.loss([step], alpha)
