"""The work of an evaluation in items: how it is divided, and how a rank group answers one item.

Two laws keep it cheap and safe. An instance whose weight is 0 for several clients is answered once, by the global
adapter alone, and the answer counts for all of them. Ranks that share one partitioned base divide every batch among
them, and each takes part in every forward pass, also where it has nothing of its own to answer.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch

from dpa_ds.adapters.methods import LOCAL
from dpa_ds.config.schema import GenerationConfig
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answers import Answer, AnswerKey, Instance, keys_of
from dpa_ds.inference.client_model import ClientModel, Predictor
from dpa_ds.inference.embedding import batches

WORK_ITEMS_PER_GROUP = 4
"""Fewest work items for each group, where there is work for so many: a slow group then takes fewer than a fast one."""


@dataclass(frozen=True)
class WorkItem:
    """A batch of instances of one task, to be answered by some of the clients."""

    instances: tuple[int, ...]
    """Positions in `EvaluationSet.instances`."""
    clients: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """Every client is to answer every instance."""

    instances: Sequence[Instance]
    prompts: Sequence[Sequence[int]]
    """Tokens of each instance's prompt."""
    client_models: Mapping[int, ClientModel]
    """Client id -> its model."""

    @property
    def keys(self) -> set[AnswerKey]:
        """Keys of all answers that the evaluation needs."""
        return keys_of(self.client_models, self.instances)

    def plan(self, generation: GenerationConfig, num_groups: int) -> list[WorkItem]:
        """`plan_work_items` of all instances and clients."""
        lengths = [len(prompt) for prompt in self.prompts]
        return plan_work_items(self.instances, lengths, list(self.client_models), generation, num_groups)


def plan_work_items(
    instances: Sequence[Instance],
    lengths: Sequence[int],
    clients: Sequence[int],
    generation: GenerationConfig,
    num_groups: int,
) -> list[WorkItem]:
    """All work items, in a fixed order; a pure function of its arguments.

    A batch keeps to one task, whose prompts and answers are of similar length, and to `generation.batch_tokens` of
    prompt and answer over all beams. One item has all clients, so that its prompts are embedded once for all of them,
    unless there would be too few items for the groups.

    Args:
        lengths: tokens of each instance's prompt.
    """
    token_budget = generation.batch_tokens // generation.num_beams
    chunks: list[tuple[int, ...]] = []
    for rows in _rows_by_task(instances).values():
        padded_lengths = [lengths[row] + generation.max_new_tokens for row in rows]
        for batch in batches(padded_lengths, token_budget):
            chunks.append(tuple(rows[position] for position in batch))
    # Clients are divided only as far as there would be too few chunks to keep all groups busy.
    fewest_items = WORK_ITEMS_PER_GROUP * num_groups
    num_blocks = min(len(clients), math.ceil(fewest_items / max(1, len(chunks))))
    block_size = math.ceil(len(clients) / num_blocks)
    items = []
    for chunk in chunks:
        for start in range(0, len(clients), block_size):
            items.append(WorkItem(chunk, tuple(clients[start : start + block_size])))
    return items


def answer_work_item(
    item: WorkItem,
    evaluation_set: EvaluationSet,
    predictor: Predictor,
    world: World,
    done: Set[AnswerKey],
) -> Iterator[list[Answer]]:
    """Answer what of `item` is not in `done`; yields each batch of answers as soon as it is there.

    A rank yields its own share of every batch. Collective: all ranks of the group.
    """
    missing = _find_missing(item, evaluation_set, done)
    rows = sorted(set().union(*missing.values()))
    if not rows:
        return
    alphas = _compute_alphas(item.clients, rows, evaluation_set, predictor, world)
    unanswered = _Unanswered(missing, alphas)

    # With weight 0 the client does not matter: one answer for all that need it.
    shared_rows = unanswered.shared_rows()
    texts = _generate(evaluation_set, predictor, world, None, shared_rows, dict.fromkeys(shared_rows, 0.0))
    yield unanswered.shared_answers(texts, evaluation_set.instances)
    for client in item.clients:
        own_rows = unanswered.own_rows(client)
        texts = _generate(evaluation_set, predictor, world, client, own_rows, alphas[client])
        yield unanswered.own_answers(client, texts, evaluation_set.instances)


@dataclass(frozen=True)
class _Unanswered:
    """What of a work item is still to be answered, and with which weights. Rows are positions of instances."""

    missing: Mapping[int, Sequence[int]]
    """Client -> the rows that it has not answered yet, in the order of the item."""
    alphas: Mapping[int, Mapping[int, float]]
    """Client -> row -> weight of its local adapter."""

    def shared_rows(self) -> list[int]:
        """Rows that at least one client answers with weight 0, ascending: the global adapter answers for them all."""
        shared = set()
        for client, rows in self.missing.items():
            for row in rows:
                if self.alphas[client][row] == 0:
                    shared.add(row)
        return sorted(shared)

    def own_rows(self, client: int) -> list[int]:
        """Rows that `client` answers with its local adapter in the mix."""
        return [row for row in self.missing[client] if self.alphas[client][row] != 0]

    def shared_answers(self, texts: Mapping[int, str], instances: Sequence[Instance]) -> list[Answer]:
        """The global adapter's `texts` by row, as the answer of each client that needs it."""
        answers = []
        for client, rows in self.missing.items():
            for row, text in texts.items():
                if row in rows and self.alphas[client][row] == 0:
                    answers.append(self._answer(client, row, text, instances))
        return answers

    def own_answers(self, client: int, texts: Mapping[int, str], instances: Sequence[Instance]) -> list[Answer]:
        """The client's own `texts` by row, as its answers."""
        return [self._answer(client, row, text, instances) for row, text in texts.items()]

    def _answer(self, client: int, row: int, text: str, instances: Sequence[Instance]) -> Answer:
        instance = instances[row]
        return Answer(client, instance.task, instance.row, self.alphas[client][row], text)


def _rows_by_task(instances: Sequence[Instance]) -> dict[str, list[int]]:
    rows = defaultdict(list)
    for row, instance in enumerate(instances):
        rows[instance.task].append(row)
    return rows


def _find_missing(item: WorkItem, evaluation_set: EvaluationSet, done: Set[AnswerKey]) -> dict[int, list[int]]:
    """Client -> the rows of `item` that are not in `done`, in the order of the item."""
    missing: dict[int, list[int]] = {}
    for client in item.clients:
        missing[client] = []
        for row in item.instances:
            if evaluation_set.instances[row].key_for(client) not in done:
                missing[client].append(row)
    return missing


def _compute_alphas(
    clients: Sequence[int], rows: Sequence[int], evaluation_set: EvaluationSet, predictor: Predictor, world: World
) -> dict[int, dict[int, float]]:
    """Client -> row -> weight of the local adapter. Collective: all ranks of the group."""
    prompts = [evaluation_set.prompts[row] for row in rows]
    weighting = predictor.weighting
    embeddings = None
    if not weighting.is_constant and weighting.encoder != LOCAL:
        # Without the local adapter the embeddings are the same for every client: computed once for all of them.
        embeddings = predictor.embed(prompts, weighting.encoder)[weighting.representation]
    alphas = {}
    for client in clients:
        weights = predictor.weights(evaluation_set.client_models[client], prompts, embeddings)
        # Whether a weight is 0 decides which collectives follow: the leader's bits count on every rank.
        world.broadcast_(weights)
        alphas[client] = dict(zip(rows, weights.tolist(), strict=True))
    return alphas


def _generate(
    evaluation_set: EvaluationSet,
    predictor: Predictor,
    world: World,
    client: int | None,
    rows: Sequence[int],
    alphas: Mapping[int, float],
) -> dict[int, str]:
    """Row -> text of this rank's share of `rows`, answered by `client`; None: by the global adapter alone."""
    if not rows:
        return {}
    client_model = None
    if client is not None:
        client_model = evaluation_set.client_models[client]
    share = rows[world.rank :: world.world_size]
    # A rank without a share computes the first row and drops it: its group gathers the weights with it.
    computed = share or rows[:1]
    prompts = [evaluation_set.prompts[row] for row in computed]
    weights = torch.tensor([alphas[row] for row in computed])
    texts = predictor.answer(client_model, prompts, weights)
    return dict(zip(share, texts, strict=False))
