"""`federation.server_optimizer`: against numpy, over a resume, and kept once for the whole federation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpa_ds.adapters.adapter_model import AdapterModel
from dpa_ds.adapters.state import flatten
from dpa_ds.config.load import load_config
from dpa_ds.config.schema import FederationConfig
from dpa_ds.errors import ConfigError
from dpa_ds.federation.aggregation.base import PseudoGradient, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank

ROUNDS = 5
RATE, MOMENTUM = 0.7, 0.6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_federation(folder / "data")


def recipe(inputs: tuple[Path, Path], folder: Path, num_rounds: int) -> list[str]:
    return tiny.recipe(
        *inputs,
        folder,
        federation__num_rounds=num_rounds,
        federation__server_optimizer="momentum",
        federation__server_learning_rate=RATE,
        federation__server_momentum=MOMENTUM,
        checkpoint__keep_rounds=ROUNDS,
        evaluation__every_rounds=0,
    )


def train_and_note_updates(job: Any, argv: Sequence[str]) -> dict[int, list[list[float]]]:
    """Train; round -> the adapter that each client of this leader handed in, flat."""
    from dpa_ds.cli.session import train
    from dpa_ds.federation.trainer import Trainer

    updates: dict[int, list[list[float]]] = {}
    original = Trainer.local_update

    def local_update(trainer: Any, client: Any, state: Any, server_round: int) -> Any:
        update = original(trainer, client, state, server_round)
        updates.setdefault(server_round, []).append(flatten(update.adapter).tolist())
        return update

    Trainer.local_update = local_update  # type: ignore[method-assign]
    train(load_config(argv), job)
    return updates


def saved(folder: Path, server_round: int, file: str) -> torch.Tensor:
    """What a complete round holds of the server state, flat."""
    return flatten(load_file(folder / f"tiny/rounds/round_{server_round:06d}/global/{file}.safetensors"))


def initial_adapter(argv: Sequence[str]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    from dpa_ds.adapters.methods import adapter_table
    from dpa_ds.cli.session import GLOBAL_SEED

    config = load_config(argv)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    adapters = AdapterModel(base, adapter_table(config.lora), config.lora)
    return flatten(adapters.initial_state("global", (config.seed, GLOBAL_SEED))).double().numpy()


def test_momentum_is_that_of_numpy_over_a_resume(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """v = b v + D, theta += eta v, in fp64 beside the run, which ends after round 3 and goes further in
    another process."""
    updates: dict[int, list[list[float]]] = {}
    for num_rounds in (3, ROUNDS):
        (noted,) = run_on_ranks(train_and_note_updates, 1, tmp_path, recipe(inputs, tmp_path / "runs", num_rounds))
        updates |= noted
    assert sorted(updates) == [1, 2, 3, 4, 5]
    theta = initial_adapter(recipe(inputs, tmp_path / "runs", ROUNDS))
    velocity = np.zeros_like(theta)
    for server_round in range(1, ROUNDS + 1):
        delta = np.mean(np.array(updates[server_round]), axis=0) - theta
        velocity = MOMENTUM * velocity + delta
        theta = theta + RATE * velocity
        np.testing.assert_allclose(
            saved(tmp_path / "runs", server_round, "adapter_model").numpy(),
            theta,
            rtol=1e-5,
            atol=1e-7,
        )
        found = saved(tmp_path / "runs", server_round, "server_optimizer").numpy()
        np.testing.assert_allclose(found, velocity, rtol=1e-4, atol=1e-7)


def test_what_all_leaders_share_is_not_doubled_where_the_clients_of_two_meet(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two leaders, both of which hold the velocity; the run goes further on two, and a copy of it on one: the same."""
    for name in ("two", "one"):
        run_on_ranks(train_on_rank, 2, tmp_path, recipe(inputs, tmp_path / name, 2))
    assert float(saved(tmp_path / "two", 2, "server_optimizer").norm()) > 0
    run_on_ranks(train_on_rank, 2, tmp_path, recipe(inputs, tmp_path / "two", 3))
    run_on_ranks(train_on_rank, 1, tmp_path, recipe(inputs, tmp_path / "one", 3))
    for file in ("server_optimizer", "adapter_model"):
        two, one = (saved(tmp_path / name, 3, file) for name in ("two", "one"))
        assert float((two - one).norm() / two.norm()) < 1e-5, file


def random_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(3, generator=generator)}


def test_momentum_of_zero_at_rate_one_is_fedavg_to_the_bit() -> None:
    ends = []
    for words in ({}, {"server_optimizer": "momentum", "server_momentum": 0.0}):
        optimizer = build_aggregation(FederationConfig(**words), seed=0).server_optimizer
        start = random_state(0)
        state = ServerState(start, torch.zeros(0, 0), optimizer=optimizer.initial_tensors(start))
        for server_round in (1, 2, 3):
            state = optimizer.step(state, PseudoGradient(state.adapter, random_state(server_round)), server_round)
        ends.append(state.adapter)
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_server_state_survives_being_flat() -> None:
    """As a leader that joins receives it."""
    counted = torch.tensor([1.0, 0.0, 1.0])
    state = ServerState(
        random_state(0), torch.randn(2, 3), 7.0, random_state(1), {"round": 3.0, "epsilon": 0.1}, counted
    )
    fresh = {"round": 0.0, "epsilon": 0.0}
    like = ServerState(random_state(2), torch.zeros(2, 3), 0.0, random_state(3), fresh, torch.zeros(3))
    found = like.unflatten(state.flatten())
    assert found.scalars == state.scalars
    assert found.reference_weight == 7.0
    assert torch.equal(found.references_counted, counted)
    assert torch.equal(found.reference_mean, state.reference_mean)
    for name in ("adapter", "optimizer"):
        expected, kept = getattr(state, name), getattr(found, name)
        assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_a_momentum_that_has_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server_momentum: 0.5 has no effect with federation.server_optimizer sgd"):
        build_aggregation(FederationConfig(server_momentum=0.5), seed=0)
