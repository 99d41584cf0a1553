"""Trains hosted clients, one after the other, on the engine of their rank group.

The trainer knows phases and steps. Disks, signals, resuming and undoing are known to its hooks (`round_state.py`).
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from dpa_ds.adapters.adapter_model import global_local_mix
from dpa_ds.adapters.methods import GLOBAL, LOCAL, STAGES, Phase, Schedule, Stage
from dpa_ds.adapters.state import AdapterState, untrained_layers
from dpa_ds.config.schema import TrainConfig
from dpa_ds.data.batching import BatchingConfig, build_step, num_steps, step_indices
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.engine.engine import AdapterEngine
from dpa_ds.errors import TrainingError, list_some
from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState, Transform
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.meter import TrainingMeter
from dpa_ds.federation.progress import PhaseProgress, RoundProgress
from dpa_ds.runs.folder import client_name
from dpa_ds.runs.tracking import Tracker, logger

T = TypeVar("T")


@dataclass
class PhaseRun:
    """One phase of one client while it runs."""

    client: HostedClient
    phase: Phase
    server_round: int
    progress: RoundProgress
    num_steps: int
    learning_rates: list[float]
    shares: list[torch.Tensor] = field(default_factory=list)
    """This rank's shares of the last steps' losses, on the device, not yet summed over the group."""
    norms: list[torch.Tensor] = field(default_factory=list)

    @property
    def inside(self) -> PhaseProgress:
        """How far the phase has come."""
        return self.progress.inside


class TrainerHooks(Protocol):
    """What surrounds the steps of a client. Every method is collective: all ranks of the group."""

    def open(self, client: HostedClient) -> RoundProgress:
        """The client's progress in this round; a fresh one at its beginning."""
        ...

    def before_step(self, run: PhaseRun, snapshot: Callable[[PhaseRun], None]) -> None:
        """Called before each step. May save and raise Preempted.

        Args:
            snapshot: takes the trained adapter and its optimizer state out of the engine into `run.progress`.
        """
        ...

    def save(self, client: HostedClient, server_round: int) -> None:
        """Called when a phase is done, or what was done is undone."""
        ...

    def reject(self, client: HostedClient, error: TrainingError) -> None:
        """Give the client its last good state back; raises `error` where the recipe wants the run to stop."""
        ...


class Trainer:
    """Trains the phases of a round. Every method is collective: all ranks of the group."""

    def __init__(
        self,
        engine: AdapterEngine,
        schedule: Schedule,
        train: TrainConfig,
        seed: int,
        batching: BatchingConfig,
        transforms: Sequence[Transform],
        hooks: TrainerHooks,
        tracker: Tracker,
    ) -> None:
        self.engine = engine
        self.schedule = schedule
        self.batching = batching
        self._world = engine.world
        self._train = train
        self._seed = seed
        self._transforms = transforms
        self._hooks = hooks
        self._tracker = tracker
        self._reported: set[str] = set()
        """Adapters whose untrained layers were looked for."""
        self._meter = TrainingMeter()

    # ---- a client's round -------------------------------------------------------------------------------------

    def local_update(self, client: HostedClient, state: ServerState, server_round: int) -> LocalUpdate | None:
        """Run the client's phases before the aggregation.

        Returns:
            what leaves the client, on its leader; None on other ranks, and where it is not fit to count.
        """
        progress = self._hooks.open(client)
        update = None
        try:
            self._train_stage(client, "before", state, server_round)
            if not progress.metrics.rejected:
                update = self._transformed(client, state, server_round)
        except TrainingError as error:
            self._hooks.reject(client, error)
            progress.phase = self._first_phase("final", server_round)
            self._hooks.save(client, server_round)
        # A phase that overlaps the exchange trains beside the client's own adapter: until then it is needed.
        if not self.schedule.phases("overlap", server_round):
            self._forget_update(progress)
        return update

    def run_stage(self, stage: Stage, clients: Sequence[HostedClient], state: ServerState, server_round: int) -> None:
        """Run a later stage of each client. Where its phases come to nothing, what the client has uploaded
        counts all the same."""
        for client in clients:
            self._run_later_stage(client, stage, state, server_round)

    def finalize(self, clients: Sequence[HostedClient], state: ServerState, server_round: int) -> None:
        """After the last round: start each local adapter from the global one and run the final phases."""
        first = self._first_phase("final", server_round)
        for client in clients:
            progress = self._hooks.open(client)
            progress.phase = max(progress.phase, first)  # a client that was not sampled has done nothing yet
            if not self.schedule.final:
                continue
            if (progress.phase, progress.inside.step) == (first, 0):
                client.state = replace(client.state, local_adapter=state.adapter, local_optimizer=None)
                progress.initial = client.state
            self._run_later_stage(client, "final", state, server_round)

    def num_steps(self, client: HostedClient) -> int:
        """Optimizer steps of one phase of the client."""
        train = self._train
        return num_steps(len(client.examples), train.batch_size, train.local_epochs, train.max_steps)

    def held_out_loss(self, examples: TokenizedExamples, alpha: float, max_examples: int) -> float:
        """Mean loss per label token of the first `max_examples` examples, with the adapters that the engine holds.

        The same number on any layout of ranks.

        Args:
            alpha: the adapters are mixed as (1 - alpha, alpha).
        """
        indices = range(min(len(examples), max_examples))
        step = build_step(examples, indices, self._world.rank, self._world.world_size, self.batching)
        return self.engine.loss([step], global_local_mix(alpha))

    # ---- stages -----------------------------------------------------------------------------------------------

    def _run_later_stage(self, client: HostedClient, stage: Stage, state: ServerState, server_round: int) -> None:
        progress = self._hooks.open(client)
        global_steps = client.state.num_steps[GLOBAL]
        try:
            self._train_stage(client, stage, state, server_round)
        except TrainingError as error:
            self._hooks.reject(client, error)
            client.state = replace(client.state, num_steps={**client.state.num_steps, GLOBAL: global_steps})
        if stage == "overlap":
            self._forget_update(progress)

    def _train_stage(self, client: HostedClient, stage: Stage, state: ServerState, server_round: int) -> None:
        """Run those phases of `stage` that are not done yet."""
        progress = self._hooks.open(client)
        phases = self.schedule.phases(stage, server_round)
        num_done = max(0, progress.phase - self._first_phase(stage, server_round))
        todo = phases[num_done:]
        self._tracker.advance(_describe(client, server_round), self.num_steps(client) * (len(phases) - len(todo)))
        if not todo:
            return
        # Until this round's average is there a client trains on beside its own global adapter.
        adapter = state.adapter
        if stage in ("before", "overlap") and progress.update is not None:
            adapter = progress.update
        self.engine.write_state(GLOBAL, adapter)
        # The local adapter of the client before lies in the engine; a global phase gives it no weight, and
        # leaves it there.
        if any(phase.trainable == LOCAL for phase in todo):
            self.engine.write_state(LOCAL, client.state.local_adapter)
        for phase in todo:
            self._run_phase(client, phase, server_round)
            progress.phase += 1
            progress.inside = PhaseProgress()
            # From the end of the stage on the update is whole, and later saves keep its file instead of writing
            # it again.
            if stage == "before" and phase is todo[-1] and progress.update is not None:
                progress.is_update_saved = True
            self._hooks.save(client, server_round)

    def _transformed(self, client: HostedClient, state: ServerState, server_round: int) -> LocalUpdate | None:
        """The client's update after all transforms, on the leader.

        Raises:
            TrainingError: on all ranks of the group, if a transform refuses it on the leader.
        """
        progress = self._hooks.open(client)

        def transform() -> LocalUpdate:
            reference_mean = None
            if client.references is not None:
                reference_mean = client.references.reference_mean
            adapter = state.adapter if progress.update is None else progress.update
            update = LocalUpdate(client.client_id, len(client.examples), adapter, reference_mean)
            for one in self._transforms:
                update = one(update, state)
            return update

        return self._on_leader(transform, f"{client.label} in round {server_round} ")

    def _forget_update(self, progress: RoundProgress) -> None:
        """The update was handed over and lies on disk: no later phase of this round needs it in memory."""
        progress.update = None

    def _first_phase(self, stage: Stage, server_round: int) -> int:
        """Number of the first phase of `stage`, counted through the stages of a round."""
        earlier = STAGES[: STAGES.index(stage)]
        return sum(len(self.schedule.phases(one, server_round)) for one in earlier)

    # ---- one phase --------------------------------------------------------------------------------------------

    def _run_phase(self, client: HostedClient, phase: Phase, server_round: int) -> None:
        """Train one adapter of the client, from where it was interrupted, and take it out of the engine."""
        started = time.monotonic()
        total = self.num_steps(client)
        rates = [learning_rate(self._train, step, total) for step in range(total)]
        run = PhaseRun(client, phase, server_round, self._hooks.open(client), total, rates)
        self.engine.activate(phase)
        # After `activate`, which resets the optimizer state and the loss scale.
        self._restore_optimizer(run)
        self._take_steps(run)
        # The losses first: their message says what happened, where NaN in the adapter would only say that it did.
        self._check_converges(run)
        self._keep_adapter(run)
        self._report_untrained(run)
        run.progress.optimizer = None
        if self._keeps_optimizer(phase):
            client.state = replace(client.state, local_optimizer=self.engine.read_optimizer_state(LOCAL) or {})
        client.state = replace(client.state, loss_scale=self.engine.read_scaler())
        self._record(run, time.monotonic() - started)

    def _take_steps(self, run: PhaseRun) -> None:
        """The optimizer steps of a phase that are not done yet. What a step computes is a function of the seed
        words alone."""
        adapter_word = 0 if run.phase.trainable == GLOBAL else 1
        words = (self._seed, run.server_round, run.client.client_id, adapter_word)
        examples, metrics, world = run.client.examples, run.progress.metrics, self._world
        indices = step_indices(len(examples), self._train.batch_size, run.num_steps, words)
        description = f"{_describe(run.client, run.server_round)} {run.phase.trainable}"
        self._tracker.advance(description, run.inside.step)
        self._meter.begin_phase()
        for k in range(run.inside.step, run.num_steps):
            self._hooks.before_step(run, self._snapshot)
            torch.manual_seed(_fold(*words, k, world.rank))  # dropout needs no state of its own to resume
            step = build_step(examples, indices[k], world.rank, world.world_size, self.batching)
            share, norm, was_applied = self.engine.train_step(step, run.learning_rates[k])
            run.shares.append(share)
            run.norms.append(norm)
            run.inside.step += 1
            run.inside.num_skipped += not was_applied
            metrics.real_tokens += step.real_tokens
            metrics.computed_tokens += step.computed_tokens
            self._meter.add(step, share)
            self._tracker.advance(description, numbers=self._meter.describe)
        self._sum_losses(run)

    def _sum_losses(self, run: PhaseRun) -> None:
        """Losses and norms of the last steps. One exchange for many steps: no rank waits for numbers that are
        only looked at."""
        if run.shares:
            run.inside.losses += self._world.all_reduce_(torch.stack(run.shares)).tolist()
            run.inside.norms += torch.stack(run.norms).tolist()
            run.shares.clear()
            run.norms.clear()

    def _check_converges(self, run: PhaseRun) -> None:
        """Raise TrainingError, alike on all ranks, unless some step was applied and every loss is finite."""
        losses = run.inside.losses
        if run.inside.num_skipped < run.num_steps and all(map(math.isfinite, losses)):
            return
        raise TrainingError(
            f"{run.client.label} diverged in round {run.server_round}, {run.phase.trainable} phase: "
            f"{run.inside.num_skipped} of {run.num_steps} steps had no finite gradient, losses {losses[0]:.4g} to "
            f"{losses[-1]:.4g}; lower train.learning_rate, or use model.precision bf16 or fp32. Earlier rounds are "
            "intact"
        )

    def _record(self, run: PhaseRun, seconds: float) -> None:
        """Add the phase to the round's numbers and to the client's curves."""
        inside, metrics, adapter = run.inside, run.progress.metrics, run.phase.trainable
        metrics.num_steps += len(inside.losses)
        metrics.skipped_steps += inside.num_skipped
        metrics.seconds += seconds
        setattr(metrics, f"{adapter}_loss", sum(inside.losses) / len(inside.losses))
        series = {
            f"loss/{adapter}": inside.losses,
            f"optimizer/{adapter}_grad_norm": inside.norms,
            f"optimizer/{adapter}_lr": run.learning_rates,
        }
        client = run.client
        self._tracker.scalars(client_name(client.client_id), series, client.state.num_steps[adapter])
        num_steps = {
            **client.state.num_steps,
            adapter: client.state.num_steps[adapter] + len(inside.losses),
        }
        client.state = replace(client.state, num_steps=num_steps)

    # ---- in and out of the engine -----------------------------------------------------------------------------

    def _keeps_optimizer(self, phase: Phase) -> bool:
        return self._train.keep_optimizer_state and phase.trainable == LOCAL

    def _restore_optimizer(self, run: PhaseRun) -> None:
        """Give the engine the optimizer state of an interrupted phase, or the one that the client keeps
        between rounds, and the client's loss scale."""
        client, adapter = run.client, run.phase.trainable
        # A client continues with its own loss scale: each search for one costs steps that are skipped.
        self.engine.write_scaler(run.inside.scaler or client.state.loss_scale)
        if run.inside.step:
            self.engine.write_optimizer_state(adapter, run.progress.optimizer)
        elif self._keeps_optimizer(run.phase) and client.state.local_optimizer is not None:
            self.engine.write_optimizer_state(adapter, client.state.local_optimizer)

    def _snapshot(self, run: PhaseRun) -> None:
        """In the middle of a phase: the adapter that it trains, its optimizer state, and the losses so far."""
        self._sum_losses(run)
        self._keep_adapter(run)
        run.progress.optimizer = self.engine.read_optimizer_state(run.phase.trainable)
        run.inside.scaler = self.engine.read_scaler()

    def _keep_adapter(self, run: PhaseRun) -> None:
        """Take the trained adapter out of the engine, to the leader. TrainingError, on all ranks: it is not finite."""
        state = self.engine.read_state(run.phase.trainable)
        place = f"{run.client.label} diverged in round {run.server_round}"
        self._on_leader(lambda: _check_finite(state, place))
        if run.phase.trainable == LOCAL:
            run.client.state = replace(run.client.state, local_adapter=state or {})
        else:
            run.progress.update = state

    def _report_untrained(self, run: PhaseRun) -> None:
        """Once for each adapter, on the leader: which layers had no gradient in all of the phase."""
        adapter = run.phase.trainable
        state = run.client.state.local_adapter if adapter == LOCAL else run.progress.update
        if adapter in self._reported or not state:
            return
        self._reported.add(adapter)
        untrained = untrained_layers(state)
        if untrained:
            logger.warning(
                f"the {adapter} adapter of {list_some(untrained)} had no gradient: the model never computes with these "
                "layers as they are, so leave them out of lora.target_modules"
            )

    def _on_leader(self, compute: Callable[[], T], prefix: str = "") -> T | None:
        """What `compute()` gives on the leader, None elsewhere. A TrainingError of it is raised on all ranks
        of the group."""
        result, problem = None, None
        if self._world.is_leader:
            try:
                result = compute()
            except TrainingError as error:
                problem = f"{prefix}{error}"
        # Raised on all ranks or on none: a rank that continued alone would wait for the others in its next collective.
        problem = self._world.broadcast_json(problem)
        if problem is not None:
            raise TrainingError(problem)
        return result


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a phase of `total_steps`, as transformers' schedules with warm-up."""
    num_warmup = _num_warmup_steps(train.warmup_ratio, total_steps)
    if step < num_warmup:
        return train.learning_rate * (step / num_warmup)
    progress = (step - num_warmup) / (total_steps - num_warmup)
    match train.lr_schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - progress
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.learning_rate * factor


def _num_warmup_steps(ratio: float, total_steps: int) -> int:
    """Rounded up as by transformers' Trainer, but at least one step of a phase is left.

    The first step of a warm-up has rate 0: a phase of nothing but that step would train nothing.
    """
    return min(math.ceil(total_steps * ratio), total_steps - 1)


def _describe(client: HostedClient, server_round: int) -> str:
    """Left of the progress bar."""
    return f"round {server_round} {client.label}"


def _check_finite(state: AdapterState | None, place: str) -> None:
    """Raise TrainingError if training left NaN or infinity in `state`: that would spoil every client's average."""
    for tensor in (state or {}).values():
        if not bool(tensor.isfinite().all()):
            raise TrainingError(f"{place}: lower train.learning_rate")


def _fold(*words: int) -> int:
    """One 63-bit seed from several words."""
    return int.from_bytes(hashlib.sha256(str(words).encode()).digest()[:8], "little") >> 1
