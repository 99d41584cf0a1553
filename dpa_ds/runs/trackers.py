"""Weights & Biases and MLflow: copies of metrics.jsonl for those who look at many runs there.

A round is sent when it counts, in threads of the coordinator. What is sent: the numbers of metrics.jsonl, and of the
recipe what says neither where data are nor whose. Each service has a file <run>/trackers/SERVICE.json with the id of
its run there and the last round that it has: who resumes the run appends to both. A service that fails costs one
warning, never a round.
"""

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from dpa_ds.config.paths import expand
from dpa_ds.config.schema import TrackingConfig
from dpa_ds.runs.folder import client_name
from dpa_ds.runs.storage import write_file

logger = logging.getLogger("dpa_ds")

FOLDER = "trackers"
"""Folder in the run folder: what was sent, and what Weights & Biases writes."""
START_SECONDS = 20.0
"""Bound on the first answer of Weights & Biases, in seconds: a process that ends before waits for it."""
CLOSE_SECONDS = 10.0
"""So long the end of a run waits for a service."""
NEVER_SENT = (
    "private_dir",
    "output_dir",
    "data.path",
    "data.test_path",
    "data.cache_dir",
    "data.clients",
    "evaluation.clients",
    "evaluation.tasks",
    "cluster.rendezvous",
    "tracking.mlflow",
)
"""Fields of the recipe that name places, hosts or clients, or may hold a password."""
MAX_METRICS, MAX_PARAMS, MAX_TEXT = 1000, 100, 500
"""Of one call of MLflow, and characters of a parameter."""

Numbers = dict[str, float]
"""Name -> number of one round: `held_out_loss` of all clients, `client_02/held_out_loss` of one."""


def numbers_of(records: Iterable[Mapping[str, Any]]) -> dict[int, Numbers]:
    """Round -> the numbers of its records in metrics.jsonl."""
    found: dict[int, Numbers] = {}
    for record in records:
        prefix = f"{client_name(record['client'])}/" if record["kind"] == "client" else ""
        numbers = found.setdefault(record["round"], {})
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("round", "client"):
                numbers[prefix + name] = float(value)
    return found


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What may be sent of a recipe, by dotted keys; of the model its name alone."""
    shown = {key: value for key, value in recipe.items() if key not in NEVER_SENT}
    shown["model.path"] = Path(shown["model.path"]).name
    return shown


class Sink(Protocol):
    """A run at a service. Whatever its methods raise ends the sending to this service."""

    run_id: str

    def send(self, server_round: int, numbers: Numbers) -> None:
        """Add one point to each curve."""

    def close(self) -> None:
        """Wait until all is sent."""


@dataclass(frozen=True)
class SinkRequest:
    """What a service's run is made of."""

    run_dir: Path
    project: str
    recipe: Mapping[str, Any]
    run_id: str | None
    """Of an earlier process; None: a new run."""


class ExperimentTrackers:
    """The services that a recipe names. Threads are started with the first round that is sent.

    Args:
        recipe: as `public_recipe` gives it.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, recipe: Mapping[str, Any]) -> None:
        self._senders: list[_Sender] = []
        builders: dict[str, Callable[[SinkRequest], Sink]] = {}
        if config.wandb != "off":
            builders["wandb"] = partial(WandbSink, mode=config.wandb)
        if config.mlflow is not None:
            builders["mlflow"] = partial(MlflowSink, place=config.mlflow)
        for name, build in builders.items():
            self._senders.append(_Sender(name, run_dir, config.project, recipe, build))

    @property
    def is_used(self) -> bool:
        """Whether the recipe names any."""
        return bool(self._senders)

    def publish(self, rounds: Mapping[int, Numbers]) -> None:
        """Send the numbers of some rounds soon; a service that has a round already does not get it again."""
        for sender in self._senders:
            sender.submit(rounds)

    def close(self) -> None:
        """Wait for what was published, at most CLOSE_SECONDS. May be called again."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for sender in self._senders:
            sender.close(deadline)
        self._senders = []


class _Sender:
    """The thread of one service."""

    def __init__(
        self,
        name: str,
        run_dir: Path,
        project: str,
        recipe: Mapping[str, Any],
        build: Callable[[SinkRequest], Sink],
    ) -> None:
        self._name = name
        self._run_dir = run_dir
        self._project = project
        self._recipe = recipe
        self._build = build
        self._state = run_dir / FOLDER / f"{name}.json"
        self._waiting: queue.SimpleQueue[Mapping[int, Numbers] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def submit(self, rounds: Mapping[int, Numbers]) -> None:
        if self._thread is None:
            # A daemon: a service that does not answer must not keep the process.
            self._thread = threading.Thread(target=self._run, name=f"tracker-{self._name}", daemon=True)
            self._thread.start()
        self._waiting.put(rounds)

    def close(self, deadline: float) -> None:
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn("it does not answer")

    def _run(self) -> None:
        """Send until the end, or the first failure."""
        try:
            self._send_all()
        except Exception as error:  # of libraries, networks and servers: whatever it is, the training continues
            self._warn(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _send_all(self) -> None:
        self._state.parent.mkdir(exist_ok=True)
        sink: Sink | None = None
        last_round = -1
        while (rounds := self._waiting.get()) is not None:
            if sink is None:
                state = self._read_state()
                last_round = int(state.get("last_round", -1))
                sink = self._build(SinkRequest(self._run_dir, self._project, self._recipe, state.get("run_id")))
                self._write_state(sink.run_id, last_round)
            for server_round in sorted(rounds):
                if server_round > last_round:
                    sink.send(server_round, rounds[server_round])
                    last_round = server_round
                    self._write_state(sink.run_id, last_round)
        if sink is not None:
            sink.close()

    def _read_state(self) -> dict[str, Any]:
        return dict(json.loads(self._state.read_text())) if self._state.is_file() else {}

    def _write_state(self, run_id: str, last_round: int) -> None:
        write_file(self._state, json.dumps({"run_id": run_id, "last_round": last_round}))

    def _warn(self, reason: str) -> None:
        """Once: a service that did not answer in time may fail later, too."""
        if self._has_failed:
            return
        self._has_failed = True
        logger.warning(
            f"tracking.{self._name}: {reason}; the training does not wait for it; metrics.jsonl has all numbers, and "
            "the same command sends what is missing"
        )


class WandbSink:
    """A run of Weights & Biases.

    Args:
        mode: offline: it is written to <run>/trackers/wandb alone, for `wandb sync`.
    """

    def __init__(self, request: SinkRequest, mode: Literal["offline", "online"]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read as its process starts
        import wandb

        self.run_id = request.run_id or secrets.token_hex(4)
        settings = wandb.Settings(
            console="off",
            silent=True,
            host="",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            login_timeout=CLOSE_SECONDS,
            init_timeout=START_SECONDS,
            finish_timeout=CLOSE_SECONDS,
        )
        self._run = wandb.init(
            project=request.project,
            name=request.run_dir.name,
            id=self.run_id,
            resume="allow",
            mode=mode,
            dir=request.run_dir / FOLDER,
            config=dict(request.recipe),
            settings=settings,
        )

    def send(self, server_round: int, numbers: Numbers) -> None:
        """See `Sink.send`."""
        self._run.log(numbers, step=server_round)

    def close(self) -> None:
        """See `Sink.close`."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow.

    Args:
        place: folder of a file store, or the address of a server or a database.
    """

    def __init__(self, request: SinkRequest, place: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is first imported
        if "://" not in place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the only store of mlflow-skinny without a server
            place = expand(place, "tracking.mlflow").absolute().as_uri()
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=place)
        if request.run_id is not None:
            self.run_id = request.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(request.project)
        found = experiment.experiment_id if experiment else self._client.create_experiment(request.project)
        self.run_id = self._client.create_run(found, run_name=request.run_dir.name).info.run_id
        self._send_recipe(request.recipe)

    def _send_recipe(self, recipe: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, json.dumps(value)[:MAX_TEXT]) for key, value in recipe.items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def send(self, server_round: int, numbers: Numbers) -> None:
        """See `Sink.send`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, server_round) for name, value in numbers.items()]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def close(self) -> None:
        """See `Sink.close`."""
        self._client.set_terminated(self.run_id)
