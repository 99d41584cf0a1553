"""Train and evaluate several methods and seeds, and set them side by side: the table of contents."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpa_ds.config.schema import DataConfig, EvaluationConfig, RunConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.errors import ConfigError
from dpa_ds.evaluation.answers import Instance
from dpa_ds.evaluation.dataset import (
    check_some_task_is_trained,
    choose_instances,
    digest_of,
    name_of_part,
    read_instances,
)
from dpa_ds.evaluation.tables import MAIN_METRIC, overall_floor
from dpa_ds.experiments.comparison import (
    DUAL,
    METHODS,
    QUANTITIES,
    Candidate,
    Entry,
    Line,
    compare_lines,
    held_out_curve,
    name_of_candidate,
    parse_weightings,
    plan_entries,
    read_evaluation,
    read_summary,
    write_comparison,
)
from dpa_ds.experiments.stages import Stages
from dpa_ds.inference.generation import describe_decoding
from dpa_ds.runs.tracking import RESULT, logger, setup_logging

DEFAULT_WEIGHTINGS = "cosine,centred_cosine"


@dataclass(frozen=True)
class Plan:
    """What launch/compare.py was asked for."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    weightings: tuple[Candidate, ...]
    """Of the methods with both adapters."""
    tuning_instances: int
    """Held-out instances of each task, where a scale is to be chosen."""

    def entries(self) -> list[Entry]:
        """The lines of the table."""
        return plan_entries(self.methods, self.weightings)

    def trained_methods(self) -> list[str]:
        """The methods that are to be trained, each once: their runs have the adapters of all others."""
        return list(dict.fromkeys(entry.trained_as(self.methods) for entry in self.entries()))

    def tunes(self) -> bool:
        """Whether some scale is to be chosen on held-out data."""
        return any(len(candidate.scales) > 1 for candidate in self.weightings)


@dataclass(frozen=True)
class EvaluatedEntry:
    """An entry with its scale chosen, evaluated with every seed."""

    entry: Entry
    folders: tuple[Path, ...]
    """Folder of the report of each seed."""


def build_plan(methods: str, seeds: str, weightings: str | None, tuning_instances: str) -> Plan:
    """From the words of the command line; `weightings` None: `DEFAULT_WEIGHTINGS`.

    Raises:
        ConfigError: an unknown method, something that is no number, or weightings for methods with one adapter.
    """
    # dict.fromkeys keeps the order and drops what is named twice.
    named = tuple(dict.fromkeys(word.strip() for word in methods.split(",")))
    unknown = [method for method in named if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown} are unknown: choose among {', '.join(METHODS)}")
    if weightings is not None and not set(named) & set(DUAL):
        raise ConfigError(
            f"--weightings is for methods with both adapters, {' and '.join(DUAL)}, but --methods has neither: "
            "leave it out"
        )
    candidates = tuple(parse_weightings(weightings or DEFAULT_WEIGHTINGS))
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in seeds.split(",")))
        plan = Plan(named, numbers, candidates, int(tuning_instances))
    except ValueError as error:
        raise ConfigError(f"--seeds and --tuning_instances are whole numbers, such as 0,1,2: {error}") from error
    if plan.tuning_instances < 1:
        raise ConfigError(f"--tuning_instances must be >= 1, got {plan.tuning_instances}")
    return plan


def compare(config: RunConfig, job: JobStore, plan: Plan, recipe_arguments: Sequence[str]) -> None:
    """Do what of `plan` is not done yet; all runs are in `config.run_dir`, tables and pictures below `comparisons`.

    Args:
        recipe_arguments: the command line of the recipe, for the training processes.

    Collective: every rank of the job.
    """
    job.start_watchdog(config.checkpoint.grace_seconds, config.cluster.heartbeat_timeout_seconds)
    setup_logging(job.launch.global_rank == 0, config.tracking.quiet)
    stages = Stages(config, job, recipe_arguments)
    # Whatever the recipe says of the split: what is compared are scores on test data.
    evaluation = replace(config.evaluation, split="test")
    instances = choose_instances(read_instances(config.data, config.seed, "test"), evaluation)
    # On every rank, and before the first training: an error after hours would be a waste of them.
    check_before_training(plan, stages, config.data, evaluation)
    for seed in plan.seeds:
        for method in plan.trained_methods():
            stages.train(method, seed)
    evaluated = [evaluate_entry(stages, plan, entry) for entry in plan.entries()]
    if job.launch.global_rank == 0:
        decoding = (*describe_decoding(config.generation).values(), config.model.numbers)
        asked = [asdict(instance) for instance in instances]
        name = name_of_comparison(plan, evaluation, [config.federation.num_rounds, decoding, asked])
        report_dir = config.run_dir / "comparisons" / name
        logger.log(RESULT, "\n" + write_tables(report_dir, plan, stages, evaluated, instances))


def name_of_comparison(plan: Plan, evaluation: EvaluationConfig, details: Sequence[Any]) -> str:
    """Folder of the tables: readable, and another one where anything else is compared, so that none is replaced.

    Args:
        details: JSON values that the numbers depend on, beside the plan.
    """
    methods = "+".join(plan.methods)
    seeds = "+".join(map(str, plan.seeds))
    part = name_of_part(None, evaluation.tasks, evaluation.instances_per_task)
    return f"{methods}-seeds_{seeds}-{part}-{digest_of([asdict(plan), *details])}"


def check_before_training(plan: Plan, stages: Stages, data: DataConfig, evaluation: EvaluationConfig) -> None:
    """Refuse now what would end the comparison after hours of training. Collective: every rank of the job.

    Raises:
        ConfigError, CheckpointError, DataError: a recipe, a run that is there, or the data does not allow the plan.
    """
    evaluations = [evaluation]
    if plan.tunes():
        if data.held_out_fraction == 0:
            raise ConfigError(
                "--weightings with several scales chooses among them on held-out training data, but "
                "data.held_out_fraction is 0: set it (0.1 keeps a tenth back), or give each weighting one scale"
            )
        # The scale is chosen on data that no client trained on, but not on the test data that it is judged by.
        evaluations.append(replace(evaluation, split="held_out"))
    for entry in plan.entries():
        stages.resolve(entry.method, entry.candidate)
    for seed in plan.seeds:
        for split in evaluations:
            check_some_task_is_trained(data, seed, split)
        for method in plan.trained_methods():
            stages.check(method, seed)


def evaluate_entry(stages: Stages, plan: Plan, entry: Entry) -> EvaluatedEntry:
    """Evaluate an entry with every seed, with the best of its scales. Collective: every rank of the job."""
    method = entry.trained_as(plan.methods)
    chosen = replace(entry, candidate=choose_scale(stages, plan, method, entry.candidate))
    folders = [stages.evaluate(method, seed, chosen.candidate, "test") for seed in plan.seeds]
    return EvaluatedEntry(chosen, tuple(folders))


def choose_scale(stages: Stages, plan: Plan, method: str, candidate: Candidate) -> Candidate:
    """Of several scales the one with the best TTP on held-out training data, the mean over seeds.

    Collective: every rank of the job.
    """
    if len(candidate.scales) < 2:
        return candidate
    best = candidate.scales[0]
    scores: dict[float, float] = {}
    for scale in candidate.scales:
        single = Candidate(candidate.kind, (scale,))
        of_seeds = []
        for seed in plan.seeds:
            folder = stages.evaluate(method, seed, single, "held_out", plan.tuning_instances)
            of_seeds.append(read_summary(folder / "summary.json")["TTP"][MAIN_METRIC]["mean"])
        scores[scale] = sum(of_seeds) / len(of_seeds)
        if scores[scale] > scores[best]:
            best = scale
    listed = ", ".join(f"{scale:g}: {score:.2f}" for scale, score in scores.items())
    logger.info(f"{method}, {candidate.kind}: TTP on held-out training data {listed}; chosen {best:g}")
    return Candidate(candidate.kind, (best,))


def write_tables(
    report_dir: Path, plan: Plan, stages: Stages, evaluated: Sequence[EvaluatedEntry], instances: Sequence[Instance]
) -> str:
    """Write the tables and pictures of the comparison; returns the table as text. Rank 0 only."""
    lines = []
    for of_entry in evaluated:
        evaluations = [read_evaluation(folder, instances) for folder in of_entry.folders]
        entry = of_entry.entry
        lines.append(Line(entry.method, name_of_candidate(entry.candidate), evaluations))
    # The same instances everywhere, and so the same floors.
    summary = read_summary(evaluated[0].folders[0] / "summary.json")
    floors = {quantity: overall_floor(summary, quantity, MAIN_METRIC) for quantity in QUANTITIES}
    series = {}
    for method in plan.trained_methods():
        run_dirs = [stages.run_dir(method, seed) for seed in plan.seeds]
        series[_name_of_curve(plan, method)] = held_out_curve(run_dirs)
    return write_comparison(report_dir, compare_lines(lines, floors, plan.seeds), series)


def _name_of_curve(plan: Plan, trained: str) -> str:
    """All methods whose rounds are those of the run that was `trained`."""
    methods = [entry.method for entry in plan.entries() if entry.trained_as(plan.methods) == trained]
    return " = ".join(dict.fromkeys(methods))
