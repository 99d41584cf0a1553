"""What a round costs beside its steps: `python benchmarks/round.py`.

aggregation: the leaders' weighted average of an adapter (collecting, dividing and taking apart included)
against a bare gloo all-reduce of as many bytes, in turns. phase switch: adapters installed, the phase changed,
the trained one
gathered, on a small base and on a large one with adapters of the same size. The share of a real round:
`--profile` of launch/run.py.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner import Case, Setting, _build, write_model, write_recipe
from progress import measuring
from table import seconds_of, spread, where_and_when

from dpa_ds.planning.shapes import PRESETS

BASES = {"small": Setting(256, 688, 6, vocab_size=4000), "large": Setting(256, 12000, 6, vocab_size=64000)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="llama-13b", help="whose adapter is averaged (%(default)s)")
    parser.add_argument("--leaders", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=11, help="(%(default)s)")
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="stage of the phase switch (%(default)s)")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    print(where_and_when())
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        measuring("aggregation beside a bare all-reduce")
        mp.spawn(_leader, (args.leaders, folder, args.model, args.repeats), nprocs=args.leaders)
        found = json.loads((Path(folder) / "aggregation.json").read_text())
        print(
            f"{args.leaders} leaders, adapter of {args.model}, {found['bytes'] / 1e6:.1f} MB, {args.repeats} repeats:"
        )
        print(f"  aggregation / bare all-reduce   {_ratio(found['ours'], found['bare'])}")
        seconds = {}
        for name in BASES:
            measuring(f"phase switches over {name}")
            mp.spawn(_switches, (folder, name, args.zero, args.repeats), nprocs=1)
            found = json.loads((Path(folder) / f"{name}.json").read_text())
            seconds[name] = found["seconds"]
            median = statistics.median(seconds[name]) * 1e3
            print(f"two phase switches, ZeRO {args.zero}, base of {found['parameters'] / 1e6:.1f} M: {median:.2f} ms")
        print(f"  large base / small base         {_ratio(seconds['large'], seconds['small'])}")


def _leader(rank: int, leaders: int, folder: str, model: str, repeats: int) -> None:
    import torch
    import torch.distributed as dist

    from dpa_ds.config.schema import FederationConfig
    from dpa_ds.distributed.leaders import StaticGroup
    from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState
    from dpa_ds.federation.aggregation.pipeline import build_aggregation

    torch.set_num_threads(1)
    group = StaticGroup(dist.FileStore(f"{folder}/store", leaders), rank, leaders, 60.0)
    shape = PRESETS[model]
    adapter = {}
    for layer in range(shape.layers):
        for name in ("q_proj", "v_proj"):
            inputs, outputs = shape.linears[name]
            adapter[f"{layer:02d}.{name}.A"] = torch.randn(8, inputs)
            adapter[f"{layer:02d}.{name}.B"] = torch.randn(outputs, 8)
    state = ServerState(adapter, torch.zeros(2, shape.hidden), references_counted=torch.zeros(leaders))
    update = LocalUpdate(rank, 300, adapter, state.reference_mean)
    aggregation = build_aggregation(FederationConfig(), seed=0)

    def aggregate() -> None:
        accumulator = aggregation.accumulator(state)
        accumulator.add(update)
        aggregation.step(state, accumulator.reduce(group), server_round=1)

    buffer = torch.zeros(sum(t.numel() for t in adapter.values()) + 2 * shape.hidden + 2 + leaders)
    ours, bare = [], []
    for _ in range(repeats + 1):
        bare.append(_together(group, lambda: group._group.allreduce([buffer]).wait()))
        ours.append(_together(group, aggregate))
    if rank == 0:
        found = {"bytes": buffer.nbytes, "ours": ours[1:], "bare": bare[1:]}
        (Path(folder) / "aggregation.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads are not waited for


def _together(group: Any, work: Callable[[], Any]) -> float:
    """Seconds of `work`, which all leaders begin at once."""
    import torch

    group._group.allreduce([torch.zeros(1)]).wait()
    return seconds_of(work)


def _switches(_: int, folder: str, name: str, stage: int, repeats: int) -> None:
    from dpa_ds.adapters.methods import Phase
    from dpa_ds.distributed.job_store import JobStore
    from dpa_ds.distributed.launchers import Launch

    model = write_model(Path(folder) / name, BASES[name])
    base_parameters = sum(file.stat().st_size for file in model.glob("*.safetensors")) // 4
    job = JobStore(Launch("single", 0, 1, 0, "127.0.0.1", 0))
    engine = _build(job, write_recipe(Path(folder), model, Case(stage)))
    states = {adapter: engine.adapters.initial_state(adapter, (0,)) for adapter in engine.adapters.table}

    def switch() -> None:
        for adapter in engine.adapters.table:
            engine.write_state(adapter, states[adapter])
        for phase in (Phase("global", 0.0), Phase("local", 0.5)):
            engine.activate(phase)
            engine.read_state(phase.trainable)

    switch()
    found = {"parameters": base_parameters, "seconds": [seconds_of(switch) for _ in range(repeats)]}
    (Path(folder) / f"{name}.json").write_text(json.dumps(found))
    os._exit(0)


def _ratio(ours: list[float], other: list[float]) -> str:
    return spread([a / b for a, b in zip(ours, other, strict=True)])


if __name__ == "__main__":
    main()
