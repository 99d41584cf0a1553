"""Work items: every answer is given once, a weight of 0 costs one answer for all clients, and ranks stay in step."""

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.config.schema import GenerationConfig
from dpa_ds.evaluation.answers import Answer, AnswerKey, Instance
from dpa_ds.evaluation.work_items import (
    WORK_ITEMS_PER_GROUP,
    EvaluationSet,
    WorkItem,
    answer_work_item,
    plan_work_items,
)


class FakePredictor:
    """Answers with the name of who answers; keeps what it was asked for."""

    def __init__(self, alphas: dict[int, dict[int, float]], encoder: str = "none") -> None:
        self.alphas = alphas
        self.weighting = SimpleNamespace(is_constant=False, encoder=encoder, representation="mean")
        self.calls: list[tuple[str, int | None]] = []
        self.computed: list[tuple[int | None, int]] = []

    def embed(self, prompts: Sequence[Sequence[int]], encoder: str) -> dict[str, Any]:
        self.calls.append(("embed", None))
        return {"mean": torch.zeros(len(prompts), 1)}

    def weights(self, client: Any, prompts: Sequence[Sequence[int]], embeddings: Any) -> torch.Tensor:
        self.calls.append(("weights", client.info.client))
        return torch.tensor([self.alphas[client.info.client][row] for (row,) in prompts])

    def answer(self, client: Any, prompts: Sequence[Sequence[int]], alphas: torch.Tensor) -> list[str]:
        number = None if client is None else client.info.client
        self.calls.append(("answer", number))
        rows = [row for (row,) in prompts]
        self.computed += [(number, row) for row in rows]
        expected = [0.0 if number is None else self.alphas[number][row] for row in rows]
        assert alphas.tolist() == pytest.approx(expected)
        return [f"{number} {row}" for row in rows]


ALPHAS = st.sampled_from([0.0, 0.0, 0.25, 1.0])


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_every_missing_answer_is_given_once_by_the_right_adapter(
    data: st.DataObject, num_ranks: int, num_clients: int, num_rows: int
) -> None:
    instances = [Instance("task", row, f"question {row}", "") for row in range(num_rows)]
    alphas = {c: {row: data.draw(ALPHAS) for row in range(num_rows)} for c in range(num_clients)}
    models: Any = {c: SimpleNamespace(info=SimpleNamespace(client=c)) for c in range(num_clients)}
    evaluation_set = EvaluationSet(instances, [[row] for row in range(num_rows)], models)
    done = data.draw(st.sets(st.sampled_from(sorted(evaluation_set.keys))))
    order = data.draw(st.permutations(range(num_rows)))
    item = WorkItem(tuple(order), tuple(range(num_clients)))
    answers: list[Answer] = []
    predictors = []
    for rank in range(num_ranks):
        world: Any = SimpleNamespace(rank=rank, world_size=num_ranks, broadcast_=lambda weights: weights)
        predictor: Any = FakePredictor(alphas)
        predictors.append(predictor)
        for batch in answer_work_item(item, evaluation_set, predictor, world, done):
            answers += batch

    missing = evaluation_set.keys - done
    assert Counter(answer.key for answer in answers) == Counter(missing)
    for answer in answers:
        alpha = alphas[answer.client][answer.row]
        assert answer.alpha == alpha
        assert answer.text == f"{None if alpha == 0 else answer.client} {answer.row}"
    assert all(predictor.calls == predictors[0].calls for predictor in predictors), "a rank left the collectives"
    shared = {row for client, _, row in missing if alphas[client][row] == 0}
    by_global = Counter(row for number, row in predictors[0].computed if number is None)
    if num_ranks == 1:
        assert by_global == Counter(shared), "once for all clients"
    assert len(predictors[0].calls) <= 2 + 2 * num_clients


@pytest.mark.parametrize(("encoder", "times"), [("none", 1), ("global", 1), ("local", 0)])
def test_embeddings_without_the_local_adapter_are_computed_once_for_all_clients(encoder: str, times: int) -> None:
    models: Any = {c: SimpleNamespace(info=SimpleNamespace(client=c)) for c in range(3)}
    evaluation_set = EvaluationSet([Instance("task", 0, "", "")], [[0]], models)
    predictor: Any = FakePredictor({c: {0: 1.0} for c in range(3)}, encoder)
    world: Any = SimpleNamespace(rank=0, world_size=1, broadcast_=lambda weights: weights)
    list(answer_work_item(WorkItem((0,), (0, 1, 2)), evaluation_set, predictor, world, set()))
    assert predictor.calls.count(("embed", None)) == times


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 300),
    st.integers(1, 5),
)
def test_items_cover_all_pairs_once_within_the_budget(
    rows: list[tuple[str, int]], num_clients: int, batch_tokens: int, num_groups: int
) -> None:
    instances = [Instance(task, place, "", "") for place, (task, _) in enumerate(rows)]
    lengths = [length for _, length in rows]
    generation = GenerationConfig(num_beams=2, max_new_tokens=5, batch_tokens=batch_tokens)
    items = plan_work_items(instances, lengths, list(range(num_clients)), generation, num_groups)
    pairs = Counter((client, row) for item in items for client in item.clients for row in item.instances)
    assert pairs == Counter((client, row) for client in range(num_clients) for row in range(len(rows)))
    for item in items:
        assert len({instances[row].task for row in item.instances}) == 1
        longest = max(lengths[row] for row in item.instances) + 5
        assert len(item.instances) == 1 or 2 * longest * len(item.instances) <= batch_tokens
    num_chunks = len({item.instances for item in items})
    assert len(items) >= min(WORK_ITEMS_PER_GROUP * num_groups, num_chunks * math.ceil(num_clients / 2))


def test_with_enough_chunks_an_item_has_all_clients() -> None:
    instances = [Instance("task", row, "", "") for row in range(8)]
    generation = GenerationConfig(num_beams=1, max_new_tokens=1, batch_tokens=1)
    items = plan_work_items(instances, [3] * 8, [4, 5, 6], generation, num_groups=2)
    assert [item.clients for item in items] == [(4, 5, 6)] * 8


def test_an_item_that_is_answered_costs_nothing() -> None:
    models: Any = {0: SimpleNamespace(info=SimpleNamespace(client=0))}
    evaluation_set = EvaluationSet([Instance("task", 0, "", "")], [[0]], models)
    predictor: Any = FakePredictor({0: {0: 0.5}})
    world: Any = SimpleNamespace(rank=0, world_size=1)
    done = {AnswerKey(0, "task", 0)}
    assert list(answer_work_item(WorkItem((0,), (0,)), evaluation_set, predictor, world, done)) == []
    assert predictor.calls == []
