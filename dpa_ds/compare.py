"""Train and evaluate several methods and seeds, and set them side by side: the table of contents.

Every training and every evaluation is a process of its own on each rank, joined by a port of its own: memory is freed in
between, and a launcher is needed only once.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpa_ds.checkpoint import RunFolder
from dpa_ds.config import RunConfig, WeightingConfig
from dpa_ds.config_checks import REPOSITORY
from dpa_ds.config_loader import load_config
from dpa_ds.distributed.job import Job
from dpa_ds.errors import ConfigError, DpaError
from dpa_ds.evaluation.comparison import (
    METHODS,
    Candidate,
    Entry,
    compare_entries,
    find_evaluation,
    held_out_curve,
    parse_weightings,
    plan_entries,
    read_evaluation,
    write_comparison,
)
from dpa_ds.evaluation.instances import choose_instances, read_instances
from dpa_ds.evaluation.weighting import describe_weighting, resolve_weighting
from dpa_ds.federation.methods import build_schedule
from dpa_ds.tracking import logger, setup_logging


@dataclass(frozen=True)
class Plan:
    """What launch/compare.py was asked for."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    weightings: tuple[Candidate, ...]
    """Of the methods with both adapters."""
    tuning_instances: int
    """Held-out instances of each task, where a scale is to be chosen."""


def build_plan(methods: str, seeds: str, weightings: str, tuning_instances: str) -> Plan:
    """From the words of the command line.

    Raises:
        ConfigError: an unknown method, or something that is no number.
    """
    named = tuple(dict.fromkeys(word.strip() for word in methods.split(",")))
    unknown = [method for method in named if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown} are unknown: choose among {', '.join(METHODS)}")
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in seeds.split(",")))
        return Plan(named, numbers, tuple(parse_weightings(weightings)), int(tuning_instances))
    except ValueError as error:
        raise ConfigError(f"--seeds and --tuning_instances are whole numbers, such as 0,1,2: {error}") from error


def compare(config: RunConfig, job: Job, plan: Plan, recipe_arguments: Sequence[str]) -> None:
    """Do what of `plan` is not done yet; table, pictures and all runs are in `config.run_dir`.

    Args:
        recipe_arguments: the command line of the recipe, for the training processes.

    Collective: every rank of the job.
    """
    setup_logging(is_main=job.launch.global_rank == 0)
    entries = plan_entries(plan.methods, plan.weightings)
    stages = Stages(config, job, recipe_arguments)
    scored = replace(config, evaluation=replace(config.evaluation, split="test"))
    instances = choose_instances(scored, read_instances(scored))
    trained = dict.fromkeys(entry.trained_as(plan.methods) for entry in entries)
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
            (entry.method, _name(entry.candidate)): [read_evaluation(folder, instances) for folder in of_seeds]
            for entry, of_seeds in folders.items()
        }
        summary = json.loads((next(iter(folders.values()))[0] / "summary.json").read_text())
        floors = {quantity: summary["floors"][quantity]["rouge1"] for quantity in ("P", "TTP")}
        series = {
            " = ".join(
                dict.fromkeys(e.method for e in entries if e.trained_as(plan.methods) == method)
            ): held_out_curve([stages.run_dir(method, seed) for seed in plan.seeds])
            for method in trained
        }
        logger.info("\n" + write_comparison(config.run_dir, compare_entries(evaluated, floors, plan.seeds), series))


def choose_scale(stages: "Stages", plan: Plan, method: str, candidate: Candidate) -> tuple[float, ...]:
    """Of several scales the one with the best TTP on held-out training data, the mean over seeds."""
    if len(candidate.scales) < 2:
        return candidate.scales
    scores: dict[float, float] = {}
    for scale in candidate.scales:
        folders = [
            stages.evaluate(method, seed, Candidate(candidate.kind, (scale,)), "held_out", plan.tuning_instances)
            for seed in plan.seeds
        ]
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        scores[scale] = sum(s["TTP"]["rouge1"]["mean"] for s in summaries) / len(summaries)
    best = max(scores, key=lambda scale: scores[scale])
    listed = ", ".join(f"{scale:g}: {score:.2f}" for scale, score in scores.items())
    logger.info(f"{method}, {candidate.kind}: TTP on held-out training data {listed}; chosen {best:g}")
    return (best,)


class Stages:
    """Trainings and evaluations, each done once. Every method is collective: all ranks of the job."""

    def __init__(self, config: RunConfig, job: Job, recipe_arguments: Sequence[str]) -> None:
        self._config, self._job, self._recipe_arguments = config, job, list(recipe_arguments)
        self._num_stages = 0

    def run_dir(self, method: str, seed: int) -> Path:
        """Folder of the run of `method` with `seed`."""
        return self._config.run_dir / f"{method}-seed{seed}"

    def train(self, method: str, seed: int) -> None:
        """Run launch/run.py, unless all rounds are complete."""
        run_dir = self.run_dir(method, seed)
        own = [f"--name={run_dir.name}", f"--output_dir={run_dir.parent}", f"--method.name={method}", f"--seed={seed}"]
        recipe = load_config([*self._recipe_arguments, *own])
        if self._decide(lambda: RunFolder(run_dir).claim(recipe) >= recipe.federation.num_rounds):
            return
        self._start(f"train {method}, seed {seed}", "run.py", [*self._recipe_arguments, *own])

    def evaluate(
        self, method: str, seed: int, candidate: Candidate, split: str, num_instances: int | None = None
    ) -> Path:
        """Run launch/evaluate.py, unless this very evaluation is complete; its folder."""
        run_dir, config = self.run_dir(method, seed), self._config
        limit = config.evaluation.instances_per_task if num_instances is None else num_instances
        scale = candidate.scales[0] if candidate.scales else None
        weighting = WeightingConfig(candidate.kind, scale, config.weighting.num_references)  # type: ignore[arg-type]
        recipe = replace(config, method=replace(config.method, name=method), weighting=weighting)  # type: ignore[arg-type]
        resolved = resolve_weighting(recipe, build_schedule(recipe.method))
        wanted: dict[str, Any] = {
            "weighting": describe_weighting(resolved, config.weighting.num_references),
            "precision": config.model.precision,
            "split": split,
            "adapters": RunFolder(run_dir).digest(config.federation.num_rounds),
            "beams": config.generation.num_beams,
            "max_new_tokens": config.generation.max_new_tokens,
            "clients": None,
            "tasks": config.evaluation.tasks,
            "instances_per_task": limit,
        }
        if not self._decide(lambda: find_evaluation(run_dir, wanted) is not None):
            own = [f"--run={run_dir}", f"--split={split}", f"--weighting.scale={'null' if scale is None else scale}"]
            own += [f"--weighting.{name}={getattr(weighting, name)}" for name in ("kind", "representation", "encoder")]
            own += [
                f"--evaluation.{name}={json.dumps(wanted[name])}" for name in ("clients", "tasks", "instances_per_task")
            ]
            own += [f"--generation.{name}={value}" for name, value in asdict(config.generation).items()]
            self._start(f"evaluate {method}, seed {seed}: {_name(candidate)}, {split}", "evaluate.py", own)
        folder = find_evaluation(run_dir, wanted)
        assert folder is not None, wanted
        return folder

    def _decide(self, decision: Callable[[], bool]) -> bool:
        self._num_stages += 1
        return bool(self._job.decide(f"stage/{self._num_stages}", decision))

    def _start(self, what: str, program: str, arguments: Sequence[str]) -> None:
        """Run `program` on every rank. Raises DpaError if it fails; it has said why."""
        launch = self._job.launch
        port = int(self._job.decide(f"port/{self._num_stages}", _free_port))
        logger.info(f"\n=== {what}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
        environment |= {"RANK": str(launch.global_rank), "WORLD_SIZE": str(launch.job_world_size)}
        environment |= {
            "LOCAL_RANK": str(launch.local_rank),
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": str(port),
        }
        sys.stdout.flush()
        ended = subprocess.run([sys.executable, str(REPOSITORY / "launch" / program), *arguments], env=environment)
        if ended.returncode:
            failed = DpaError(f"could not {what} (see above); once that is mended the same command goes on from there")
            failed.exit_code = ended.returncode if ended.returncode > 0 else 1
            raise failed


def _name(candidate: Candidate) -> str:
    return f"{candidate.kind} {candidate.scales[0]:g}" if candidate.scales else candidate.kind


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
