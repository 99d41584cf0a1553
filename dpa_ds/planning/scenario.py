"""What is to be planned: a model, a recipe, and the data of its clients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpa_ds.config.schema import ALL_LINEAR, LoraConfig, ModelConfig, RunConfig, TrainConfig
from dpa_ds.errors import ModelError
from dpa_ds.planning.memory import Lora
from dpa_ds.planning.shapes import Shape

PHASES = {"feddpa_t": 2, "feddpa_f": 1, "fedit": 1, "fedlora": 1, "local": 1, "centralized": 1}
"""Phases of a round by method; the phase after the last round of feddpa_f and fedlora is not in it."""


@dataclass(frozen=True)
class Workload:
    """The clients' data. The defaults are the authors' dataset1."""

    clients: int = 8
    examples: int = 300
    """Training examples of a client."""
    tokens: float = 70.0
    """Mean length of an example, prompt and answer."""


@dataclass(frozen=True)
class Scenario:
    """A model that a recipe trains on some data: all that memory and time follow from, but for layout and cluster."""

    shape: Shape
    model: ModelConfig
    lora: Lora
    train: TrainConfig
    method: str
    client_fraction: float
    max_length: int
    """Longest prompt + answer, in tokens."""
    workload: Workload = Workload()
    num_rounds: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    """zero_optimization of the recipe's DeepSpeed JSON."""

    @property
    def num_clients(self) -> int:
        """Clients as the method sees them: centralized pools all data in one."""
        if self.method == "centralized":
            return 1
        return self.workload.clients

    @property
    def num_drawn(self) -> int:
        """Clients that train in a round."""
        return max(1, round(self.num_clients * self.client_fraction))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a client in a round, in all phases."""
        phases = PHASES[self.method]
        if self.train.max_steps:
            return phases * self.train.max_steps
        examples = self.workload.examples * self.workload.clients / self.num_clients
        steps_of_epoch = math.ceil(examples / self.train.batch_size)
        return phases * math.ceil(steps_of_epoch * self.train.local_epochs)

    @property
    def bytes_between_groups(self) -> int:
        """What a leader hands over in a round, in fp32: 4 x (adapter + 1), where the method weights by instance
        4 x (2 hidden + 1 + clients) more; and a table of 15 fp64 for each client."""
        table = self.num_clients * 15 * 8
        if self.method == "local":
            return table
        numbers = self.lora.parameters(self.shape)[0] + 1
        if self.method in ("feddpa_t", "feddpa_f"):  # the reference mean, which weights its two adapters
            numbers += 2 * self.shape.hidden + 1 + self.num_clients
        return 4 * numbers + table


def scenario_of(config: RunConfig, shape: Shape, zero: Mapping[str, Any], workload: Workload) -> Scenario:
    """The scenario of a recipe; `zero` is zero_optimization of its DeepSpeed JSON.

    What is planned for need not be here: precision auto is bf16, which every accelerator that holds such models has.
    """
    model = config.model
    if model.precision == "auto":
        model = replace(model, precision="bf16")
    return Scenario(
        shape=shape,
        model=model,
        lora=lora_of(config.lora, shape),
        train=config.train,
        method=config.method.name,
        client_fraction=config.federation.client_fraction,
        max_length=config.data.max_length,
        workload=workload,
        num_rounds=config.federation.num_rounds,
        zero=zero,
    )


def lora_of(lora: LoraConfig, shape: Shape) -> Lora:
    """The recipe's adapters on a model of this shape."""
    targets = tuple(lora.target_modules)
    if lora.target_modules == ALL_LINEAR:
        if shape.experts:
            raise ModelError(
                "lora.target_modules: all-linear adapts every expert of this model, which the planner does not know: "
                f"name layers of {sorted(shape.linears)}"
            )
        targets = tuple(shape.linears)
    return Lora(targets, lora.rank, lora.local_rank or lora.rank, lora.dropout > 0)
