"""A client's adapters do not depend on ranks, ZeRO stage, micro-batches or hosting, and equal a plain PyTorch loop."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpa_ds.config.load import load_config
from dpa_ds.config.shipped import SHIPPED
from tests import plain, tiny
from tests.plain_start import start_plain
from tests.ranks import run_on_ranks, train_on_rank

pytestmark = pytest.mark.multirank
ROUNDS, ALPHA_MIX, LEARNING_RATE, CLIP = 2, 0.4, 1e-2, 1.0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Adapters:
    """The final adapters of a run."""

    global_state: plain.State
    local: list[plain.State]

    def assert_close(self, other: "Adapters", tolerance: float) -> None:
        for ours, theirs in [
            (self.global_state, other.global_state),
            *zip(self.local, other.local, strict=True),
        ]:
            assert ours.keys() == theirs.keys()
            for key in ours:
                error = (ours[key] - theirs[key]).norm() / theirs[key].norm().clamp_min(1e-12)
                assert error < tolerance, (key, float(error))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny.make_model(folder / "model"), tiny.make_federation(folder / "data"), folder


def run(inputs: tuple[Path, Path, Path], tmp_path: Path, num_ranks: int, **overrides: Any) -> Adapters:
    model, data, _ = inputs
    settings = {"method__alpha": ALPHA_MIX, "federation__num_rounds": ROUNDS, "train__learning_rate": LEARNING_RATE}
    argv = tiny.recipe(model, data, tmp_path / "runs", **{**settings, **overrides})
    run_on_ranks(train_on_rank, num_ranks, tmp_path, argv)
    adapters = tmp_path / "runs" / "tiny" / "adapters"
    local = sorted((adapters / "local").iterdir())
    return Adapters(
        load_file(adapters / "global" / "adapter_model.safetensors"),
        [load_file(folder / "adapter_model.safetensors") for folder in local],
    )


def start(
    inputs: tuple[Path, Path, Path], pooled: bool = False, **overrides: Any
) -> tuple[plain.Plain, list[plain.Client], plain.State]:
    """The plain model, its clients and the initial global adapter, as the recipe of `run` describes them."""
    model, data, folder = inputs
    settings = {"train__learning_rate": LEARNING_RATE, "train__max_grad_norm": CLIP, **overrides}
    return start_plain(load_config(tiny.recipe(model, data, folder / "reference", **settings)), pooled)


@pytest.fixture(scope="module")
def reference(inputs: tuple[Path, Path, Path]) -> Adapters:
    """feddpa_t by the plain loop."""
    model, clients, initial = start(inputs)
    final = plain.feddpa_t(model, clients, initial, ROUNDS, ALPHA_MIX)
    return Adapters(final, [client.local for client in clients])


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_group", "stage", "micro_batch_tokens"),
    [
        (1, "auto", "zero0", 128),
        (1, "auto", "zero1", 4096),
        (1, "auto", "zero3", 32),
        (2, "auto", "zero1", 128),  # 2 groups that host 2 clients each
        (4, "auto", "zero2", 128),  # 4 groups
        (4, "auto", "zero3", 64),
        (2, 2, "zero0", 64),  # 1 group of 2 ranks
        (2, 2, "zero1", 32),
        (2, 2, "zero2", 4096),
        (2, 2, "zero3", 128),
        (2, 2, "zero3_offload_cpu", 64),
        (4, 2, "zero1", 64),  # 2 groups of 2
        (4, [2, 1, 1], "zero2", 64),  # groups of unequal size, clients of unequal size and step count
        (4, 4, "zero0", 64),
        (4, 4, "zero1", 16),
        (4, 4, "zero2", 128),
        (4, 4, "zero3", 128),
    ],
)
def test_every_layout_gives_the_adapters_of_a_plain_loop(
    inputs: Any,
    reference: Adapters,
    tmp_path: Path,
    num_ranks: int,
    ranks_per_group: Any,
    stage: str,
    micro_batch_tokens: int,
) -> None:
    result = run(
        inputs,
        tmp_path,
        num_ranks,
        cluster__ranks_per_group=ranks_per_group,
        engine__deepspeed_config=f"ds_configs/{stage}.json",
        train__micro_batch_tokens=micro_batch_tokens,
    )
    result.assert_close(reference, TOLERANCE)


TUNED: dict[str, dict[str, Any]] = {
    "warm-up": {"train__warmup_ratio": 0.3, "train__local_epochs": 3.0},
    "rslora": {"lora__scaling": "rslora"},
}
"""What tuners set, by a word for it."""


@pytest.mark.parametrize("word", TUNED)
@pytest.mark.parametrize(("num_ranks", "ranks_per_group", "stage", "micro_batch_tokens"), [
    (1, "auto", "zero0", 128), (4, 2, "zero2", 32), (2, 2, "zero3", 64),
])  # fmt: skip
def test_what_tuners_set_gives_the_adapters_of_a_plain_loop(
    inputs: Any, tmp_path: Path, num_ranks: int, ranks_per_group: Any, stage: str, micro_batch_tokens: int, word: str
) -> None:
    model, clients, initial = start(inputs, **TUNED[word])
    final = plain.feddpa_t(model, clients, initial, ROUNDS, ALPHA_MIX)
    expected = Adapters(final, [client.local for client in clients])
    layout = {
        "cluster__ranks_per_group": ranks_per_group,
        "engine__deepspeed_config": f"ds_configs/{stage}.json",
        "train__micro_batch_tokens": micro_batch_tokens,
    }
    run(inputs, tmp_path, num_ranks, **layout, **TUNED[word]).assert_close(expected, TOLERANCE)


@pytest.mark.parametrize(("num_ranks", "partition_size"), [(2, 1), (2, 2), (4, 2)])
def test_a_second_share_in_each_host_changes_nothing(
    inputs: Any, reference: Adapters, tmp_path: Path, num_ranks: int, partition_size: int
) -> None:
    """ZeRO++'s hpZ: a forward pass gathers from the first share, later ones from the second."""
    shipped = json.loads((SHIPPED / "ds_configs" / "zeropp.json").read_text())
    shipped["zero_optimization"] |= {
        "zero_hpz_partition_size": partition_size,
        "stage3_param_persistence_threshold": 0,  # the tiny model's adapters would stay gathered
    }
    path = tmp_path / "hpz.json"
    path.write_text(json.dumps(shipped))
    result = run(inputs, tmp_path, num_ranks, cluster__ranks_per_group=num_ranks, engine__deepspeed_config=path)
    result.assert_close(reference, TOLERANCE)


def test_the_comparison_can_fail(inputs: Any, reference: Adapters, tmp_path: Path) -> None:
    result = run(inputs, tmp_path, 1, method__alpha=ALPHA_MIX + 0.001)
    with pytest.raises(AssertionError):
        result.assert_close(reference, TOLERANCE)


def test_global_source_aggregated(inputs: Any, tmp_path: Path) -> None:
    model, clients, initial = start(inputs)
    final = plain.feddpa_t(model, clients, initial, ROUNDS, ALPHA_MIX, partner="aggregated")
    result = run(inputs, tmp_path, 2, method__global_source="aggregated")
    result.assert_close(Adapters(final, [client.local for client in clients]), TOLERANCE)


def test_local_first_is_the_published_code(inputs: Any, tmp_path: Path) -> None:
    model, clients, initial = start(inputs)
    final = plain.feddpa_t(model, clients, initial, ROUNDS, ALPHA_MIX, order="local_first", partner="none")
    result = run(inputs, tmp_path, 2, method__phase_order="local_first")
    result.assert_close(Adapters(final, [client.local for client in clients]), TOLERANCE)


def test_weighting_by_num_examples(inputs: Any, tmp_path: Path) -> None:
    model, clients, initial = start(inputs)
    sizes = [float(len(client.examples)) for client in clients]
    final = plain.feddpa_t(model, clients, initial, ROUNDS, ALPHA_MIX, weights=sizes)
    result = run(inputs, tmp_path, 2, federation__aggregation_weights="num_examples")
    result.assert_close(Adapters(final, [client.local for client in clients]), TOLERANCE)


@pytest.mark.parametrize("method", ["feddpa_f", "fedlora", "fedit"])
def test_methods_with_a_global_phase_only(inputs: Any, tmp_path: Path, method: str) -> None:
    model, clients, initial = start(inputs)
    untouched = [client.local for client in clients]
    final = plain.feddpa_f(model, clients, initial, ROUNDS)
    result = run(inputs, tmp_path, 2, method__name=method)
    local = untouched if method == "fedit" else [client.local for client in clients]
    result.assert_close(Adapters(final, local), TOLERANCE)


def test_local_never_touches_the_global_adapter(inputs: Any, tmp_path: Path) -> None:
    model, clients, initial = start(inputs)
    for client in clients:
        model.load("local", client.local)
        for server_round in range(1, ROUNDS + 1):
            model.phase(client, "local", (0.0, 1.0), server_round)
        client.local = model.state("local")
    result = run(inputs, tmp_path, 2, method__name="local")
    result.assert_close(Adapters(initial, [client.local for client in clients]), TOLERANCE)
    assert all(torch.equal(result.global_state[key], initial[key]) for key in initial)


def test_centralized_trains_one_adapter_on_the_union(inputs: Any, tmp_path: Path) -> None:
    model, clients, initial = start(inputs, pooled=True)
    model.load("global", initial)
    for server_round in range(1, ROUNDS + 1):
        model.phase(clients[0], "global", (1.0, 0.0), server_round)
    result = run(inputs, tmp_path, 2, method__name="centralized")
    result.assert_close(Adapters(model.state("global"), [clients[0].local]), TOLERANCE)
