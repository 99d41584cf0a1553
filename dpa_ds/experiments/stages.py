"""The trainings and evaluations that a comparison is made of, each started once.

Every training and every evaluation is a process of its own on each rank, joined by a port of its own: memory is freed in
between, and a launcher is needed only once.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpa_ds.adapters.methods import build_schedule
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import MethodConfig, RunConfig, WeightingConfig
from dpa_ds.config.validate import REPOSITORY
from dpa_ds.data.sources import list_clients
from dpa_ds.distributed.job_store import POLL_SECONDS, JobStore
from dpa_ds.errors import ConfigError, DpaError, Preempted
from dpa_ds.experiments.comparison import Candidate, find_evaluation, name_of_candidate
from dpa_ds.inference.weighting import Weighting, describe_weighting, resolve_weighting
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.resume import validate_run_dir
from dpa_ds.runs.tracking import logger


class Stages:
    """Trainings and evaluations, each done once. Every method is collective: all ranks of the job."""

    def __init__(self, config: RunConfig, job: JobStore, recipe_arguments: Sequence[str]) -> None:
        self._config, self._job, self._recipe_arguments = config, job, list(recipe_arguments)
        self._num_clients = len(list_clients(config.data, config.seed))
        self._num_stages = 0

    def run_dir(self, method: str, seed: int) -> Path:
        """Folder of the run of `method` with `seed`."""
        return self._config.run_dir / f"{method}-seed{seed}"

    def check(self, method: str, seed: int) -> None:
        """Refuse a recipe that `method` cannot have, and a run that is there but is another one, or went further.

        Raises:
            ConfigError, CheckpointError: so it is.
        """
        num_rounds, run_dir = self._config.federation.num_rounds, self.run_dir(method, seed)
        completed = self._completed_rounds(method, seed)
        if completed > num_rounds:
            raise ConfigError(
                f"federation.num_rounds is {num_rounds}, but {run_dir} has completed {completed} rounds: set it to "
                f"{completed} or more, choose another name, or delete that folder"
            )

    def train(self, method: str, seed: int) -> None:
        """Run launch/run.py, unless all rounds are complete."""
        if self._completed_rounds(method, seed) < self._config.federation.num_rounds:
            self._start(f"train {method}, seed {seed}", "run.py", self._arguments(method, seed))

    def resolve(self, method: str, candidate: Candidate) -> Weighting:
        """What `candidate` means for `method`. Raises ConfigError if it does not go with the federation."""
        recipe = replace(
            self._config,
            method=replace(self._config.method, name=method),  # type: ignore[arg-type]
            weighting=self._weighting(candidate),
        )
        return resolve_weighting(recipe, build_schedule(recipe.method), self._num_clients)

    def evaluate(
        self, method: str, seed: int, candidate: Candidate, split: str, num_instances: int | None = None
    ) -> Path:
        """Run launch/evaluate.py, unless this very evaluation is complete; its folder."""
        run_dir, config = self.run_dir(method, seed), self._config
        limit = config.evaluation.instances_per_task if num_instances is None else num_instances
        weighting = self._weighting(candidate)
        wanted: dict[str, Any] = {
            "weighting": describe_weighting(self.resolve(method, candidate), config.weighting.num_references),
            "precision": config.model.precision,
            "split": split,
            "adapters": RunFolder(run_dir).digest(config.federation.num_rounds),
            "beams": config.generation.num_beams,
            "max_new_tokens": config.generation.max_new_tokens,
            "clients": None,
            "tasks": config.evaluation.tasks,
            "instances_per_task": limit,
        }
        if not self._from_rank_zero(lambda: find_evaluation(run_dir, wanted) is not None):
            own = [f"--run={run_dir}", f"--split={split}", f"--weighting.scale={json.dumps(weighting.scale)}"]
            own += [f"--weighting.{name}={getattr(weighting, name)}" for name in ("kind", "representation", "encoder")]
            own += [
                f"--evaluation.{name}={json.dumps(wanted[name])}" for name in ("clients", "tasks", "instances_per_task")
            ]
            own += [f"--generation.{name}={value}" for name, value in asdict(config.generation).items()]
            self._start(f"evaluate {method}, seed {seed}: {name_of_candidate(candidate)}, {split}", "evaluate.py", own)
        folder = find_evaluation(run_dir, wanted)
        assert folder is not None, wanted
        return folder

    def _arguments(self, method: str, seed: int) -> list[str]:
        """Of the training. The recipe's order of phases is that of feddpa_t: the other methods have none to choose."""
        run_dir, default = self.run_dir(method, seed), MethodConfig()
        own = [f"--name={run_dir.name}", f"--output_dir={run_dir.parent}", f"--method.name={method}", f"--seed={seed}"]
        if method != "feddpa_t":
            own += [f"--method.{key}={getattr(default, key)}" for key in ("phase_order", "global_source")]
        return [*self._recipe_arguments, *own]

    def _completed_rounds(self, method: str, seed: int) -> int:
        recipe = load_config(self._arguments(method, seed))
        return int(self._from_rank_zero(lambda: validate_run_dir(RunFolder(self.run_dir(method, seed)), recipe)))

    def _weighting(self, candidate: Candidate) -> WeightingConfig:
        scale = candidate.scales[0] if candidate.scales else None
        return WeightingConfig(candidate.kind, scale, self._config.weighting.num_references)  # type: ignore[arg-type]

    def _from_rank_zero(self, decision: Callable[[], Any]) -> Any:
        self._num_stages += 1
        return self._job.broadcast_from_rank_zero(f"stage/{self._num_stages}", decision)

    def _start(self, what: str, program: str, arguments: Sequence[str]) -> None:
        """Run `program` on every rank.

        Raises:
            Preempted: a signal came meanwhile; it was passed on, and the program has saved what it had.
            DpaError: the program failed; it has said why.
        """
        launch = self._job.launch
        port = int(self._job.broadcast_from_rank_zero(f"port/{self._num_stages}", _free_port))
        logger.info(f"\n=== {what}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
        environment |= {"RANK": str(launch.global_rank), "WORLD_SIZE": str(launch.job_world_size)}
        environment |= {
            "LOCAL_RANK": str(launch.local_rank),
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": str(port),
        }
        sys.stdout.flush()
        reported = False
        with subprocess.Popen(
            [sys.executable, str(REPOSITORY / "launch" / program), *arguments], env=environment
        ) as running:
            while (status := running.poll()) is None:
                if self._job.stop_requested and not reported:
                    running.terminate()
                    reported = True
                time.sleep(POLL_SECONDS)
        if reported or status == Preempted.exit_code:
            self._job.preempt()
        if status:
            failed = DpaError(f"could not {what} (see above); once that is mended the same command resumes from there")
            failed.exit_code = status if status > 0 else 1
            raise failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
