"""Means equal plain loops, intervals have the width they must have, and a comparison sees what it should."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.metrics import METRICS, best_floor, score_answer
from dpa_ds.evaluation.statistics import (
    NUM_RESAMPLES,
    Cell,
    FloatArray,
    Quantity,
    ScoreTable,
    oracle,
    over_seeds,
    paired_difference,
    summarize,
)

QUANTITIES: tuple[Quantity, ...] = ("P", "TTP", "UNSEEN")
EXAMPLE_KEYS = ["task", "row", "instruction", "reference", "client", "answer", "alpha", "rouge1"]
CLIENTS = (ClientInfo(0, "first", ("a",)), ClientInfo(1, "second", ("b",)), ClientInfo(5, "third", ("a", "c")))


def column(values: Sequence[float] | FloatArray) -> FloatArray:
    """(num instances, len(METRICS)): the same values for every metric."""
    return np.repeat(np.asarray(values, dtype=np.float64)[:, None], len(METRICS), axis=1)


def random_table(seed: int, num_instances: int = 40, clients: Sequence[ClientInfo] = CLIENTS) -> ScoreTable:
    """Every client on the tasks a to d, d unseen; scores 0 or 100."""
    generator = np.random.default_rng(seed)
    cells = {
        (client.client, task): column(100.0 * (generator.random(num_instances) < 0.7))
        for client in clients
        for task in "abcd"
    }
    return ScoreTable(tuple(clients), cells)


def evaluation(num_rows: int = 4) -> tuple[list[Instance], list[Answer]]:
    """The tasks a to d with yes and no as references, and answers of every client, about half of them right."""
    generator = np.random.default_rng(7)
    instances = [
        Instance(task, row, f"{task} {row}?\nOPTIONS:\n- yes\n- no", "no" if row % 3 else "yes")
        for task in "abcd"
        for row in range(num_rows)
    ]
    answers = [
        Answer(client.client, i.task, i.row, float(generator.random()), str(generator.choice(["yes", "no", "no idea"])))
        for i in instances
        for client in CLIENTS
    ]
    return instances, answers


def plain_value(table: ScoreTable, quantity: str, metric: int, only: int | None = None) -> float | None:
    """P, TTP or UNSEEN by loops; of one client, or over all."""
    seen = [task for client in table.clients for task in client.own_tasks]
    of_clients = []
    for client in table.clients:
        means = []
        for (owner, task), scores in table.cells.items():
            counts = {"P": task in client.own_tasks, "TTP": task in seen, "UNSEEN": task not in seen}[quantity]
            if owner == client.client and counts and only in (None, owner):
                means.append(sum(row[metric] for row in scores.tolist()) / len(scores))
        if means:
            of_clients.append(sum(means) / len(means))
    return sum(of_clients) / len(of_clients) if of_clients else None


@settings(deadline=None)
@given(
    kept=st.sets(st.sampled_from([(c.client, t) for c in CLIENTS for t in "abcd"])),
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_quantities_equal_plain_loops_whatever_cells_are_missing(kept: set[Cell], sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_instances = dict(zip("abcd", sizes, strict=True))
    table = ScoreTable(CLIENTS, {cell: 100 * generator.random((num_instances[cell[1]], len(METRICS))) for cell in kept})
    for quantity in QUANTITIES:
        for only in (None, *(client.client for client in CLIENTS)):
            value = table.overall(quantity) if only is None else table.of_client(quantity, only)
            for position, metric in enumerate(METRICS):
                plain = plain_value(table, quantity, position, only)
                assert (None if value is None else value[metric]) == (None if plain is None else pytest.approx(plain))


def test_unseen_tasks_count_for_unseen_only() -> None:
    table = random_table(0)
    changed = ScoreTable(CLIENTS, {cell: scores * (cell[1] != "d") for cell, scores in table.cells.items()})
    assert (table.overall("P"), table.overall("TTP")) == (changed.overall("P"), changed.overall("TTP"))
    assert changed.overall("UNSEEN") == dict.fromkeys(METRICS, 0)
    # A client without answers still makes its task a seen one.
    more = replace(table, clients=(*CLIENTS, ClientInfo(6, "absent", ("d",))))
    assert more.overall("UNSEEN") is None
    assert more.overall("TTP") != table.overall("TTP")


def test_the_table_scores_the_answers_in_any_order() -> None:
    instances, answers = evaluation()
    table = ScoreTable.build(instances, answers, CLIENTS)
    shuffled = ScoreTable.build(instances[::-1], answers[::-1], CLIENTS)
    assert len(table.cells) == 12
    for cell, scores in table.cells.items():
        assert (shuffled.cells[cell] == scores[::-1]).all()
    text = next(a.text for a in answers if (a.client, a.task, a.row) == (5, "c", 2))
    assert dict(zip(METRICS, table.cells[5, "c"][2].tolist(), strict=True)) == score_answer(text, "no")


@pytest.mark.parametrize("fault", ["missing", "twice", "no instance", "no client", "task without instances"])
def test_faults_of_the_caller_are_asserted(fault: str) -> None:
    instances, answers = evaluation()
    match fault:
        case "missing":
            answers = answers[1:]
        case "twice":
            answers = [*answers, answers[0]]
        case "no instance":
            answers = [*answers, replace(answers[0], row=99)]
        case "no client":
            answers = [replace(answer, client=answer.client + 1) for answer in answers]
        case "task without instances":
            answers = [*answers, replace(answers[0], task="e")]
    with pytest.raises(AssertionError):
        ScoreTable.build(instances, answers, CLIENTS)


def test_interval_of_a_binary_task_has_the_known_width() -> None:
    scores = column([100] * 140 + [0] * 60)
    means = ScoreTable((ClientInfo(0, "c", ("a",)),), {(0, "a"): scores}).resampled_means(seed=0)[0, "a"]
    assert means.shape == (1 + NUM_RESAMPLES, len(METRICS))
    assert means[0].tolist() == [70] * len(METRICS)
    standard_error = 100 * np.sqrt(0.7 * 0.3 / 200)
    assert standard_error == pytest.approx(3.24, abs=0.01)
    assert means[1:, 0].std() == pytest.approx(standard_error, rel=0.06)
    low, high = np.percentile(means[1:, 0], (2.5, 97.5))
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)
    assert (low + high) / 2 == pytest.approx(70, abs=0.5)


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(3)
    tasks = tuple(f"task {k}" for k in range(100))
    cells = {(0, task): column(100.0 * (generator.random(80) < 0.7)) for task in tasks}
    means = ScoreTable((ClientInfo(0, "c", tasks),), cells).resampled_means(seed=0)
    ends = [np.percentile(means[cell][1:, 0], (2.5, 97.5)) for cell in cells]
    # 95 of 100 expected, with a standard deviation of 2.2.
    assert sum(low <= 70 <= high for low, high in ends) >= 88


def standard_error(table: ScoreTable, quantity: Quantity) -> float:
    average = table.average(quantity, table.resampled_means(seed=0))
    assert average is not None
    return float(average[1:, 0].std())


def test_clients_that_agree_are_no_further_evidence() -> None:
    one = random_table(1, 200, [ClientInfo(0, "c", ("a",))])
    infos = tuple(ClientInfo(k, "c", ("a",)) for k in range(8))
    same = ScoreTable(infos, {(k, task): scores for k in range(8) for (_, task), scores in one.cells.items()})
    assert standard_error(same, "P") == pytest.approx(standard_error(one, "P"))
    assert standard_error(same, "TTP") == pytest.approx(standard_error(one, "TTP"))
    # Clients that err on different instances are: here by sqrt(8).
    apart = random_table(1, 200, infos)
    assert standard_error(apart, "P") == pytest.approx(standard_error(one, "P") / np.sqrt(8), rel=0.15)


def test_tasks_are_resampled_apart_and_repeatably() -> None:
    table = random_table(1)
    same_scores = ScoreTable(CLIENTS, dict.fromkeys(table.cells, table.cells[0, "a"]))
    means = same_scores.resampled_means(seed=0)
    assert (means[0, "a"] == means[5, "a"]).all()
    assert not (means[0, "a"] == means[0, "b"]).all()
    part = ScoreTable(CLIENTS, {(5, "a"): table.cells[5, "a"]})
    assert part.resampled_means(seed=0)[5, "a"] == pytest.approx(table.resampled_means(seed=0)[5, "a"])
    assert not (part.resampled_means(seed=1)[5, "a"] == part.resampled_means(seed=0)[5, "a"]).all()


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_run_does_not_differ_from_itself(quantity: Quantity) -> None:
    tables = [random_table(seed) for seed in (1, 2, 3)]
    for seeds in (tables, tables[:1]):
        assert paired_difference(seeds, seeds, quantity) == {"mean": 0, "low": 0, "high": 0}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_a_constant_shift_is_certain(num_seeds: int) -> None:
    tables = [random_table(seed) for seed in range(num_seeds)]
    shifted = [ScoreTable(t.clients, {cell: scores + 2.5 for cell, scores in t.cells.items()}) for t in tables]
    for quantity in QUANTITIES:
        difference = paired_difference(shifted, tables, quantity)
        assert list(difference.values()) == pytest.approx([2.5] * 3)
        assert list(paired_difference(tables, shifted, quantity).values()) == pytest.approx([-2.5] * 3)


def test_paired_difference_of_independent_runs() -> None:
    infos = (ClientInfo(0, "c", ("a", "b", "c", "d")),)
    ours, theirs = random_table(1, 200, infos), random_table(2, 200, infos)
    difference = paired_difference([ours], [theirs], "P", metric="chrf")
    plain = np.mean([ours.cells[cell].mean() - theirs.cells[cell].mean() for cell in ours.cells])
    assert difference["mean"] == pytest.approx(plain)
    variance = sum((ours.cells[cell] - theirs.cells[cell])[:, 0].var() / 200 for cell in ours.cells) / 4**2
    assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.08)
    again = paired_difference([ours], [theirs], "P", metric="chrf", seed=0)
    assert again == difference
    assert paired_difference([ours], [theirs], "P", metric="chrf", seed=1) != difference


def test_metrics_are_compared_each_by_its_own_column() -> None:
    table = random_table(0)
    for position, metric in enumerate(METRICS):
        shift = np.zeros(len(METRICS))
        shift[position] = 1
        shifted = ScoreTable(table.clients, {cell: scores + shift for cell, scores in table.cells.items()})
        assert paired_difference([shifted], [table], "TTP", metric)["mean"] == pytest.approx(1)


def test_seeds_that_disagree_widen_the_interval() -> None:
    table = random_table(0)

    def shifted(shift: float) -> ScoreTable:
        return ScoreTable(table.clients, {cell: scores + shift for cell, scores in table.cells.items()})

    difference = paired_difference([shifted(1), shifted(2), shifted(6)], [table] * 3, "TTP")
    assert difference["mean"] == pytest.approx(3)
    assert difference["low"] == pytest.approx(1)
    assert difference["high"] == pytest.approx(6)


def test_a_baseline_may_have_other_clients() -> None:
    ours = random_table(0)
    centralized = ScoreTable((ClientInfo(0, "all", ("a", "b", "c")),), {(0, t): ours.cells[0, t] for t in "abcd"})
    values = ours.overall("TTP"), centralized.overall("TTP")
    assert values[0] is not None
    assert values[1] is not None
    difference = paired_difference([ours], [centralized], "TTP")
    assert difference["mean"] == pytest.approx(values[0]["rouge1"] - values[1]["rouge1"])


def test_runs_that_cannot_be_compared() -> None:
    table, longer = random_table(0), random_table(0, 41)
    unseen = ScoreTable(CLIENTS, {(0, "d"): table.cells[0, "d"]})
    for ours, theirs in (([table], [longer]), ([table], [unseen]), ([table], []), ([], []), ([unseen], [unseen])):
        with pytest.raises(AssertionError):
            paired_difference(ours, theirs, "P")


def test_over_seeds() -> None:
    assert over_seeds([3.0]) == {"mean": 3, "standard_error": None}
    assert over_seeds([1.0, 3.0]) == {"mean": 2, "standard_error": pytest.approx(1)}
    assert over_seeds([2.0, 2.0, 2.0]) == {"mean": 2, "standard_error": 0}


def test_the_oracle_is_at_least_as_good_as_each() -> None:
    tables = {name: random_table(seed) for seed, name in enumerate(["global", "local", "mixed"])}
    best = oracle(list(tables.values()))
    for cell, scores in best.cells.items():
        means = [table.cells[cell][:, 0].mean() for table in tables.values()]
        assert scores[:, 0].mean() == max(means)
        assert any(scores is table.cells[cell] for table in tables.values())
    for quantity in QUANTITIES:
        of_oracle = best.overall(quantity)
        assert of_oracle is not None
        for table in tables.values():
            value = table.overall(quantity)
            assert value is not None
            assert of_oracle["rouge1"] >= value["rouge1"]
    assert oracle([tables["local"]]).overall("TTP") == tables["local"].overall("TTP")
    for other in (random_table(0, 41), ScoreTable(CLIENTS[:1], {(0, "a"): tables["local"].cells[0, "a"]})):
        with pytest.raises(AssertionError):
            oracle([tables["local"], other])


def test_summary_of_a_whole_evaluation() -> None:
    instances, answers = evaluation()
    summary = summarize(instances, answers, CLIENTS)
    table = ScoreTable.build(instances, answers, CLIENTS)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary == summarize(instances, answers[::-1], CLIENTS)
    assert summary["metrics"] == list(METRICS)
    assert (summary["num_answers"], summary["num_instances"]) == (48, 16)
    assert [(t["task"], t["num_instances"], t["clients"], t["constant_answer"]) for t in summary["tasks"]] == [
        ("a", 4, [0, 5], "yes"),
        ("b", 4, [1], "yes"),
        ("c", 4, [5], "yes"),
        ("d", 4, [], "yes"),
    ]
    assert summary["tasks"][0]["floors"].keys() == {"constant", "copy", "first_option"}
    for client, info in zip(summary["clients"], CLIENTS, strict=True):
        assert (client["client"], client["label"], client["own_tasks"]) == (info.client, info.label, [*info.own_tasks])
        assert list(client["scores"]) == list(client["alpha"]) == list("abcd")
        for task, scores in client["scores"].items():
            means = table.cells[info.client, task].mean(axis=0).tolist()
            assert [scores[metric]["mean"] for metric in METRICS] == pytest.approx(means)
            assert all(-1e-9 <= s["low"] <= s["mean"] + 1e-9 <= s["high"] + 2e-9 for s in scores.values())
            alphas = sorted(a.alpha for a in answers if (a.client, a.task) == (info.client, task))
            alpha = client["alpha"][task]
            assert list(alpha) == ["mean", "min", "q10", "median", "q90", "max"]
            assert (alpha["min"], alpha["max"], alpha["mean"]) == pytest.approx(
                (alphas[0], alphas[-1], sum(alphas) / 4)
            )
            assert alpha["min"] <= alpha["q10"] <= alpha["median"] <= alpha["q90"] <= alpha["max"]
        for quantity in QUANTITIES:
            assert client[quantity] == table.of_client(quantity, info.client)
    for quantity in QUANTITIES:
        value = table.overall(quantity)
        assert {metric: of["mean"] for metric, of in summary[quantity].items()} == pytest.approx(value)
        for of in summary[quantity].values():
            assert list(of) == ["mean", "low", "high", "standard_error"]
            assert of["low"] - 1e-9 <= of["mean"] <= of["high"] + 1e-9
            assert of["high"] - of["low"] == pytest.approx(2 * 1.96 * of["standard_error"], rel=0.25, abs=1e-9)


def test_floors_are_averaged_as_the_scores_are() -> None:
    instances, answers = evaluation()
    instances = [replace(i, reference=f"{i.task} {i.row}") if i.task == "c" else i for i in instances]
    summary = summarize(instances, answers, CLIENTS)
    best = {task["task"]: best_floor(task["floors"])["rouge1"] for task in summary["tasks"]}
    assert best["c"] > 20
    assert summary["floors"]["P"]["rouge1"] == pytest.approx((best["a"] + best["b"] + (best["a"] + best["c"]) / 2) / 3)
    assert summary["floors"]["TTP"]["rouge1"] == pytest.approx((best["a"] + best["b"] + best["c"]) / 3)


def test_summary_of_some_clients_and_tasks() -> None:
    instances, answers = evaluation()
    kept = [a for a in answers if (a.client, a.task) in {(0, "a"), (0, "d"), (1, "a")}]
    summary = summarize([i for i in instances if i.task in "ad"], kept, CLIENTS)
    json.dumps(summary, allow_nan=False)
    first, second = summary["clients"]
    assert (list(first["scores"]), list(second["scores"])) == (["a", "d"], ["a"])
    assert (second["P"], second["UNSEEN"]) == (None, None)
    assert first["P"] == first["TTP"]
    assert {metric: of["mean"] for metric, of in summary["P"].items()} == pytest.approx(first["P"])
    only_unseen = summarize([i for i in instances if i.task == "d"], [a for a in kept if a.task == "d"], CLIENTS)
    assert (only_unseen["P"], only_unseen["TTP"], only_unseen["floors"]) == (None, None, {"P": None, "TTP": None})
    assert only_unseen["UNSEEN"] is not None


def examples_of(summary: dict[str, Any], kind: str) -> list[tuple[str, int]]:
    return [(example["task"], example["row"]) for example in summary["examples"][kind]]


def test_examples_are_spread_over_tasks_and_instances() -> None:
    instances, answers = evaluation()
    summary = summarize(instances, answers, CLIENTS, num_examples=5)
    for kind, sign in (("best", -1), ("worst", 1)):
        shown = summary["examples"][kind]
        assert len(shown) == len(set(examples_of(summary, kind))) == 5
        assert max(examples_of(summary, kind).count((t, r)) for t in "abcd" for r in range(4)) == 1
        assert max(sum(task == t for task, _ in examples_of(summary, kind)) for t in "abcd") <= 2
        scores = [sign * example["rouge1"] for example in shown]
        assert scores == sorted(scores)
        for example in shown:
            assert list(example) == EXAMPLE_KEYS
            assert example["rouge1"] == score_answer(example["answer"], example["reference"])["rouge1"]
            given = next(a for a in answers if a.key == (example["client"], example["task"], example["row"]))
            assert (example["answer"], example["alpha"]) == (given.text, given.alpha)
    assert {example["rouge1"] for example in summary["examples"]["best"]} == {100}
    assert {example["rouge1"] for example in summary["examples"]["worst"]} == {0}


def test_one_task_does_not_fill_the_examples() -> None:
    instances, answers = evaluation(num_rows=6)
    answers = [replace(a, text="" if a.task == "a" else "no idea but no") for a in answers]
    summary = summarize(instances, answers, CLIENTS, num_examples=4)
    assert sorted(task for task, _ in examples_of(summary, "worst")) == list("abcd")
    assert [task for task, _ in examples_of(summarize(instances, answers, CLIENTS), "worst")].count("a") == 2


def test_examples_of_one_task_and_of_none() -> None:
    instances, answers = evaluation()
    one = summarize([i for i in instances if i.task == "a"], [a for a in answers if a.task == "a"], CLIENTS)
    assert sorted(examples_of(one, "best")) == [("a", row) for row in range(4)]
    assert summarize(instances, answers, CLIENTS, num_examples=0)["examples"] == {"best": [], "worst": []}
