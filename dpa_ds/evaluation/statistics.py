"""What the answers of an evaluation amount to: scores with intervals, floors beside them, and comparisons of runs.

An interval is a 95 % percentile interval of the bootstrap over instances, drawn within each task. All clients answer
the same instances, so one draw holds for all of them: what is hard for one client is hard for the others, and drawing
for each client apart would make the mean over clients look more certain than it is.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance
from dpa_ds.evaluation.metrics import METRICS, best_floor, describe_floors, score_answer

Quantity = Literal["P", "TTP", "UNSEEN"]
"""P: a client's own tasks. TTP: all tasks that some client of the run trained on. UNSEEN: the other tasks."""

Cell = tuple[int, str]
"""(client, task)."""

FloatArray = NDArray[np.float64]

NUM_RESAMPLES = 2000
"""Redrawing moves an end of an interval by 1.5 % of the width (standard deviation, normal case)."""

_INTERVAL = (2.5, 97.5)

# Bounds the memory of large test sets: 16 MB of weights for a task of 10,000 instances.
_RESAMPLES_AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of one run. A cell is there as a whole, or not at all where it was not evaluated."""

    clients: tuple[ClientInfo, ...]
    """All clients of the run, those without a cell too: their tasks are tasks of the run."""
    cells: Mapping[Cell, FloatArray]
    """(client, task) -> (num instances, len(METRICS)); row j of all cells of a task is the same instance."""

    def __post_init__(self) -> None:
        known, num_instances = {client.client for client in self.clients}, self.num_instances
        for (client, task), scores in self.cells.items():
            assert client in known, f"client {client} has scores, but no ClientInfo"
            expected = (num_instances[task], len(METRICS))
            assert scores.shape == expected, f"client {client}, task {task!r}: {scores.shape}, expected {expected}"

    @classmethod
    def build(
        cls, instances: Sequence[Instance], answers: Sequence[Answer], clients: Sequence[ClientInfo]
    ) -> "ScoreTable":
        """Score `answers`, given in any order; a client x task cell has one answer to each instance, or none at all."""
        texts: dict[Cell, dict[int, str]] = defaultdict(dict)
        for answer in answers:
            cell = texts[answer.client, answer.task]
            assert answer.row not in cell, f"two answers to {answer.key}"
            cell[answer.row] = answer.text
        by_task = _group_by_task(instances)
        cells = {}
        for (client, task), cell in sorted(texts.items()):
            rows = [instance.row for instance in by_task.get(task, [])]
            assert sorted(cell) == sorted(rows), f"client {client}, task {task!r}: not one answer to each instance"
            scores = [score_answer(cell[instance.row], instance.reference) for instance in by_task[task]]
            cells[client, task] = np.array([[score[metric] for metric in METRICS] for score in scores])
        return cls(tuple(clients), cells)

    @property
    def num_instances(self) -> dict[str, int]:
        """Evaluated task -> number of its instances."""
        return {task: scores.shape[0] for (_, task), scores in self.cells.items()}

    def draws(self, seed: int) -> dict[Cell, FloatArray]:
        """Cell -> (1 + NUM_RESAMPLES, len(METRICS)): mean over all instances, then means over resampled instances.

        A draw is the same for all clients of a task, and for all tables with as many instances of a task of that name.
        """
        result: dict[Cell, FloatArray] = {}
        for task, num_instances in self.num_instances.items():
            cells = [cell for cell in self.cells if cell[1] == task]
            scores = np.concatenate([self.cells[cell] for cell in cells], axis=1)
            resampled = [weights @ scores for weights in _instance_weights(seed, task, num_instances)]
            means = np.concatenate([scores.mean(axis=0, keepdims=True), *resampled])
            result.update(zip(cells, np.split(means, len(cells), axis=1), strict=True))
        return result

    def counted_cells(self, quantity: Quantity) -> dict[int, list[Cell]]:
        """Client -> its cells that count for `quantity`; clients without any are left out."""
        trained_on = {task for client in self.clients for task in client.own_tasks}
        counted: dict[int, list[Cell]] = {}
        for client in self.clients:
            match quantity:
                case "P":
                    tasks = set(client.own_tasks)
                case "TTP":
                    tasks = trained_on
                case "UNSEEN":
                    tasks = self.num_instances.keys() - trained_on
            cells = [cell for cell in self.cells if cell[0] == client.client and cell[1] in tasks]
            if cells:
                counted[client.client] = cells
        return counted

    def average(self, quantity: Quantity, values: Mapping[Cell, FloatArray]) -> FloatArray | None:
        """Mean over clients of the mean of `values` over the cells that count; None where there are none."""
        counted = self.counted_cells(quantity).values()
        by_client = [np.mean([values[cell] for cell in cells], axis=0) for cells in counted]
        return np.asarray(np.mean(by_client, axis=0)) if by_client else None

    def of_client(self, quantity: Quantity, client: int) -> dict[str, float] | None:
        """The quantity of one client per metric; None where none of the tasks was evaluated on it."""
        cells = self.counted_cells(quantity).get(client)
        return _by_metric(None if cells is None else np.mean([self.cells[cell].mean(axis=0) for cell in cells], axis=0))

    def overall(self, quantity: Quantity) -> dict[str, float] | None:
        """Mean of `of_client` per metric over the clients that have it; None where none has."""
        return _by_metric(self.average(quantity, {cell: scores.mean(axis=0) for cell, scores in self.cells.items()}))


def summarize(
    instances: Sequence[Instance],
    answers: Sequence[Answer],
    clients: Sequence[ClientInfo],
    num_examples: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """All that a report shows of one run, as JSON-able values; scores are in 0..100.

    `instances` and `answers` as in ScoreTable.build; `clients`: all clients of the run, of which those with answers are
    described. P, TTP and UNSEEN, of a client or overall, are None where none of their tasks was evaluated. `floors`:
    per metric the best of constant answer, copy and first option on each task, averaged as the scores are.
    """
    table = ScoreTable.build(instances, answers, clients)
    draws = table.draws(seed)
    tasks = [_describe_task(task, rows, clients) for task, rows in _group_by_task(instances).items()]
    floors = {task["task"]: np.array(list(best_floor(task["floors"]).values())) for task in tasks}
    floor_of_cell = {cell: floors[cell[1]] for cell in table.cells}
    return {
        "metrics": list(METRICS),
        "num_answers": len(answers),
        "num_instances": len(instances),
        "tasks": tasks,
        "clients": list(_describe_clients(table, draws, answers)),
        **{quantity: _describe_overall(table.average(quantity, draws)) for quantity in get_args(Quantity)},
        "floors": {quantity: _by_metric(table.average(quantity, floor_of_cell)) for quantity in ("P", "TTP")},
        "examples": _choose_examples(instances, answers, num_examples),
    }


def paired_difference(
    tables: Sequence[ScoreTable],
    baselines: Sequence[ScoreTable],
    quantity: Quantity,
    metric: str = "rouge1",
    seed: int = 0,
) -> dict[str, float]:
    """{"mean", "low", "high"} of `quantity` of a method minus that of a baseline, averaged over seeds.

    `tables[k]` and `baselines[k]` are runs with seed k; all were evaluated on the same instances. The interval resamples
    the instances within tasks, alike for all clients, seeds and both methods, and, where there are several, the seeds.
    Few seeds make it too narrow: of the seeds' standard error, two give sqrt(1/2), three sqrt(2/3).
    """
    assert len(tables) == len(baselines) > 0, f"{len(tables)} runs against {len(baselines)}"
    runs = [*tables, *baselines]
    assert all(run.num_instances == runs[0].num_instances for run in runs), "runs on different instances"
    averages = [run.average(quantity, run.draws(seed)) for run in runs]
    values = [average[:, METRICS.index(metric)] for average in averages if average is not None]
    assert len(values) == len(runs), f"a run without a task that counts for {quantity}"
    num_seeds = len(tables)
    differences = np.stack(values[:num_seeds]) - np.stack(values[num_seeds:])
    generator = np.random.Generator(np.random.PCG64([seed, num_seeds]))
    weights = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES) / num_seeds
    low, high = np.percentile((weights * differences[:, 1:].T).sum(axis=1), _INTERVAL).tolist()
    return {"mean": float(differences[:, 0].mean()), "low": low, "high": high}


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "standard_error"} of one value per seed; the standard error of the mean is None for one seed."""
    assert values
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}


def oracle(tables: Mapping[str, ScoreTable]) -> ScoreTable:
    """In each client x task cell the table with the higher mean rouge1, the first among equals.

    The ceiling of any rule that chooses between the tables by client and task. All have the same clients and cells.
    """
    layouts = [(table.clients, table.cells.keys(), table.num_instances) for table in tables.values()]
    assert all(layout == layouts[0] for layout in layouts), "tables of different cells"
    column = METRICS.index("rouge1")
    best = {
        cell: max((table.cells[cell] for table in tables.values()), key=lambda scores: float(scores[:, column].mean()))
        for cell in layouts[0][1]
    }
    return ScoreTable(layouts[0][0], best)


def _group_by_task(instances: Sequence[Instance]) -> dict[str, list[Instance]]:
    """Task -> its instances, both in the order of `instances`."""
    result: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        result[instance.task].append(instance)
    return dict(result)


def _instance_weights(seed: int, task: str, num_instances: int) -> Iterator[FloatArray]:
    """Blocks (_RESAMPLES_AT_ONCE, num_instances): in each row the shares of the instances in one draw with replacement."""
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode())]))
    shares = np.full(num_instances, 1 / num_instances)
    for _ in range(0, NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        yield generator.multinomial(num_instances, shares, _RESAMPLES_AT_ONCE) / num_instances


def _by_metric(values: FloatArray | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(METRICS, values.tolist(), strict=True))


def _describe_task(task: str, instances: Sequence[Instance], clients: Sequence[ClientInfo]) -> dict[str, Any]:
    trained = [client.client for client in clients if task in client.own_tasks]
    return {"task": task, "num_instances": len(instances), "clients": trained, **describe_floors(instances)}


def _describe_clients(
    table: ScoreTable, draws: Mapping[Cell, FloatArray], answers: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """One entry for each client that has answers."""
    alphas: dict[Cell, list[float]] = defaultdict(list)
    for answer in answers:
        alphas[answer.client, answer.task].append(answer.alpha)
    for info in table.clients:
        cells = [cell for cell in table.cells if cell[0] == info.client]
        if cells:
            yield {
                "client": info.client,
                "label": info.label,
                "own_tasks": list(info.own_tasks),
                "scores": {cell[1]: _intervals(draws[cell]) for cell in cells},
                "alpha": {cell[1]: _describe_alpha(sorted(alphas[cell])) for cell in cells},
                **{quantity: table.of_client(quantity, info.client) for quantity in get_args(Quantity)},
            }


def _describe_alpha(alphas: Sequence[float]) -> dict[str, float]:
    names = ("min", "q10", "median", "q90", "max")
    quantiles = np.quantile(alphas, (0.0, 0.1, 0.5, 0.9, 1.0)).tolist()
    return {"mean": float(np.mean(alphas)), **dict(zip(names, quantiles, strict=True))}


def _describe_overall(draws: FloatArray | None) -> dict[str, dict[str, float]] | None:
    if draws is None:
        return None
    errors = draws[1:].std(axis=0).tolist()
    intervals = _intervals(draws).items()
    return {m: {**interval, "standard_error": e} for (m, interval), e in zip(intervals, errors, strict=True)}


def _intervals(draws: FloatArray) -> dict[str, dict[str, float]]:
    """Per metric {"mean", "low", "high"} of what ScoreTable.draws returns for a cell."""
    low, high = np.percentile(draws[1:], _INTERVAL, axis=0).tolist()
    columns = zip(METRICS, draws[0].tolist(), low, high, strict=True)
    return {metric: {"mean": mean, "low": low, "high": high} for metric, mean, low, high in columns}


def _choose_examples(
    instances: Sequence[Instance], answers: Sequence[Answer], num_examples: int
) -> dict[str, list[dict[str, Any]]]:
    """The answers of highest and of lowest rouge1, each instance once, tasks in equal parts.

    Among equals the longer reference comes first: the right label of two is a poor example.
    """
    asked = {(instance.task, instance.row): instance for instance in instances}
    examples = []
    for answer in answers:
        instance = asked[answer.task, answer.row]
        said = {"client": answer.client, "answer": answer.text, "alpha": answer.alpha}
        rouge1 = score_answer(answer.text, instance.reference)["rouge1"]
        examples.append({**asdict(instance), **said, "rouge1": rouge1})
    examples.sort(key=lambda e: (-len(e["reference"]), e["task"], e["row"], e["client"]))
    return {
        "best": _spread(sorted(examples, key=lambda e: -e["rouge1"]), num_examples),
        "worst": _spread(sorted(examples, key=lambda e: e["rouge1"]), num_examples),
    }


def _spread(examples: Sequence[dict[str, Any]], num_examples: int) -> list[dict[str, Any]]:
    """The first `num_examples`, of an instance one, and of each task the same number, rounded up."""
    quota = -(-num_examples // max(1, len({e["task"] for e in examples})))
    chosen: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for example in examples:
        of_task = chosen[example["task"]]
        if len(of_task) < quota:
            of_task.setdefault(example["row"], example)
    return [e for e in examples if e is chosen[e["task"]].get(e["row"])][:num_examples]
