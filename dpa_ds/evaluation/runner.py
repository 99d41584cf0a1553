"""Evaluation as work items: which prompts for which clients, and what a rank group does with one item."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dpa_ds.adapters.methods import LOCAL
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.inference.client_model import ClientModel, Predictor
from dpa_ds.inference.embedding import batches

Key = tuple[int, str, int]
"""Client, task, row: see `Answer.key`."""
WORK_ITEMS_PER_GROUP = 4
"""At least so many, where there is work for them: a slow group then takes fewer."""


@dataclass(frozen=True)
class WorkItem:
    """A batch of instances of one task, to be answered by some of the clients."""

    instances: tuple[int, ...]
    """Positions in the list of all instances."""
    clients: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """Each of the clients is asked each of the instances."""

    instances: Sequence[Instance]
    prompts: Sequence[Sequence[int]]
    """Tokens of each instance's prompt."""
    client_models: Mapping[int, ClientModel]
    """The clients by id."""

    @property
    def keys(self) -> set[Key]:
        """All of them."""
        return {(client, i.task, i.row) for client in self.client_models for i in self.instances}

    def plan(self, generation: GenerationConfig, num_groups: int) -> list[WorkItem]:
        """`plan_work_items` of all of them."""
        lengths = [len(prompt) for prompt in self.prompts]
        return plan_work_items(self.instances, lengths, list(self.client_models), generation, num_groups)


def plan_work_items(
    instances: Sequence[Instance],
    lengths: Sequence[int],
    clients: Sequence[int],
    generation: GenerationConfig,
    num_groups: int,
) -> list[WorkItem]:
    """All the work, in a fixed order; a pure function of its arguments.

    Batches keep to one task, whose prompts and answers are of similar length, and to `generation.batch_tokens` of
    prompt and answer over all beams. All clients share a item, so that it is encoded once, unless there would be too
    few work items for the groups.

    Args:
        lengths: tokens of each instance's prompt.
    """
    budget = generation.batch_tokens // generation.num_beams
    chunks: list[list[int]] = []
    for task in dict.fromkeys(instance.task for instance in instances):
        rows = [i for i, instance in enumerate(instances) if instance.task == task]
        parts = batches([lengths[i] + generation.max_new_tokens for i in rows], budget)
        chunks += [[rows[k] for k in part] for part in parts]
    num_blocks = min(len(clients), math.ceil(WORK_ITEMS_PER_GROUP * num_groups / max(1, len(chunks))))
    size = math.ceil(len(clients) / num_blocks)
    blocks = [tuple(clients[start : start + size]) for start in range(0, len(clients), size)]
    return [WorkItem(tuple(chunk), block) for chunk in chunks for block in blocks]


def answer_work_item(
    item: WorkItem,
    evaluation_set: EvaluationSet,
    predictor: Predictor,
    world: World,
    done: frozenset[Key] | set[Key],
) -> Iterable[list[Answer]]:
    """Answer what of `work item` is not in `done`; each batch of answers as soon as it is there.

    An instance whose weight is 0 is answered by the global adapter alone: the same for every client, and done once.
    A rank of a group with a partitioned base answers its share of every batch. Collective then: all ranks of the group.
    """
    instances, prompts, client_models = evaluation_set.instances, evaluation_set.prompts, evaluation_set.client_models
    wanted = {
        client: [i for i in item.instances if (client, instances[i].task, instances[i].row) not in done]
        for client in item.clients
    }
    rows = sorted({i for client_rows in wanted.values() for i in client_rows})
    if not rows:
        return
    position = {i: k for k, i in enumerate(rows)}
    weighting, states = predictor.weighting, None
    if not weighting.is_constant and weighting.encoder != LOCAL:
        states = predictor.embed([prompts[i] for i in rows], weighting.encoder)[weighting.representation]
    alphas: dict[int, torch.Tensor] = {}
    for client in item.clients:
        alphas[client] = predictor.weights(client_models[client], [prompts[i] for i in rows], states)
        if predictor.partitioned:  # whether a weight is 0 decides on collectives: one rank decides
            world.broadcast_(alphas[client])

    def answer(client: ClientModel | None, chosen: list[int]) -> dict[int, str]:
        mine = chosen[world.rank :: world.world_size] if predictor.partitioned else chosen
        computed = mine or chosen[:1]  # a rank with nothing to do takes part in the collectives
        weights = alphas[client.info.client] if client else torch.zeros(len(rows))
        texts = predictor.answer(client, [prompts[i] for i in computed], weights[[position[i] for i in computed]])
        return dict(zip(mine, texts, strict=False))

    def batch(client: ClientModel | None, owners: Sequence[int], chosen: list[int]) -> list[Answer]:
        """Answers to the instances `chosen`, which count for each of `owners` that wants them with such a weight."""
        texts = answer(client, chosen) if chosen else {}
        return [
            Answer(owner, instances[i].task, instances[i].row, weight(owner, i), text)
            for owner in owners
            for i, text in texts.items()
            if i in wanted[owner] and (weight(owner, i) == 0) == (client is None)
        ]

    def weight(client: int, i: int) -> float:
        return float(alphas[client][position[i]])

    yield batch(
        None, item.clients, [i for i in rows if any(i in wanted[c] and weight(c, i) == 0 for c in item.clients)]
    )
    for c in item.clients:
        yield batch(client_models[c], [c], [i for i in wanted[c] if weight(c, i) != 0])
