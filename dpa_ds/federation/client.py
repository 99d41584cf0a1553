"""One client's round: its phases -> a ClientUpdate. Runs on all ranks of the rank group that hosts the client."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dpa_ds.config import RunConfig, TrainConfig
from dpa_ds.data.batches import build_step, num_steps, step_indices
from dpa_ds.data.prompts import TokenizedExamples
from dpa_ds.data.references import References
from dpa_ds.distributed.federation_group import AdapterState
from dpa_ds.distributed.world import World
from dpa_ds.errors import TrainingError
from dpa_ds.federation.aggregation import ClientUpdate, Shared
from dpa_ds.federation.methods import Schedule
from dpa_ds.model.dual_adapter import Phase
from dpa_ds.model.engine import AdapterEngine
from dpa_ds.tracking import Tracker


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
    steps_taken: dict[str, int] = field(default_factory=lambda: {"global": 0, "local": 0})
    """Optimizer steps per adapter so far: the x axis of the client's curves."""


@dataclass
class RoundMetrics:
    """Numbers of one client and round, summed over its phases. Losses are means per label token."""

    num_steps: int = 0
    seconds: float = 0.0
    real_tokens: int = 0
    computed_tokens: int = 0
    global_loss: float = 0.0
    """Mean training loss of the global phase's steps."""
    local_loss: float = 0.0
    skipped_steps: int = 0
    """Steps that DeepSpeed left out because their gradient was not finite (fp16: while the loss scale settles)."""


class ClientTrainer:
    """Trains hosted clients, one after the other, on the rank group's engine. Every method is collective there."""

    def __init__(
        self, engine: AdapterEngine, world: World, config: RunConfig, schedule: Schedule, tracker: Tracker, pad_id: int
    ) -> None:
        self.engine, self.schedule = engine, schedule
        self._world, self._config, self._tracker, self.pad_id = world, config, tracker, pad_id
        self.metrics: dict[int, RoundMetrics] = {}
        """Of the current round, by client; the round loop clears it."""

    def before_aggregation(self, client: HostedClient, shared: Shared, server_round: int) -> ClientUpdate:
        """Run the client's phases of this round and return what it uploads."""
        is_first = client.steps_taken["global"] == 0
        self.engine.write_state("global", shared.adapter)
        self._train(client, self.schedule.phases("before", server_round), server_round)
        adapter = _finite(self.engine.read_state("global"), client, server_round)
        mean_states = client.references.mean_states if client.references and is_first else None
        return ClientUpdate(client.client_id, len(client.examples), adapter, mean_states)

    def after_aggregation(self, client: HostedClient, shared: Shared, server_round: int) -> None:
        """Run the phases that train beside this round's aggregated global adapter."""
        if self.schedule.after:
            self.engine.write_state("global", shared.adapter)
            self._train(client, self.schedule.phases("after", server_round), server_round)

    def finish(self, client: HostedClient, shared: Shared, server_round: int) -> None:
        """After the last round: start the local adapter from the global one and run the final phases."""
        if self.schedule.final:
            client.local_state = {key: value.clone() for key, value in shared.adapter.items()}
            client.local_optimizer = None
            self.engine.write_state("global", shared.adapter)
            self._train(client, self.schedule.final, server_round)

    def _train(self, client: HostedClient, phases: Sequence[Phase], server_round: int) -> None:
        trains_local = any(phase.trains == "local" for phase in phases)
        if trains_local:
            self.engine.write_state("local", client.local_state)
        for phase in phases:
            self._run_phase(client, phase, server_round)
        if trains_local:
            client.local_state = _finite(self.engine.read_state("local"), client, server_round)

    def _run_phase(self, client: HostedClient, phase: Phase, server_round: int) -> None:
        keeps = self._config.train.keep_optimizer_state and phase.trains == "local"
        started = time.monotonic()
        self.engine.activate(phase)
        if keeps and client.local_optimizer is not None:
            self.engine.write_optimizer_state("local", client.local_optimizer)
        series = self._take_steps(client, phase, server_round)
        if keeps:
            client.local_optimizer = self.engine.read_optimizer_state("local")
        losses = series["loss"]
        metrics = self.metrics[client.client_id]
        metrics.num_steps += len(losses)
        metrics.seconds += time.monotonic() - started
        setattr(metrics, f"{phase.trains}_loss", sum(losses) / len(losses))
        tagged = {f"{phase.trains}/{name}": values for name, values in series.items()}
        self._tracker.scalars(f"client_{client.client_id:02d}", tagged, client.steps_taken[phase.trains])
        client.steps_taken[phase.trains] += len(losses)

    def _take_steps(self, client: HostedClient, phase: Phase, server_round: int) -> dict[str, list[float]]:
        """The optimizer steps of one phase; their loss, gradient norm and learning rate."""
        train, world, examples = self._config.train, self._world, client.examples
        metrics = self.metrics.setdefault(client.client_id, RoundMetrics())
        words = (self._config.seed, server_round, client.client_id, 0 if phase.trains == "global" else 1)
        total = num_steps(len(examples), train.batch_size, train.local_epochs, train.max_steps)
        rates = [learning_rate(train, k, total) for k in range(total)]
        shares, norms, num_skipped = [], [], 0
        for k, indices in enumerate(step_indices(len(examples), train.batch_size, total, words)):
            torch.manual_seed(_fold(*words, k, world.rank))  # dropout needs no state of its own to resume
            step = build_step(examples, indices, world.rank, world.world_size, train.micro_batch_tokens, self.pad_id)
            share, norm, applied = self.engine.train_step(step, rates[k])
            shares.append(share)
            norms.append(norm)
            num_skipped += not applied
            metrics.real_tokens += step.real_tokens
            metrics.computed_tokens += step.computed_tokens
            self._tracker.advance(f"round {server_round} {client.label} {phase.trains}")
        # One exchange per phase, not per step: nobody waits for a number that is only looked at.
        losses: list[float] = world.all_reduce_(torch.stack(shares)).tolist()
        metrics.skipped_steps += num_skipped
        if num_skipped == total or not all(map(math.isfinite, losses)):
            raise TrainingError(
                f"{client.label} diverged in round {server_round}, {phase.trains} phase: {num_skipped} of {total} steps "
                f"had no finite gradient, losses {losses[0]:.4g} to {losses[-1]:.4g}; lower train.learning_rate, or use "
                "model.precision bf16 or fp32. Earlier rounds are intact"
            )
        return {"loss": losses, "grad_norm": torch.stack(norms).tolist(), "lr": rates}


def _finite(state: AdapterState, client: HostedClient, server_round: int) -> AdapterState:
    """`state`, unless training left NaN or infinity in it: that would spoil every client's average."""
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise TrainingError(f"{client.label} diverged in round {server_round}: lower train.learning_rate")
    return state


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


def _fold(*words: int) -> int:
    """One 63-bit seed from several words."""
    return int.from_bytes(hashlib.sha256(str(words).encode()).digest()[:8], "little") >> 1
