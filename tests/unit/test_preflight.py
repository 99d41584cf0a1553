"""Verdicts of launch/preflight.py, each both ways, on made-up facts."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpa_ds.adapters.adapter_model import count_parameters
from dpa_ds.cli.verdicts import FAILED, OK, WARNING, Needs, Row, judge, render
from dpa_ds.config.schema import LoraConfig
from dpa_ds.distributed.probes import RankFacts
from dpa_ds.distributed.topology import Topology
from tests import tiny

NEEDS = Needs(adapter=8_000_000, base_on_rank=10**9, rounds_on_disk=10**8, exchange_seconds=2.0)
TOPOLOGY = Topology((2, 2), 4)


def facts(rank: int) -> RankFacts:
    """Two hosts of two GPUs, all well."""
    return RankFacts(
        rank=rank,
        host=f"n{rank // 2}",
        group=rank // 2,
        address=f"10.0.0.{rank // 2} (ib0)",
        device=f"uuid-{rank}",
        device_name="GPU",
        num_threads=1,
        num_cores=8,
        free_device_memory=2 * 10**9,
        free_host_memory=4 * 10**9,
        free_disk=10**9,
        sees_token=True,
        clock_offset=0.01,
        gather_bandwidth=1e9,
        gather_latency=1e-4,
        exchange_seconds=0.5 if rank % 2 == 0 else 0.0,
        exchange_latency=1e-3,
    )


def rows(changed: dict[int, dict[str, object]]) -> dict[str, Row]:
    found = [replace(facts(rank), **changed.get(rank, {})) for rank in range(4)]
    return {row.what: row for row in judge(found, TOPOLOGY, NEEDS)}


def test_all_is_well() -> None:
    table = rows({})
    assert {row.verdict for row in table.values()} == {OK}
    assert list(table) == [
        "code, packages, config",
        "2 hosts",
        "placement",
        "devices",
        "free device memory",
        "free host memory",
        "output_dir",
        "clocks",
        "inside a group",
        "between leaders",
    ]
    assert table["inside a group"].measured == "8 Gbit/s (group 0), 0.10 ms"
    assert table["between leaders"].needed == "8 MB in 2 s"


@pytest.mark.parametrize(
    ("changed", "what", "verdict", "named"),
    [
        ({2: {"address": "127.0.1.1 (lo)"}}, "2 hosts", WARNING, "n1: its own name"),
        ({1: {"host": "n1"}, 2: {"host": "n0"}}, "placement", WARNING, "group 0 (2 ranks on 2 hosts), group 1"),
        ({3: {"device": "uuid-2"}}, "devices", FAILED, "n1: ranks 2, 3"),
        ({r: {"device": "", "num_threads": 5} for r in range(4)}, "devices", WARNING, "n0 (10 threads, 8 cores)"),
        ({1: {"free_device_memory": 10**8}}, "free device memory", FAILED, "rank 1 (n0)"),
        ({r: {"free_host_memory": 10**9} for r in range(4)}, "free host memory", WARNING, "n0, n1"),
        ({r: {"free_host_memory": 10**9, "device": ""} for r in range(4)}, "free host memory", FAILED, "n0, n1"),
        ({3: {"sees_token": False}}, "output_dir", FAILED, "n1: does not see"),
        ({2: {"free_disk": 10**7}}, "output_dir", FAILED, "n1: make room"),
        ({2: {"clock_offset": -3.0}}, "clocks", WARNING, "n1: its clock"),
        ({2: {"exchange_seconds": 2.5}}, "between leaders", FAILED, "GLOO_SOCKET_IFNAME"),
    ],
)
def test_what_is_off_is_named(changed: dict[int, dict[str, object]], what: str, verdict: str, named: str) -> None:
    row = rows(changed)[what]
    assert row.verdict == verdict
    assert named in row.remedy
    assert f"{verdict}: {what}: {row.remedy}" in render([row])


def test_parameters_are_counted_without_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.make_model(tmp_path_factory.mktemp("model"))
    base, shared, local = count_parameters(
        folder, LoraConfig(rank=4, local_rank=2, target_modules=["q_proj", "v_proj"])
    )
    assert base == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).parameters()
    )
    # two layers: q (32 -> 32), v (32 -> 16)
    assert shared == 2 * 4 * (32 + 32 + 32 + 16)
    assert local == shared // 2
