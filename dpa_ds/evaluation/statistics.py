"""What the answers of an evaluation amount to: scores with intervals, floors beside them, and comparisons of runs.

An interval is a 95 % percentile interval of the bootstrap over instances, which are resampled within each task. All
clients answer the same instances, so one resample holds for all of them: what is hard for one client is hard for the
others, and resampling for each client apart would make the mean over clients look more certain than it is.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dpa_ds.data.sources import ClientInfo
from dpa_ds.evaluation.answers import Answer, Instance, ScoredAnswer
from dpa_ds.evaluation.metrics import METRICS, best_floor, describe_floors, score_answer

Quantity = Literal["P", "TTP", "UNSEEN"]
"""P: a client's own tasks. TTP: all tasks that some client of the run trained on. UNSEEN: the other tasks."""

Cell = tuple[int, str]
"""(client, task)."""

FloatArray = NDArray[np.float64]

NUM_RESAMPLES = 2000
"""With other random numbers an end of an interval moves by 1.5 % of the width (standard deviation, normal case)."""

_INTERVAL = (2.5, 97.5)

# Bounds the memory of large test sets: 16 MB of shares for a task of 10,000 instances.
_RESAMPLES_AT_ONCE = 200


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of one run. A cell is there as a whole, or not at all where it was not evaluated."""

    clients: tuple[ClientInfo, ...]
    """All clients of the run, those without a cell too: their tasks are tasks of the run."""
    cells: Mapping[Cell, FloatArray]
    """(client, task) -> (num instances, len(METRICS)); row j of all cells of a task is the same instance."""

    def __post_init__(self) -> None:
        known = {client.client for client in self.clients}
        num_instances = self.num_instances
        for (client, task), scores in self.cells.items():
            assert client in known, f"client {client} has scores, but no ClientInfo"
            expected = (num_instances[task], len(METRICS))
            assert scores.shape == expected, f"client {client}, task {task!r}: {scores.shape}, expected {expected}"

    @classmethod
    def build(
        cls, instances: Sequence[Instance], answers: Sequence[Answer], clients: Sequence[ClientInfo]
    ) -> "ScoreTable":
        """Score `answers`, given in any order; a client x task cell has one answer to each instance, or none at all."""
        by_cell: dict[Cell, dict[int, Answer]] = defaultdict(dict)
        for answer in answers:
            by_row = by_cell[answer.client, answer.task]
            assert answer.row not in by_row, f"two answers to {answer.key}"
            by_row[answer.row] = answer
        by_task = _group_by_task(instances)
        cells = {}
        # Sorted: the order of the cells decides sums, and must not depend on which rank answered first.
        for (client, task), by_row in sorted(by_cell.items()):
            asked = by_task.get(task, [])
            # A part of a cell would be a score of other instances than the other clients'.
            is_whole = sorted(by_row) == sorted(instance.row for instance in asked)
            assert is_whole, f"client {client}, task {task!r}: not one answer to each instance"
            scores = []
            for instance in asked:
                scores.append(scores_of(by_row[instance.row], instance))
            cells[client, task] = np.array(scores)
        return cls(tuple(clients), cells)

    @property
    def num_instances(self) -> dict[str, int]:
        """Evaluated task -> number of its instances."""
        return {task: scores.shape[0] for (_, task), scores in self.cells.items()}

    def means(self) -> dict[Cell, FloatArray]:
        """Cell -> (len(METRICS),): mean over all instances."""
        return {cell: scores.mean(axis=0) for cell, scores in self.cells.items()}

    def resampled_means(self, seed: int) -> dict[Cell, FloatArray]:
        """Cell -> (1 + NUM_RESAMPLES, len(METRICS)): mean over all instances, then means over resampled instances.

        A resample is the same for all clients of a task, and for all tables with as many instances of a task of that
        name.
        """
        result: dict[Cell, FloatArray] = {}
        for task, num_instances in self.num_instances.items():
            cells = [cell for cell in self.cells if cell[1] == task]
            # All clients side by side: one matrix product a block, and the same resample for all of them.
            scores = np.concatenate([self.cells[cell] for cell in cells], axis=1)
            blocks = [scores.mean(axis=0, keepdims=True)]
            for shares in _resample_shares(seed, task, num_instances):
                blocks.append(shares @ scores)
            by_client = np.split(np.concatenate(blocks), len(cells), axis=1)
            result.update(zip(cells, by_client, strict=True))
        return result

    def tasks_of(self, quantity: Quantity, client: ClientInfo) -> set[str]:
        """Tasks that count for `quantity` of `client`, evaluated or not."""
        if quantity == "P":
            return set(client.own_tasks)
        trained: set[str] = set()
        for other in self.clients:
            trained.update(other.own_tasks)
        if quantity == "TTP":
            return trained
        return self.num_instances.keys() - trained

    def counted_cells(self, quantity: Quantity) -> dict[int, list[Cell]]:
        """Client -> its cells that count for `quantity`; clients without any are left out."""
        counted: dict[int, list[Cell]] = {}
        for info in self.clients:
            tasks = self.tasks_of(quantity, info)
            cells = [(client, task) for client, task in self.cells if client == info.client and task in tasks]
            if cells:
                counted[info.client] = cells
        return counted

    def average(self, quantity: Quantity, values: Mapping[Cell, FloatArray]) -> FloatArray | None:
        """Mean over clients of the mean of `values` over the cells that count; None where there are none."""
        by_client = []
        for cells in self.counted_cells(quantity).values():
            by_client.append(np.mean([values[cell] for cell in cells], axis=0))
        if not by_client:
            return None
        return np.asarray(np.mean(by_client, axis=0))

    def of_client(self, quantity: Quantity, client: int) -> dict[str, float] | None:
        """The quantity of one client per metric; None where none of the tasks was evaluated on it."""
        cells = self.counted_cells(quantity).get(client)
        if cells is None:
            return None
        means = [self.cells[cell].mean(axis=0) for cell in cells]
        return _by_metric(np.mean(means, axis=0))

    def overall(self, quantity: Quantity) -> dict[str, float] | None:
        """Mean of `of_client` per metric over the clients that have it; None where none has."""
        return _by_metric(self.average(quantity, self.means()))


def scores_of(answer: Answer, instance: Instance) -> tuple[float, ...]:
    """By metric, in the order of METRICS."""
    if isinstance(answer, ScoredAnswer):
        return answer.scores
    by_metric = score_answer(answer.text, instance.reference)
    return tuple(by_metric[metric] for metric in METRICS)


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
    per metric the best of constant answer, copy and first option on each task, averaged as the scores are. Without
    examples no text of an instance or answer is in it.
    """
    table = ScoreTable.build(instances, answers, clients)
    means = table.resampled_means(seed)
    tasks = []
    floor_of_task = {}
    for task, of_task in _group_by_task(instances).items():
        described = _describe_task(task, of_task, clients)
        if not num_examples:
            described["constant_answer"] = ""  # the text of a right answer
        tasks.append(described)
        floor_of_task[task] = np.array(list(best_floor(described["floors"]).values()))
    floor_of_cell = {(client, task): floor_of_task[task] for client, task in table.cells}
    return {
        "metrics": list(METRICS),
        "num_answers": len(answers),
        "num_instances": len(instances),
        "tasks": tasks,
        "clients": list(_describe_clients(table, means, answers)),
        "P": _describe_overall(table.average("P", means)),
        "TTP": _describe_overall(table.average("TTP", means)),
        "UNSEEN": _describe_overall(table.average("UNSEEN", means)),
        "floors": {
            "P": _by_metric(table.average("P", floor_of_cell)),
            "TTP": _by_metric(table.average("TTP", floor_of_cell)),
        },
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

    `tables[k]` and `baselines[k]` are runs with seed k; all were evaluated on the same instances. The interval
    resamples the instances within tasks, alike for all clients, seeds and both methods, and, where there are several,
    the seeds. Few seeds make it too narrow: of the seeds' standard error, two give sqrt(1/2), three sqrt(2/3).
    """
    num_seeds = len(tables)
    assert num_seeds == len(baselines) > 0, f"{num_seeds} runs against {len(baselines)}"
    values = []
    for run in [*tables, *baselines]:
        assert run.num_instances == tables[0].num_instances, "runs on different instances"
        average = run.average(quantity, run.resampled_means(seed))
        assert average is not None, f"a run without a task that counts for {quantity}"
        values.append(average[:, METRICS.index(metric)])
    differences = np.stack(values[:num_seeds]) - np.stack(values[num_seeds:])  # (seeds, 1 + resamples)
    generator = np.random.Generator(np.random.PCG64([seed, num_seeds]))
    # The same seeds for both methods of a pair: what they share cancels.
    counts_of_seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES)
    resampled = (counts_of_seeds / num_seeds * differences[:, 1:].T).sum(axis=1)
    low, high = np.percentile(resampled, _INTERVAL).tolist()
    return {"mean": float(differences[:, 0].mean()), "low": low, "high": high}


def over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """{"mean", "standard_error"} of one value per seed; the standard error of the mean is None for one seed."""
    assert values
    error = None
    if len(values) > 1:
        # ddof=1: the mean is estimated from the same few values.
        error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "standard_error": error}


def oracle(tables: Sequence[ScoreTable]) -> ScoreTable:
    """In each client x task cell the table with the higher mean rouge1, the first among equals.

    The ceiling of any rule that chooses between the tables by client and task. All have the same clients and cells.
    """
    first = tables[0]
    for table in tables:
        assert table.clients == first.clients, "tables of different clients"
        assert table.cells.keys() == first.cells.keys(), "tables of different cells"
        assert table.num_instances == first.num_instances, "tables of different instances"
    column = METRICS.index("rouge1")
    best = {}
    for cell in first.cells:
        means = [table.cells[cell][:, column].mean() for table in tables]
        best[cell] = tables[int(np.argmax(means))].cells[cell]
    return ScoreTable(first.clients, best)


def _group_by_task(instances: Sequence[Instance]) -> dict[str, list[Instance]]:
    """Task -> its instances, both in the order of `instances`."""
    result: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        result[instance.task].append(instance)
    return dict(result)


def _resample_shares(seed: int, task: str, num_instances: int) -> Iterator[FloatArray]:
    """Blocks (_RESAMPLES_AT_ONCE, num_instances): in each row the share of each instance in one resample."""
    # The name in the seed: tasks are resampled independently, and a task alike whichever others there are.
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(task.encode())]))
    probabilities = np.full(num_instances, 1 / num_instances)
    for _ in range(0, NUM_RESAMPLES, _RESAMPLES_AT_ONCE):
        yield generator.multinomial(num_instances, probabilities, _RESAMPLES_AT_ONCE) / num_instances


def _by_metric(values: FloatArray | None) -> dict[str, float] | None:
    if values is None:
        return None
    return dict(zip(METRICS, values.tolist(), strict=True))


def _describe_task(task: str, instances: Sequence[Instance], clients: Sequence[ClientInfo]) -> dict[str, Any]:
    trained = [client.client for client in clients if task in client.own_tasks]
    return {"task": task, "num_instances": len(instances), "clients": trained, **describe_floors(instances)}


def _describe_clients(
    table: ScoreTable, means: Mapping[Cell, FloatArray], answers: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """One entry for each client that has answers."""
    alphas: dict[Cell, list[float]] = defaultdict(list)
    for answer in answers:
        alphas[answer.client, answer.task].append(answer.alpha)
    for info in table.clients:
        tasks = [task for client, task in table.cells if client == info.client]
        if not tasks:
            continue
        entry: dict[str, Any] = {"client": info.client, "label": info.label, "own_tasks": list(info.own_tasks)}
        entry["scores"] = {task: _intervals(means[info.client, task]) for task in tasks}
        entry["alpha"] = {task: _describe_alpha(alphas[info.client, task]) for task in tasks}
        for quantity in get_args(Quantity):
            entry[quantity] = table.of_client(quantity, info.client)
        yield entry


def _describe_alpha(alphas: Sequence[float]) -> dict[str, float]:
    # Sorted: rounding makes the mean depend on the order of the answers, and that on the ranks that gave them.
    ordered = sorted(alphas)
    names = ("min", "q10", "median", "q90", "max")
    quantiles = np.quantile(ordered, (0.0, 0.1, 0.5, 0.9, 1.0)).tolist()
    return {"mean": float(np.mean(ordered)), **dict(zip(names, quantiles, strict=True))}


def _describe_overall(means: FloatArray | None) -> dict[str, dict[str, float]] | None:
    """Per metric {"mean", "low", "high", "standard_error"}, from `means` as of `ScoreTable.resampled_means`."""
    if means is None:
        return None
    described = _intervals(means)
    for metric, error in zip(METRICS, means[1:].std(axis=0).tolist(), strict=True):
        described[metric]["standard_error"] = error
    return described


def _intervals(means: FloatArray) -> dict[str, dict[str, float]]:
    """Per metric {"mean", "low", "high"} of what `ScoreTable.resampled_means` returns for a cell."""
    lows, highs = np.percentile(means[1:], _INTERVAL, axis=0).tolist()
    intervals = {}
    for metric, mean, low, high in zip(METRICS, means[0].tolist(), lows, highs, strict=True):
        intervals[metric] = {"mean": mean, "low": low, "high": high}
    return intervals


def _choose_examples(
    instances: Sequence[Instance], answers: Sequence[Answer], num_examples: int
) -> dict[str, list[dict[str, Any]]]:
    """The answers of highest and of lowest rouge1, each instance once, tasks in equal parts.

    Among equals the longer reference comes first: the right label of two is a poor example.
    """
    asked = {(instance.task, instance.row): instance for instance in instances}
    examples = []
    with_text = [answer for answer in answers if not isinstance(answer, ScoredAnswer)]
    for answer in with_text if num_examples else ():
        instance = asked[answer.task, answer.row]
        example = asdict(instance)
        del example["conversation"]  # its last question is the instruction
        example |= {"client": answer.client, "answer": answer.text, "alpha": answer.alpha}
        example["rouge1"] = score_answer(answer.text, instance.reference)["rouge1"]
        examples.append(example)
    examples.sort(key=_longest_reference_first)
    # Sorting is stable, in reverse too: among equal scores the longest reference stays first.
    worst = sorted(examples, key=_rouge1)
    best = sorted(examples, key=_rouge1, reverse=True)
    return {"best": _spread(best, num_examples), "worst": _spread(worst, num_examples)}


def _longest_reference_first(example: Mapping[str, Any]) -> tuple[int, str, int, int]:
    return -len(example["reference"]), example["task"], example["row"], example["client"]


def _rouge1(example: Mapping[str, Any]) -> float:
    return float(example["rouge1"])


def _spread(examples: Sequence[dict[str, Any]], num_examples: int) -> list[dict[str, Any]]:
    """The first `num_examples`, of an instance one, and of each task the same number, rounded up."""
    num_tasks = len({example["task"] for example in examples})
    quota = -(-num_examples // max(1, num_tasks))  # rounded up
    chosen: list[dict[str, Any]] = []
    rows_of_task: dict[str, set[int]] = defaultdict(set)
    for example in examples:
        rows = rows_of_task[example["task"]]
        if len(rows) < quota and example["row"] not in rows:
            rows.add(example["row"])
            chosen.append(example)
    return chosen[:num_examples]
