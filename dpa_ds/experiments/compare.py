"""Train and evaluate several methods and seeds, and set them side by side: the table of contents."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpa_ds.config.schema import RunConfig
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
from dpa_ds.evaluation.tables import overall_floor
from dpa_ds.experiments.comparison import (
    DUAL,
    METHODS,
    Candidate,
    Entry,
    compare_entries,
    held_out_curve,
    name_of_candidate,
    parse_weightings,
    plan_entries,
    read_evaluation,
    read_summary,
    write_comparison,
)
from dpa_ds.experiments.stages import Stages
from dpa_ds.runs.tracking import logger, setup_logging

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


def build_plan(methods: str, seeds: str, weightings: str | None, tuning_instances: str) -> Plan:
    """From the words of the command line; `weightings` None: `DEFAULT_WEIGHTINGS`.

    Raises:
        ConfigError: an unknown method, something that is no number, or weightings for methods with one adapter.
    """
    named = tuple(dict.fromkeys(word.strip() for word in methods.split(",")))
    unknown = [method for method in named if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown} are unknown: choose among {', '.join(METHODS)}")
    if weightings is not None and not set(named) & set(DUAL):
        raise ConfigError(
            f"--weightings is for methods with both adapters, {' and '.join(DUAL)}, but --methods has neither: leave it out"
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
    setup_logging(is_coordinator=job.launch.global_rank == 0)
    entries = plan_entries(plan.methods, plan.weightings)
    stages = Stages(config, job, recipe_arguments)
    scored = replace(config, evaluation=replace(config.evaluation, split="test"))
    instances = choose_instances(scored, read_instances(scored))
    trained = dict.fromkeys(entry.trained_as(plan.methods) for entry in entries)
    check_before_training(config, plan, entries, stages)
    for seed in plan.seeds:
        for method in trained:
            stages.train(method, seed)
    folders: dict[Entry, list[Path]] = {}
    for entry in entries:
        method = entry.trained_as(plan.methods)
        scale = choose_scale(stages, plan, method, entry.candidate)
        chosen = replace(entry, candidate=Candidate(entry.candidate.kind, scale))
        folders[chosen] = [stages.evaluate(method, seed, chosen.candidate, "test") for seed in plan.seeds]
    if job.launch.global_rank == 0:
        evaluated = {
            (entry.method, name_of_candidate(entry.candidate)): [
                read_evaluation(folder, instances) for folder in of_seeds
            ]
            for entry, of_seeds in folders.items()
        }
        summary = read_summary(next(iter(folders.values()))[0] / "summary.json")
        floors = {quantity: overall_floor(summary, quantity, "rouge1") for quantity in ("P", "TTP")}
        series = {
            " = ".join(
                dict.fromkeys(e.method for e in entries if e.trained_as(plan.methods) == method)
            ): held_out_curve([stages.run_dir(method, seed) for seed in plan.seeds])
            for method in trained
        }
        report_dir = config.run_dir / "comparisons" / name_of_comparison(config, plan, instances)
        logger.info("\n" + write_comparison(report_dir, compare_entries(evaluated, floors, plan.seeds), series))


def name_of_comparison(config: RunConfig, plan: Plan, instances: Sequence[Instance]) -> str:
    """Folder of the tables: readable, and another one where anything else is compared, so that none is replaced."""
    part = name_of_part(None, config.evaluation.tasks, config.evaluation.instances_per_task)
    decoding = (config.generation.num_beams, config.generation.max_new_tokens, config.model.precision)
    asked = [asdict(instance) for instance in instances]
    digest = digest_of([asdict(plan), config.federation.num_rounds, decoding, asked])
    return f"{'+'.join(plan.methods)}-seeds_{'+'.join(map(str, plan.seeds))}-{part}-{digest}"


def check_before_training(config: RunConfig, plan: Plan, entries: Sequence[Entry], stages: Stages) -> None:
    """Refuse now what would end the comparison after hours of training. Collective: every rank of the job.

    Raises:
        ConfigError, CheckpointError, DataError: a recipe, a run that is there, or the data does not allow the plan.
    """
    tunes = any(len(entry.candidate.scales) > 1 for entry in entries)
    if tunes and config.data.held_out_fraction == 0:
        raise ConfigError(
            "--weightings with several scales chooses among them on held-out training data, but data.held_out_fraction is "
            "0: set it (0.1 keeps a tenth back), or give each weighting one scale"
        )
    for entry in entries:
        stages.resolve(entry.method, entry.candidate)
    for seed in plan.seeds:
        for split in ("test", "held_out") if tunes else ("test",):
            of_split = replace(config.evaluation, split=split)
            check_some_task_is_trained(replace(config, seed=seed, evaluation=of_split))
        for method in dict.fromkeys(entry.trained_as(plan.methods) for entry in entries):
            stages.check(method, seed)


def choose_scale(stages: Stages, plan: Plan, method: str, candidate: Candidate) -> tuple[float, ...]:
    """Of several scales the one with the best TTP on held-out training data, the mean over seeds."""
    if len(candidate.scales) < 2:
        return candidate.scales
    scores: dict[float, float] = {}
    for scale in candidate.scales:
        folders = [
            stages.evaluate(method, seed, Candidate(candidate.kind, (scale,)), "held_out", plan.tuning_instances)
            for seed in plan.seeds
        ]
        summaries = [read_summary(folder / "summary.json") for folder in folders]
        scores[scale] = sum(s["TTP"]["rouge1"]["mean"] for s in summaries) / len(summaries)
    best = max(scores, key=lambda scale: scores[scale])
    listed = ", ".join(f"{scale:g}: {score:.2f}" for scale, score in scores.items())
    logger.info(f"{method}, {candidate.kind}: TTP on held-out training data {listed}; chosen {best:g}")
    return (best,)
