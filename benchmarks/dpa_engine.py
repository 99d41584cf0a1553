"""This project's engine, as a benchmark drives it: a job of one rank, phases that start from given weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import peft
import torch

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.methods import GLOBAL, LOCAL, Phase
from dpa_ds.adapters.mixed_lora import MixedLora
from dpa_ds.adapters.state import AdapterState
from dpa_ds.config.deepspeed_json import load_deepspeed_json
from dpa_ds.config.schema import RunConfig
from dpa_ds.data.batching import StepBatch, build_step
from dpa_ds.data.tokenize import TokenizedExamples
from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.launchers import Launch
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World, build_world
from dpa_ds.engine.engine import AdapterEngine, build_deepspeed_json
from dpa_ds.federation.trainer import learning_rate


def world_of_one_rank(config: RunConfig) -> World:
    """A job of one rank. A process has one, which all its engines share."""
    job = JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))
    return build_world(job, Topology((1,), 1), config.cluster, config.federation.timeout_seconds)


class DpaEngine:
    """This project's engine in a job of one rank; a phase as `ClientTrainer` runs it, without its bookkeeping."""

    def __init__(
        self,
        adapters: AdapterModel,
        config: RunConfig,
        examples: TokenizedExamples,
        states: dict[str, AdapterState],
        pad_id: int,
        clock: Callable[[], float],
        world: World,
    ) -> None:
        path = config.engine.deepspeed_config
        ds_json = build_deepspeed_json(load_deepspeed_json(path), path, config.train, config.model.precision, 1)
        self._engine = AdapterEngine(adapters, world, config.train, ds_json)
        self._train, self._examples, self._states = config.train, examples, states
        self._batching = self._engine.rows.batching(config.train.micro_batch_tokens, pad_id)
        self._clock = clock

    def build(self, step: Sequence[int], prefix_sharing: bool = True) -> StepBatch:
        """Tensors of one step."""
        batching = replace(self._batching, prefix_sharing=prefix_sharing and self._batching.prefix_sharing)
        return build_step(self._examples, step, 0, 1, batching)

    def run(
        self, phase: Phase, steps: Sequence[Sequence[int]], prefix_sharing: bool = True, peft_layers: bool = False
    ) -> tuple[float, list[float]]:
        """Seconds of a phase from the starting weights, the building of its batches included; losses of its steps.

        Without a shared prefix, or with PEFT's own LoRA layers, it is what came before these; the losses are the same.
        """
        with computed_by_peft(self._engine.adapters, phase.alpha) if peft_layers else nullcontext():
            return self._run(phase, steps, prefix_sharing)

    def _run(self, phase: Phase, steps: Sequence[Sequence[int]], prefix_sharing: bool) -> tuple[float, list[float]]:
        for adapter, state in self._states.items():
            self._engine.write_state(adapter, state)
        started = self._clock()
        self._engine.activate(phase)
        shares = []
        for k, indices in enumerate(steps):
            share, _, _ = self._engine.train_step(
                self.build(indices, prefix_sharing), learning_rate(self._train, k, len(steps))
            )
            shares.append(share)
        losses = torch.stack(shares).tolist()  # waits for the device
        return self._clock() - started, losses


@contextmanager
def computed_by_peft(adapters: AdapterModel, alpha: float) -> Iterator[None]:
    """Have PEFT's own layers compute, for timing; `alpha` is the local adapter's weight."""
    ours = MixedLora.forward
    MixedLora.forward = peft.tuners.lora.Linear.forward  # type: ignore[method-assign]
    for layer in adapters.layers:
        layer.scaling = {GLOBAL: (1 - alpha) * adapters.scale, LOCAL: alpha * adapters.scale}
    try:
        yield
    finally:
        MixedLora.forward = ours  # type: ignore[method-assign]


def random_state(adapters: AdapterModel, adapter: str) -> AdapterState:
    """PEFT's initial weights, but with B not zero: with B = 0 the first loss would not tell whether A and
    alpha agree."""
    position = list(adapters.table).index(adapter)
    state = adapters.initial_state(adapter, (0, position))
    generator = torch.Generator().manual_seed(position)
    return {
        key: torch.randn(value.shape, generator=generator) * 0.02 if ".lora_B." in key else value
        for key, value in state.items()
    }
