"""The trainings and evaluations that a comparison is made of, each started once.

Every training and every evaluation is a process of its own on each rank, joined by a port of its own: memory is freed
in between, and a launcher is needed only once.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpa_ds.config.load import load_config, with_overrides
from dpa_ds.config.schema import MethodConfig, RunConfig, WeightingConfig
from dpa_ds.config.shipped import SHIPPED
from dpa_ds.config.validate import fingerprint_sections
from dpa_ds.data.sources import list_clients
from dpa_ds.distributed.job_store import POLL_SECONDS, JobStore
from dpa_ds.errors import ConfigError, DpaError, Preempted
from dpa_ds.experiments.comparison import Candidate, find_evaluation, name_of_candidate
from dpa_ds.inference.generation import describe_decoding
from dpa_ds.inference.weighting import Weighting, describe_weighting, resolve_weighting
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.resume import validate_run_dir
from dpa_ds.runs.tracking import logger


class Stages:
    """Trainings and evaluations, each done once. Every method is collective: all ranks of the job."""

    def __init__(self, config: RunConfig, job: JobStore, recipe_arguments: Sequence[str]) -> None:
        self._config = config
        self._job = job
        self._recipe_arguments = list(recipe_arguments)
        self._num_clients = len(list_clients(config.data, config.seed))
        self._num_decisions = 0

    def run_dir(self, method: str, seed: int) -> Path:
        """Folder of the run of `method` with `seed`."""
        return self._config.run_dir / f"{method}-seed{seed}"

    def check(self, method: str, seed: int) -> None:
        """Refuse a recipe that `method` cannot have, and a run that is there but is another one, or went further.

        Raises:
            ConfigError, CheckpointError: so it is.
        """
        num_rounds = self._config.federation.num_rounds
        completed = self._completed_rounds(method, seed)
        if completed > num_rounds:
            raise ConfigError(
                f"federation.num_rounds is {num_rounds}, but {self.run_dir(method, seed)} has completed {completed} "
                f"rounds: set it to {completed} or more, choose another name, or delete that folder"
            )

    def train(self, method: str, seed: int) -> None:
        """Run launch/run.py, unless all rounds are complete."""
        if self._completed_rounds(method, seed) < self._config.federation.num_rounds:
            self._start(f"train {method}, seed {seed}", "run.py", self._training_arguments(method, seed))

    def resolve(self, method: str, candidate: Candidate) -> Weighting:
        """What `candidate` means for `method`. Raises ConfigError if it does not go with the federation."""
        chosen = replace(self._config.method, name=method)  # type: ignore[arg-type]
        return resolve_weighting(self._weighting_config(candidate), chosen, self._num_clients)

    def evaluate(
        self, method: str, seed: int, candidate: Candidate, split: str, num_instances: int | None = None
    ) -> Path:
        """Run launch/evaluate.py, unless this very evaluation is complete; its folder.

        Args:
            num_instances: of each task; None: `evaluation.instances_per_task`.
        """
        run_dir = self.run_dir(method, seed)
        wanted = self._wanted_settings(method, seed, candidate, split, num_instances)

        def is_there() -> bool:
            return find_evaluation(run_dir, wanted) is not None

        if not self._from_rank_zero(is_there):
            arguments = self._evaluation_arguments(run_dir, candidate, wanted)
            what = f"evaluate {method}, seed {seed}: {name_of_candidate(candidate)}, {split}"
            self._start(what, "evaluate.py", arguments)
        folder = find_evaluation(run_dir, wanted)
        assert folder is not None, wanted
        return folder

    def _wanted_settings(
        self, method: str, seed: int, candidate: Candidate, split: str, num_instances: int | None
    ) -> dict[str, Any]:
        """What the summary.json of this evaluation says of its settings, and that of no other evaluation of the run."""
        config = self._config
        if num_instances is None:
            num_instances = config.evaluation.instances_per_task
        weighting = self.resolve(method, candidate)
        return {
            "weighting": describe_weighting(weighting, config.weighting.num_references),
            "precision": config.model.numbers,
            "split": split,
            "adapters": RunFolder(self.run_dir(method, seed)).digest(config.federation.num_rounds),
            **describe_decoding(config.generation),
            "clients": None,
            "tasks": config.evaluation.tasks,
            "instances_per_task": num_instances,
        }

    def _evaluation_arguments(self, run_dir: Path, candidate: Candidate, wanted: Mapping[str, Any]) -> list[str]:
        weighting = self._weighting_config(candidate)
        arguments = [
            f"--run={run_dir}",
            f"--split={wanted['split']}",
            f"--model.precision={self._config.model.precision}",
            f"--weighting.scale={json.dumps(weighting.scale)}",
            f"--weighting.kind={weighting.kind}",
            f"--weighting.representation={weighting.representation}",
            f"--weighting.encoder={weighting.encoder}",
        ]
        arguments.append(f"--tracking.quiet={self._config.tracking.quiet}".lower())
        for name in ("clients", "tasks", "instances_per_task"):
            arguments.append(f"--evaluation.{name}={json.dumps(wanted[name])}")
        for name, value in asdict(self._config.generation).items():
            arguments.append(f"--generation.{name}={value}")
        return arguments

    def _training_arguments(self, method: str, seed: int) -> list[str]:
        run_dir = self.run_dir(method, seed)
        values: dict[str, object] = {"name": run_dir.name, "output_dir": run_dir.parent, "method.name": method}
        values["seed"] = seed
        values["model.precision"] = self._config.model.precision  # auto is settled for all stages together
        if method != "feddpa_t":
            # The recipe's order of phases is that of feddpa_t: the other methods have none to choose.
            default = MethodConfig()
            values["method.phase_order"] = default.phase_order
            values["method.global_source"] = default.global_source
        return with_overrides(self._recipe_arguments, values)

    def _completed_rounds(self, method: str, seed: int) -> int:
        fingerprint = fingerprint_sections(load_config(self._training_arguments(method, seed)))
        folder = RunFolder(self.run_dir(method, seed))

        def count() -> int:
            return validate_run_dir(folder, fingerprint)

        return int(self._from_rank_zero(count))

    def _weighting_config(self, candidate: Candidate) -> WeightingConfig:
        scale = None
        if candidate.scales:
            scale = candidate.scales[0]
        return WeightingConfig(candidate.kind, scale, self._config.weighting.num_references)  # type: ignore[arg-type]

    def _from_rank_zero(self, decide: Callable[[], Any]) -> Any:
        """What rank 0 finds on the disk: another rank may look a moment later, and find something else."""
        self._num_decisions += 1
        return self._job.broadcast_from_rank_zero(f"stage/{self._num_decisions}", decide)

    def _start(self, what: str, program: str, arguments: Sequence[str]) -> None:
        """Run `program` on every rank.

        Raises:
            Preempted: a signal came meanwhile; it was passed on, and the program has saved what it had.
            DpaError: the program failed; it has said why.
        """
        # Each start follows a decision: its number is new.
        port = int(self._job.broadcast_from_rank_zero(f"port/{self._num_decisions}", _free_port))
        logger.info(f"\n=== {what}")
        # Else what is said here comes after what the program says, where the output is a file.
        sys.stdout.flush()
        command = [sys.executable, str(SHIPPED / "launch" / program), *arguments]
        was_stopped = False
        with subprocess.Popen(command, env=self._environment(port)) as running:
            while (status := running.poll()) is None:
                if self._job.stop_requested and not was_stopped:
                    running.terminate()
                    was_stopped = True
                time.sleep(POLL_SECONDS)
        # Also where another rank alone was asked to stop: all programs of a stage end with this code then.
        if was_stopped or status == Preempted.exit_code:
            self._job.preempt()
        if status:
            message = f"could not {what} (see above); once that is mended the same command resumes from there"
            raise program_failed(message, status)

    def _environment(self, port: int) -> dict[str, str]:
        """This rank's place, in the variables that every launcher sets."""
        launch = self._job.launch
        environment = {}
        for name, value in os.environ.items():
            # With them the processes would join the store of the launcher of this one (torch 2.13).
            if not name.startswith("TORCHELASTIC_"):
                environment[name] = value
        environment["RANK"] = str(launch.global_rank)
        environment["WORLD_SIZE"] = str(launch.job_world_size)
        environment["LOCAL_RANK"] = str(launch.local_rank)
        environment["MASTER_ADDR"] = launch.master_addr
        environment["MASTER_PORT"] = str(port)
        return environment


def program_failed(message: str, status: int) -> DpaError:
    """The error to end with after a program did, with its exit status; 1 where it is negative: a signal ended it."""
    failed = DpaError(message)
    failed.exit_code = max(status, 1)
    return failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
