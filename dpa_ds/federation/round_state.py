"""The current round on disk and in memory: how far each hosted client has come, undoing, resuming, and what
makes a round count."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, LOCAL
from dpa_ds.adapters.state import AdapterState, check_tensors, optimizer_shapes, shapes_of
from dpa_ds.config.schema import CheckpointConfig
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.preemption import PreemptionSync
from dpa_ds.distributed.world import World
from dpa_ds.errors import CheckpointError, TrainingError
from dpa_ds.federation.aggregation.base import LeaderState, ServerState
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.metrics import MetricsTable
from dpa_ds.federation.progress import ClientState, PhaseProgress, RoundProgress, checked, steps_from_json
from dpa_ds.federation.trainer import PhaseRun
from dpa_ds.runs.folder import RunFolder
from dpa_ds.runs.storage import BackgroundWriter, SavedFolder, well_formed
from dpa_ds.runs.tracking import logger


@dataclass(frozen=True)
class RoundSaving:
    """Where and when the progress inside a round is saved."""

    folder: RunFolder
    writer: BackgroundWriter
    checkpoint: CheckpointConfig
    layout: Mapping[str, Any]
    """What must be equal for work inside a round to be resumed bit for bit: ranks, ZeRO stage, ..."""


class RoundState:
    """Where the run stands, and how far this group's clients have come in the current round: the hooks of the trainer.

    Args:
        server_state: that the next round starts from; empty on ranks that are no leaders.
        num_completed: complete rounds.
    """

    def __init__(
        self,
        saving: RoundSaving,
        world: World,
        job: JobStore,
        on_bad_update: Literal["skip", "stop"],
        server_state: ServerState,
        num_completed: int,
    ) -> None:
        self.server_state = server_state
        self.num_completed = num_completed
        self._saving = saving
        self._world = world
        self._job = job
        self._on_bad_update = on_bad_update
        self._preemption = PreemptionSync(job, world, saving.checkpoint.every_minutes)
        self._progress: dict[int, RoundProgress] = {}
        self.seconds_saving = 0.0
        """In the current round: how long training waited for snapshots of its progress."""

    # ---- in memory --------------------------------------------------------------------------------------------

    def open(self, client: HostedClient) -> RoundProgress:
        """See `TrainerHooks.open`."""
        if client.client_id not in self._progress:
            self._progress[client.client_id] = RoundProgress(client.state)
        return self._progress[client.client_id]

    def progress_of(self, client: HostedClient) -> RoundProgress:
        """The client's progress in this round; an empty one where it takes no part."""
        return self._progress.get(client.client_id, RoundProgress(client.state))

    def reject(self, client: HostedClient, error: TrainingError) -> None:
        """See `TrainerHooks.reject`."""
        if self._on_bad_update == "stop":
            raise error
        progress = self._progress[client.client_id]
        # Nothing is copied back: states are replaced, never written to, so the initial one is as it was.
        client.state = progress.initial
        progress.update = None
        progress.optimizer = None
        progress.inside = PhaseProgress()
        progress.metrics.rejected = 1
        if self._world.is_leader:
            logger.warning(f"{error}; its round is undone, and the others continue (federation.on_bad_update: skip)")

    def end_round(self, server_round: int) -> None:
        """The round is complete: forget how far its clients had come."""
        self.num_completed = server_round
        self._progress.clear()
        self.seconds_saving = 0.0

    # ---- saving -----------------------------------------------------------------------------------------------

    def before_step(self, run: PhaseRun, snapshot: Callable[[PhaseRun], None]) -> None:
        """See `TrainerHooks.before_step`. Collective: all ranks of the group."""
        action = self._preemption.check()
        step, every = run.inside.step, self._saving.checkpoint.every_steps
        is_due = every is not None and step % every == 0 and bool(run.shares)  # not again where it has just resumed
        if action != "go" or is_due:
            started = time.monotonic()
            snapshot(run)
            self.seconds_saving += time.monotonic() - started
            self.save(run.client, run.server_round)
        if action == "stop":
            # The process ends with this exception: what is still in the writer's queue would be lost.
            self._saving.writer.wait()
            self._job.preempt()

    def save(self, client: HostedClient, server_round: int) -> None:
        """Write the client's progress in the background. The leader does; others return at once."""
        if not self._world.is_leader:
            return
        started = time.monotonic()
        progress = self._progress[client.client_id]
        optional = {
            "local_optimizer": client.state.local_optimizer,
            "update": progress.update,
            "optimizer": progress.optimizer,
        }
        tensors = {LOCAL: client.state.local_adapter}
        for name, state in optional.items():
            if state is not None:
                tensors[name] = state
        kept = ["update"] if progress.is_update_saved and progress.update is None else []
        info = {
            "layout": dict(self._saving.layout),
            "steps_taken": client.state.num_steps,
            "loss_scale": client.state.loss_scale,
            "has_local_optimizer": client.state.local_optimizer is not None,
            **progress.to_json(),
        }
        # Tensors are handed over without a copy: the engine gives new ones each time, and nobody writes to these again.
        write = partial(self._saving.folder.save_progress, server_round, client.client_id, tensors, info, kept)
        self._saving.writer.submit(write)
        self.seconds_saving += time.monotonic() - started

    # ---- resuming ---------------------------------------------------------------------------------------------

    def restore_progress(self, clients: Sequence[HostedClient], server_round: int) -> None:
        """Before the first round of this process: resume each client where it was interrupted inside that round.

        The leader reads; the others learn from it how far a client has come. Collective: all ranks of the group.
        """
        for client in clients:
            saved = self._find(client, server_round) if self._world.is_leader else None
            info = self._world.broadcast_json(None if saved is None else saved.info)
            progress = self.open(client)
            if info is None:
                continue
            tensors = {} if saved is None else saved.tensors
            progress = RoundProgress.from_json(progress.initial, info)
            # Tokens per second are those of this process, which did not compute these.
            progress.metrics.restored_tokens = progress.metrics.real_tokens
            progress.update = tensors.get("update")
            progress.optimizer = tensors.get("optimizer")
            self._progress[client.client_id] = progress
            optimizer = tensors.get("local_optimizer", {}) if info["has_local_optimizer"] else None
            client.state = ClientState(
                tensors.get(LOCAL, {}), steps_from_json(info["steps_taken"]), optimizer, dict(info["loss_scale"])
            )

    def _find(self, client: HostedClient, server_round: int) -> SavedFolder | None:
        """What was saved of a client's progress in `server_round`; None: it starts the round from scratch."""
        saved = self._saving.folder.load_progress(server_round, client.client_id, logger.warning)
        if saved is None:
            return None
        # With other ranks the dropout masks are others, and with other micro-batches the order of sums.
        if saved.info.get("layout") != dict(self._saving.layout):
            logger.warning(
                f"client {client.client_id} starts round {server_round} from scratch: what it had done of it was done "
                f"with another layout ({saved.info.get('layout')}, now {dict(self._saving.layout)})"
            )
            return None
        try:
            with well_formed(f"the progress of client {client.client_id}", "it starts the round from scratch"):
                RoundProgress.from_json(client.state, saved.info)
                steps_from_json(saved.info["steps_taken"])
                checked(saved.info["loss_scale"], dict[str, float], "loss_scale")
                checked(saved.info["has_local_optimizer"], bool, "has_local_optimizer")
                self._check_tensors(client, saved)
        except CheckpointError as error:
            logger.warning(f"{error}")
            return None
        return saved

    def _check_tensors(self, client: HostedClient, saved: SavedFolder) -> None:
        """Raise LookupError or ValueError if tensors of a client's progress are missing, or do not fit its adapters."""
        local, shared = shapes_of(client.state.local_adapter), shapes_of(self.server_state.adapter)
        expected = {
            LOCAL: local,
            "local_optimizer": optimizer_shapes(local),
            "update": shared,
            "optimizer": optimizer_shapes(shared),
        }
        # Of the adapter that the interrupted phase trains.
        if shapes_of(saved.tensors.get("optimizer", {})) == optimizer_shapes(local):
            expected["optimizer"] = optimizer_shapes(local)
        needed = [LOCAL]
        if saved.info["has_local_optimizer"]:
            needed.append("local_optimizer")
        if saved.info["inside"]["step"]:
            needed.append("optimizer")
        for name in {*needed, *saved.tensors}:
            check_tensors(saved.tensors[name], expected[name])


class RoundCommit:
    """Makes a round count, or leaves no trace of it: the commit protocol.

    1. Every leader writes the adapters of its clients into `round_N.tmp`, the coordinator also `global/`, in the
       background (`start`): held-out loss is computed meanwhile.
       Durable: nothing. Round N - 1 counts, and is kept.
    2. A leader waits until its own files are on disk (`wait`), and only then hands its row to the exchange of metrics.
       So that exchange is the barrier: once a leader has its result, all leaders that are present have saved.
       Durable: every adapter of round N, each file and its name synced, in a folder that does not count yet.
    3. The coordinator records the metrics: a complete round is also a recorded one (`metrics.record_round`).
       Durable: the records of round N. A run that resumes from round N - 1 drops them.
    4. The coordinator completes the round (`finish`): it copies what absent clients had, writes `meta.json` with the
       checksums of all state, and renames `round_N.tmp` to `round_N`. The rename is what makes the round count.
       Durable: round N. `adapters` points to it a moment later, and is repaired by a run that resumes.
    5. Rounds older than the last `keep_rounds` are deleted, but for the last copy of a client, and for a round that
       somebody reads. Durable: round N and what is kept; an absent client's adapter is in round N.

    With `private_dir` clients' adapters are written to a private folder of their group instead (`private.py`), and each
    leader keeps to this order with its own:

    - What step 2 waits for is the private part: it is durable before any leader can know that round N was saved. A job
      that ends between there and the rename leaves a private part that is newer than the common one. It is not read,
      because no complete round names it, and is replaced when round N is saved again.
    - `meta.json` names for each client the round that its private part was last saved in: N, or for an absent client
      what the round before says. So the rename of the common folder makes the private parts count, whoever sees them.
    - Step 5 has a second half: each leader deletes the private copies that no complete round names any more. A leader
      that is slow, or killed, does so after the next round, or when it resumes. Copies are deleted after the common
      rounds that name them, never before: a private part is older than the common one only where somebody lost it.

    A job that ends before the rename leaves round N - 1 as the last one, and its clients' progress in `round_N.tmp`.
    Where groups have launchers of their own, steps 3 and 4 end with an exchange of their own (`loop.count_round`):
    if the coordinator is lost in them, the next one does them again from what it knows of the round, before any
    leader begins another. Every method may be called by all ranks; leaders act.
    """

    def __init__(
        self,
        folder: RunFolder,
        writer: BackgroundWriter,
        world: World,
        keep_rounds: int,
        adapters: AdapterModel,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._world = world
        self._keep_rounds = keep_rounds
        self._adapters = adapters
        self._wrote_server_state = False

    def start(
        self,
        server_round: int,
        clients: Sequence[HostedClient],
        state: ServerState,
        leader_state: LeaderState,
    ) -> None:
        """Step 1."""
        if self._world.leaders is None:
            return
        # Asked now and again at the end: the coordinator may be lost between the two.
        self._wrote_server_state = self._world.leaders.is_coordinator
        if self._wrote_server_state:
            self._save_server_state(server_round, state)
        for client in clients:
            # What belongs to the leader lies with its first client, and so follows it to another host.
            residual = leader_state.residual if client is clients[0] else {}
            self._save_client(server_round, client, residual)

    def wait(self) -> None:
        """Step 2, before the exchange. Raises CheckpointError if a write failed."""
        self._writer.wait()

    def finish(self, server_round: int, state: ServerState, table: MetricsTable) -> None:
        """Steps 4 and 5, after the exchange and the record."""
        if self._world.leaders is None or not self._world.leaders.is_coordinator:
            return
        if self._folder.latest_round() > server_round:  # the others continued without this leader
            return
        absent = table.absent_clients()
        if not self._folder.is_complete(server_round):  # else a coordinator that is lost now has come so far
            if not self._wrote_server_state:  # the leader that had written it was lost meanwhile
                self._save_server_state(server_round, state)
                self._writer.wait()
            self._folder.carry_over(server_round, absent)
        meta = {"clients": list(table.labels), "absent": absent}
        self._folder.complete_round(server_round, meta, self._keep_rounds)

    def _save_server_state(self, server_round: int, state: ServerState) -> None:
        extras: dict[str, AdapterState] = {}
        if len(state.reference_mean):
            extras["reference_mean"] = {
                "reference_mean": state.reference_mean,
                "weight": torch.tensor([state.reference_weight]),
                "counted": state.references_counted,
            }
        if state.optimizer:
            extras["server_optimizer"] = state.optimizer
        self._save(server_round, GLOBAL, GLOBAL, state.adapter, extras, {"scalars": state.scalars})

    def _save_client(self, server_round: int, client: HostedClient, residual: AdapterState) -> None:
        extras: dict[str, AdapterState] = {}
        if client.references is not None:
            extras["references"] = client.references.to_tensors()
        if client.state.local_optimizer is not None:
            extras["optimizer"] = client.state.local_optimizer
        if residual:
            extras["leader_state"] = residual
        info = {
            "label": client.label,
            "tasks": client.tasks,
            "steps_taken": client.state.num_steps,
            "loss_scale": client.state.loss_scale,
        }
        self._save(server_round, client.folder, LOCAL, client.state.local_adapter, extras, info)

    def _save(
        self,
        server_round: int,
        name: str,
        adapter: str,
        weights: AdapterState,
        extras: Mapping[str, AdapterState],
        info: Mapping[str, Any],
    ) -> None:
        """Write one adapter as PEFT does, in the background.

        Args:
            name: of its folder in the round.
            adapter: which of the adapters it is.
        """
        config = self._adapters.peft_config(adapter)
        self._writer.submit(partial(self._folder.save_adapter, server_round, name, weights, config, extras, info))
