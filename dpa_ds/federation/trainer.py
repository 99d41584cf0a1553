"""One client's round: its phases -> a ClientUpdate. Runs on all ranks of the rank group that hosts the client."""

import hashlib
import math
import time
from dataclasses import dataclass, field

import torch

from dpa_ds.adapters.adapter_model import global_local_mix
from dpa_ds.adapters.methods import STAGES, Phase, Schedule, Stage
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.schema import RunConfig, TrainConfig
from dpa_ds.data.batching import BatchingConfig, build_step, num_steps, step_indices
from dpa_ds.data.references import References
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.preemption import PreemptionSync
from dpa_ds.distributed.world import World
from dpa_ds.engine.engine import MOMENTS, AdapterEngine
from dpa_ds.errors import CheckpointError, TrainingError
from dpa_ds.federation.aggregation.mean import ClientUpdate, Shared
from dpa_ds.federation.round_state import PhaseProgress, ProgressKeeper, RoundProgress
from dpa_ds.runs.tracking import Tracker, logger


@dataclass
class HostedClient:
    """What a client keeps to itself, in the memory of its rank group."""

    client_id: int
    label: str
    tasks: tuple[str, ...]
    """Tasks that it trains on, sorted; empty where the data names none."""
    examples: TokenizedExamples
    held_out: TokenizedExamples | None
    local_state: AdapterState
    references: References | None = None
    """Prompts that a test prompt is compared with, where the method weights by instance."""
    local_optimizer: AdapterState | None = None
    """AdamW state of the local adapter, if `train.keep_optimizer_state`."""
    carried: AdapterState | None = None
    """What the aggregation rule of its leader had kept when the run was last saved."""
    steps_taken: dict[str, int] = field(default_factory=lambda: {"global": 0, "local": 0})
    """Optimizer steps per adapter so far: the x axis of the client's curves."""


class ClientTrainer:
    """Trains hosted clients, one after the other, on the rank group's engine. Every method is collective there."""

    def __init__(
        self,
        engine: AdapterEngine,
        world: World,
        config: RunConfig,
        schedule: Schedule,
        tracker: Tracker,
        batching: BatchingConfig,
        job: JobStore,
        keeper: ProgressKeeper,
    ) -> None:
        self.engine, self.schedule, self.batching = engine, schedule, batching
        self._world, self._config, self._tracker, self._job, self._keeper = world, config, tracker, job, keeper
        self._preemption = PreemptionSync(job, world, config.checkpoint.every_minutes)
        self.progress: dict[int, RoundProgress] = {}
        """Of the current round, by client; the round loop clears it, and `starts`: what to return to if it is undone."""
        self.seconds_saving = 0.0
        """In the current round: how long training waited for snapshots of its progress."""
        self.starts: dict[int, tuple[AdapterState, AdapterState | None, dict[str, int]]] = {}

    # ---- a client's round -------------------------------------------------------------------------------------

    def restore_progress(self, client: HostedClient, server_round: int) -> None:
        """Before the first round of this process: resume where the client was interrupted inside of it."""
        found = self._keeper.find(server_round, client.client_id)
        progress = self._open(client)
        if found is not None:
            progress, saved = found
            progress.metrics.restored_tokens = progress.metrics.real_tokens
            self.progress[client.client_id] = progress
            client.local_state, client.local_optimizer = saved.tensors["local"], saved.tensors.get("local_optimizer")
            client.steps_taken = dict(saved.info["steps_taken"])
        here = torch.tensor([float(progress.phase), float(progress.inside.step)])
        if not torch.equal(self._world.broadcast_(here.clone()), here):
            raise CheckpointError(
                f"{client.label}: ranks read different progress: is output_dir one shared file system?"
            )

    def local_update(self, client: HostedClient, shared: Shared, server_round: int) -> ClientUpdate | None:
        """Run the client's phases of this round and return what it uploads; None if that is not fit to count."""
        progress = self._open(client)
        try:
            self._train(client, "before", shared, server_round)
            update = shared.adapter if progress.update is None else progress.update
            if not progress.metrics.rejected:
                self._check_update(update, shared.adapter, client, server_round)
        except TrainingError as error:
            self._undo(client, error)
            progress.phase = self._first_phase("final", server_round)
            self._save(client, server_round)
        if progress.metrics.rejected:
            return None
        reference_mean = client.references.reference_mean if client.references and progress.counts_references else None
        return ClientUpdate(client.client_id, len(client.examples), update, reference_mean)

    def run_stage(self, client: HostedClient, stage: Stage, shared: Shared, server_round: int) -> None:
        """Run the phases of a later `stage`. Where they come to nothing, what the client has uploaded counts all the same."""
        steps_taken = client.steps_taken["global"]
        try:
            self._train(client, stage, shared, server_round)
        except TrainingError as error:
            self._undo(client, error)
            client.steps_taken["global"] = steps_taken

    def finish(self, client: HostedClient, shared: Shared, server_round: int) -> None:
        """After the last round: start the local adapter from the global one and run the final phases."""
        progress, first = self._open(client), self._first_phase("final", server_round)
        progress.phase = max(progress.phase, first)  # a client that was not drawn has done nothing yet
        if not self.schedule.final:
            return
        if (progress.phase, progress.inside.step) == (first, 0):
            client.local_state, client.local_optimizer = shared.adapter, None
            self.starts[client.client_id] = (client.local_state, None, dict(client.steps_taken))
        self.run_stage(client, "final", shared, server_round)

    def _open(self, client: HostedClient) -> RoundProgress:
        """The client's progress in this round; at its beginning also what to return to if the round must be undone."""
        if client.client_id not in self.progress:
            self.progress[client.client_id] = RoundProgress(counts_references=client.steps_taken["global"] == 0)
            self.starts[client.client_id] = (client.local_state, client.local_optimizer, dict(client.steps_taken))
        return self.progress[client.client_id]

    def _first_phase(self, stage: Stage, server_round: int) -> int:
        earlier = STAGES[: STAGES.index(stage)]
        return sum(len(self.schedule.phases(one, server_round)) for one in earlier)

    def _undo(self, client: HostedClient, error: TrainingError) -> None:
        """Give the client its last good state back. Raises `error` where the recipe wants the run to stop."""
        if self._config.federation.on_bad_update == "stop":
            raise error
        client.local_state, client.local_optimizer, steps_taken = self.starts[client.client_id]
        client.steps_taken = dict(steps_taken)
        progress = self.progress[client.client_id]
        progress.update, progress.inside, progress.metrics.rejected = None, PhaseProgress(), 1
        if self._world.is_leader:
            logger.warning(f"{error}; its round is undone, and the others continue (federation.on_bad_update: skip)")

    def _check_update(
        self, update: AdapterState, current: AdapterState, client: HostedClient, server_round: int
    ) -> None:
        bound = self._config.federation.max_update_norm
        norm = math.sqrt(sum(float((update[key] - current[key]).double().square().sum()) for key in update))
        if bound is not None and norm > bound:
            raise TrainingError(
                f"{client.label} changed the global adapter by {norm:.4g} in round {server_round}, more than "
                f"federation.max_update_norm = {bound:g}"
            )

    # ---- phases -----------------------------------------------------------------------------------------------

    def _train(self, client: HostedClient, stage: Stage, shared: Shared, server_round: int) -> None:
        """Run those phases of `stage` that are not done yet."""
        progress, phases = self.progress[client.client_id], self.schedule.phases(stage, server_round)
        todo = phases[max(0, progress.phase - self._first_phase(stage, server_round)) :]
        self._tracker.advance(
            f"round {server_round} {client.label}", self._num_steps(client) * (len(phases) - len(todo))
        )
        if not todo:
            return
        own = progress.update if stage in ("before", "overlap") else None
        self.engine.write_state("global", shared.adapter if own is None else own)
        if any(phase.trainable == "local" for phase in todo):
            self.engine.write_state("local", client.local_state)
        for phase in todo:
            self._run_phase(client, phase, server_round)
            progress.phase += 1
            progress.inside = PhaseProgress()
            self._save(client, server_round)

    def _run_phase(self, client: HostedClient, phase: Phase, server_round: int) -> None:
        progress = self.progress[client.client_id]
        keeps = self._config.train.keep_optimizer_state and phase.trainable == "local"
        started = time.monotonic()
        self.engine.activate(phase)
        optimizer = progress.optimizer if progress.inside.step else client.local_optimizer if keeps else None
        if optimizer is not None:
            self.engine.write_optimizer_state(phase.trainable, optimizer)
            self.engine.write_scaler(progress.inside.scaler)
        rates = self._take_steps(client, phase, server_round)
        self._keep_state(client, phase.trainable, server_round)
        progress.optimizer = None
        if keeps:
            client.local_optimizer = self._everywhere(self.engine.read_optimizer_state("local"), "local", *MOMENTS)
        inside, metrics = progress.inside, progress.metrics
        metrics.num_steps += len(inside.losses)
        metrics.skipped_steps += inside.num_skipped
        metrics.seconds += time.monotonic() - started
        setattr(metrics, f"{phase.trainable}_loss", sum(inside.losses) / len(inside.losses))
        series = {"loss": inside.losses, "grad_norm": inside.norms, "lr": rates}
        tagged = {f"{phase.trainable}/{name}": values for name, values in series.items()}
        self._tracker.scalars(f"client_{client.client_id:02d}", tagged, client.steps_taken[phase.trainable])
        client.steps_taken[phase.trainable] += len(inside.losses)

    def _take_steps(self, client: HostedClient, phase: Phase, server_round: int) -> list[float]:
        """The optimizer steps of one phase that are not done yet; the learning rates of all of them."""
        train, world, examples = self._config.train, self._world, client.examples
        progress = self.progress[client.client_id]
        inside, metrics, every = progress.inside, progress.metrics, self._config.checkpoint.every_steps
        words = (self._config.seed, server_round, client.client_id, 0 if phase.trainable == "global" else 1)
        total, first = self._num_steps(client), inside.step
        rates = [learning_rate(train, k, total) for k in range(total)]
        indices = step_indices(len(examples), train.batch_size, total, words)
        self._tracker.advance(f"round {server_round} {client.label} {phase.trainable}", first)
        shares: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        for k in range(first, total):
            order = self._preemption.check()
            if order != "go" or (every and k % every == 0 and k > first):
                self._account(inside, shares, norms)
                self._save_inside(client, phase, server_round)
            if order == "stop":
                self._keeper.wait()
                self._job.preempt()
            torch.manual_seed(_fold(*words, k, world.rank))  # dropout needs no state of its own to resume
            step = build_step(examples, indices[k], world.rank, world.world_size, self.batching)
            share, norm, applied = self.engine.train_step(step, rates[k])
            shares.append(share)
            norms.append(norm)
            inside.step += 1
            inside.num_skipped += not applied
            metrics.real_tokens += step.real_tokens
            metrics.computed_tokens += step.computed_tokens
            self._tracker.advance(f"round {server_round} {client.label} {phase.trainable}")
        self._account(inside, shares, norms)
        if inside.num_skipped == total or not all(map(math.isfinite, inside.losses)):
            raise TrainingError(
                f"{client.label} diverged in round {server_round}, {phase.trainable} phase: {inside.num_skipped} of {total} "
                f"steps had no finite gradient, losses {inside.losses[0]:.4g} to {inside.losses[-1]:.4g}; lower "
                "train.learning_rate, or use model.precision bf16 or fp32. Earlier rounds are intact"
            )
        return rates

    def _account(self, inside: PhaseProgress, shares: list[torch.Tensor], norms: list[torch.Tensor]) -> None:
        """Losses and norms of the last steps. One exchange for many steps: nobody waits for what is only looked at."""
        if shares:
            inside.losses += self._world.all_reduce_(torch.stack(shares)).tolist()
            inside.norms += torch.stack(norms).tolist()
            shares.clear()
            norms.clear()

    def _num_steps(self, client: HostedClient) -> int:
        train = self._config.train
        return num_steps(len(client.examples), train.batch_size, train.local_epochs, train.max_steps)

    # ---- saving -----------------------------------------------------------------------------------------------

    def _keep_state(self, client: HostedClient, adapter: str, server_round: int) -> None:
        """Take the trained adapter out of the engine."""
        everywhere = self._everywhere(self.engine.read_state(adapter), adapter)
        state = _finite(everywhere, client, server_round)
        if adapter == "local":
            client.local_state = state
        else:
            self.progress[client.client_id].update = state

    def _everywhere(self, state: AdapterState | None, adapter: str, *moments: str) -> AdapterState:
        """What the engine gave the leader, on every rank of the group: here still every rank keeps its clients' states."""
        if state is None:
            shapes = self.engine.adapters.shapes[adapter]
            state = {"step": torch.empty(1)} if moments else {key: torch.empty(shape) for key, shape in shapes.items()}
            for moment in moments:
                state |= {f"{moment}.{key}": torch.empty(shape) for key, shape in shapes.items()}
        for key in sorted(state):
            self._world.broadcast_(state[key])
        return state

    def _save_inside(self, client: HostedClient, phase: Phase, server_round: int) -> None:
        """Save in the middle of a phase: the adapter that it trains, and its optimizer state."""
        started = time.monotonic()
        progress = self.progress[client.client_id]
        self._keep_state(client, phase.trainable, server_round)
        progress.optimizer = self._everywhere(
            self.engine.read_optimizer_state(phase.trainable), phase.trainable, *MOMENTS
        )
        progress.inside.scaler = self.engine.read_scaler()
        self.seconds_saving += time.monotonic() - started
        self._save(client, server_round)

    def _save(self, client: HostedClient, server_round: int) -> None:
        """Hand the client's progress to the writer in the background."""
        started = time.monotonic()
        local = {"local": client.local_state}
        if client.local_optimizer is not None:
            local["local_optimizer"] = client.local_optimizer
        self._keeper.save(server_round, client.client_id, self.progress[client.client_id], local, client.steps_taken)
        self.seconds_saving += time.monotonic() - started


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a phase of `total_steps`, as transformers' schedules without warm-up."""
    match train.lr_schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - step / total_steps
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * step / total_steps))
    return train.learning_rate * factor


def held_out_loss(
    engine: AdapterEngine,
    world: World,
    examples: TokenizedExamples,
    alpha: float,
    max_examples: int,
    batching: BatchingConfig,
) -> float:
    """Mean loss per label token of the first `max_examples` examples, the adapters mixed as (1 - alpha, alpha).

    The adapters must already be in the engine. Collective: all ranks of the group.
    """
    indices = range(min(len(examples), max_examples))
    step = build_step(examples, indices, world.rank, world.world_size, batching)
    return engine.loss([step], global_local_mix(alpha))


def _finite(state: AdapterState, client: HostedClient, server_round: int) -> AdapterState:
    """`state`, unless training left NaN or infinity in it: that would spoil every client's average."""
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise TrainingError(f"{client.label} diverged in round {server_round}: lower train.learning_rate")
    return state


def _fold(*words: int) -> int:
    """One 63-bit seed from several words."""
    return int.from_bytes(hashlib.sha256(str(words).encode()).digest()[:8], "little") >> 1
