"""`federation.compression: int16`: half of the bytes, nothing lost for good, and a run that was stopped
continues with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpa_ds.config.schema import FederationConfig
from dpa_ds.federation.aggregation.base import LeaderState, LocalUpdate, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from dpa_ds.federation.aggregation.reductions.int16 import _pack, _unpack
from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank

INT16 = FederationConfig(compression="int16", aggregation_weights="num_examples")
ROUNDS = 12
SIZES = {"layer.lora_A": (3, 17), "layer.lora_B": (5, 3)}
"""Odd in all, so that one half of an int32 is padding."""


def change(client: int, server_round: int) -> dict[str, torch.Tensor]:
    """What a client adds to the global adapter in a round: small beside the adapter, of another size in each tensor."""
    generator = torch.Generator().manual_seed(100 * server_round + client)
    scales = dict(zip(SIZES, (1e-3, 1e-6), strict=True))
    return {key: scales[key] * torch.randn(*size, generator=generator) for key, size in SIZES.items()}


def average_in_rounds(job: Any, feeds_back: bool) -> tuple[list[float], list[float], int]:
    """Leader 0 hosts clients 0 and 1, leader 1 client 2, leader 2 nobody.

    Returns:
        the final adapter's first tensor less what exact averages give, the whole adapter, and bytes handed over.
    """
    from dpa_ds.distributed.leaders import StaticGroup

    rank = job.launch.global_rank
    group = StaticGroup(job.store, rank, job.launch.job_world_size, 30.0)
    examples = (3, 5, 7)
    aggregation = build_aggregation(INT16, seed=0)
    state = ServerState(
        {key: torch.zeros(*size) for key, size in SIZES.items()}, torch.zeros(2, 4), references_counted=torch.zeros(3)
    )
    exact = {key: torch.zeros(*size, dtype=torch.float64) for key, size in SIZES.items()}
    for server_round in range(ROUNDS):
        accumulator = aggregation.accumulator(state)
        for client in ((0, 1), (2,), ())[rank]:
            adapter = {key: state.adapter[key] + value for key, value in change(client, server_round).items()}
            accumulator.add(LocalUpdate(client, examples[client], adapter, torch.full((2, 4), float(client))))
        state = aggregation.step(state, accumulator.reduce(group), server_round)
        if not feeds_back:
            aggregation.reduction.leader_state = LeaderState()
        for key, value in exact.items():
            value.add_(sum(n * change(c, server_round)[key].double() for c, n in enumerate(examples)) / sum(examples))
    assert state.reference_weight == 15.0
    torch.testing.assert_close(state.reference_mean, torch.full((2, 4), (5 * 1 + 7 * 2) / 15))
    first = next(iter(SIZES))
    errors = (state.adapter[first].double() - exact[first]).flatten()
    return errors.tolist(), state.flatten().tolist(), group.bytes_handed["update"]


def test_rounding_is_made_up_for_and_all_leaders_have_the_same_bits(tmp_path: Path) -> None:
    found = run_on_ranks(average_in_rounds, 3, tmp_path, True)
    assert found[0][1] == found[1][1] == found[2][1]
    without = run_on_ranks(average_in_rounds, 3, tmp_path, False)
    # The first tensor's grid: three leaders' largest changes, some 4e-3 each at most, over 30,000. What is
    # left after all rounds
    # is that of one round, half a unit a leader, and fp32's rounding.
    error, error_without = (torch.tensor(one[0][0]) for one in (found, without))
    assert float(error.abs().max()) < 1.5 * 3 * 4e-3 / 30_000 + 1e-8
    assert float(error_without.norm()) > 1.5 * float(error.norm())
    parameters = 3 * 17 + 5 * 3
    header, numbers = 4 * (1 + 2 * len(SIZES)), 4 * (parameters // 2 + 1)
    assert {handed for _, _, handed in found} == {ROUNDS * (header + numbers)}


def average_without_leader_1(job: Any, clients_of_0: tuple[int, ...]) -> list[float]:
    """One round in which leader 1, with client 2, is gone after the header: nothing of it is in the numbers."""
    from dpa_ds.distributed.leaders import StaticGroup

    rank = job.launch.global_rank

    class Losing(StaticGroup):
        def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
            if rank == 1 and buffer.dtype == torch.int32:
                buffer.zero_()
            super().all_reduce_(buffer, purpose)

    aggregation = build_aggregation(INT16, seed=0)
    start = ServerState({key: torch.zeros(*size) for key, size in SIZES.items()}, torch.zeros(0, 0))
    accumulator = aggregation.accumulator(start)
    for client in (clients_of_0, (2,))[rank]:
        accumulator.add(LocalUpdate(client, client + 1, change(client, 0), None))
    group = Losing(job.store, rank, job.launch.job_world_size, 30.0)
    state = aggregation.step(start, accumulator.reduce(group), 1)
    return [float(value) for value in state.adapter["layer.lora_A"].flatten()]


def test_a_leader_that_is_lost_between_the_exchanges_is_left_out(tmp_path: Path) -> None:
    (found, same) = run_on_ranks(average_without_leader_1, 2, tmp_path, (0, 1))
    assert found == same
    expected = (change(0, 0)["layer.lora_A"] + 2 * change(1, 0)["layer.lora_A"]) / 3
    assert found == pytest.approx(expected.flatten().tolist(), abs=1e-6)  # changes of 1e-3
    for found in run_on_ranks(average_without_leader_1, 2, tmp_path, ()):
        assert not any(found), "nobody is left: the adapter stays"


def test_pairs_of_numbers_add_up_like_the_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 1000):
        parts = [torch.randint(-10_000, 10_001, (count,), generator=generator, dtype=torch.int32) for _ in range(3)]
        parts[0][0], parts[1][0], parts[2][0] = (
            -10_000,
            -10_000,
            -12_767,
        )  # the sum is the smallest that may be
        assert torch.equal(_unpack(sum(map(_pack, parts)), count), sum(parts))
        assert torch.equal(_unpack(sum(_pack(-part) for part in parts), count), -sum(parts))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_federation(folder / "data")


def train(folder: Path, inputs: tuple[Path, Path], rounds: int, ranks: int = 2, **words: Any) -> None:
    argv = tiny.recipe(*inputs, folder, federation__num_rounds=rounds, evaluation__every_rounds=0, **words)
    run_on_ranks(train_on_rank, ranks, folder.parent, argv)


def results(folder: Path, server_round: int) -> dict[str, torch.Tensor]:
    root = folder / f"tiny/rounds/round_{server_round:06d}"
    return {
        f"{path.parent.relative_to(root)}.{key}": tensor
        for path in sorted(root.glob("**/adapter_model.safetensors"))
        for key, tensor in load_file(path).items()
    }


def test_a_run_is_that_of_fp32_in_half_of_the_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    train(tmp_path / "fp32", inputs, 3)
    train(tmp_path / "int16", inputs, 3, federation__compression="int16")
    expected, found = (results(tmp_path / name, 3) for name in ("fp32", "int16"))
    assert expected.keys() == found.keys()
    differ = [float((expected[key] - found[key]).norm() / expected[key].norm()) for key in expected]
    assert 0 < max(differ) < 1e-3
    bytes_handed = {}
    for name in ("fp32", "int16"):
        records = read_records(tmp_path / name / "tiny/metrics.jsonl")
        (bytes_handed[name],) = [r["bytes_handed/update"] for r in records if r["kind"] == "round" and r["round"] == 3]
    tensors = sum(key.startswith("global.") for key in found)
    assert bytes_handed["int16"] - 8 * tensors == pytest.approx(bytes_handed["fp32"] / 2, abs=16)


def test_the_residual_outlives_the_process_and_another_layout(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    train(tmp_path / "whole", inputs, 4, federation__compression="int16")
    train(tmp_path / "parts", inputs, 2, federation__compression="int16")
    residuals = [
        load_file(path) for path in sorted((tmp_path / "parts").glob("tiny/adapters/local/*/leader_state.safetensors"))
    ]
    assert len(residuals) == 2, "one a leader"
    assert all(any(bool(tensor.any()) for tensor in one.values()) for one in residuals)
    train(tmp_path / "parts", inputs, 3, federation__compression="int16")
    whole, parts = (results(tmp_path / name, 3) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    train(tmp_path / "parts", inputs, 4, ranks=1, federation__compression="int16")
    whole, parts = (results(tmp_path / name, 4) for name in ("whole", "parts"))
    assert all(float((whole[key] - parts[key]).norm() / whole[key].norm()) < 1e-4 for key in whole)
    left = list((tmp_path / "parts").glob("tiny/adapters/local/*/leader_state.safetensors"))
    assert [path.parent.name for path in left] == ["client_00"]
