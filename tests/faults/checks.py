"""What must be true of a run that ended, whatever was done to it: no client, round, record or point of a curve is lost."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

TOLERANCE = 1e-6


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, every line of which must be a record."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def nothing_is_lost(run_dir: Path, num_rounds: int) -> None:
    """AssertionError: a round, a record or a client is missing or there twice.

    A client whose group was in no round has no adapter yet: nothing of it is lost.
    """
    records = records_of(run_dir)
    rounds = [record["round"] for record in records if record["kind"] == "round"]
    assert rounds == list(range(num_rounds + 1)), f"rounds in metrics.jsonl: {rounds}"
    clients = [(record["round"], record["client"]) for record in records if record["kind"] == "client"]
    assert len(set(clients)) == len(clients), f"a client's record is there twice: {clients}"
    newest = run_dir / "rounds" / f"round_{num_rounds:06d}"
    assert json.loads((newest / "meta.json").read_text())["round"] == num_rounds
    assert (run_dir / "adapters").resolve() == newest.resolve(), "adapters does not point to the last round"
    for client in sorted({client for server_round, client in clients if server_round}):
        state = json.loads((newest / f"local/client_{client:02d}/state.json").read_text())
        steps = sum(state["info"]["steps_taken"].values())
        recorded = sum(r["num_steps"] for r in records if r["kind"] == "client" and r["client"] == client)
        assert steps == recorded, f"client {client} has {steps} steps, {recorded} are recorded"
    left = [path.name for path in run_dir.rglob("*.tmp") if path.is_file()]
    assert not left, f"left over: {left}"


def curves_are_whole(run_dir: Path) -> None:
    """AssertionError: TensorBoard lacks a step of a client, a held-out loss, or a round, or shows one twice."""
    records = records_of(run_dir)
    recorded = [record["round"] for record in records if record["kind"] == "round"]
    shown = steps_of(run_dir, "rounds").get("tokens/computed_share", [])
    assert shown == recorded, f"TensorBoard shows rounds {shown} of {recorded}"
    last = run_dir / "adapters"
    for folder in sorted((last / "local").glob("client_*")):
        curves = steps_of(run_dir, folder.name)
        for adapter, count in json.loads((folder / "state.json").read_text())["info"]["steps_taken"].items():
            for curve in (f"loss/{adapter}", f"optimizer/{adapter}_grad_norm", f"optimizer/{adapter}_lr"):
                is_there_once(curves.get(curve, []), set(range(count)), f"{curve} of {folder.name}")
        own = [record for record in records if record.get("client") == int(folder.name.removeprefix("client_"))]
        evaluated = {record["round"] for record in own if not math.isnan(record.get("held_out_loss", math.nan))}
        is_there_once(curves.get("loss/held_out", []), evaluated, f"loss/held_out of {folder.name}")


def is_there_once(shown: list[int], wanted: set[int], what: str) -> None:
    """AssertionError: the steps that a curve shows lack some that are wanted, or have one twice."""
    assert wanted <= set(shown), f"TensorBoard lacks {what} at {sorted(wanted - set(shown))}"
    assert len(set(shown)) == len(shown), f"TensorBoard shows {what} twice at some of {sorted(shown)}"


def steps_of(run_dir: Path, source: str) -> dict[str, list[int]]:
    """Steps that TensorBoard shows of each curve of a source."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard" / source), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rounds_are_means(run_dir: Path, dump: Path, num_rounds: int, sizes: tuple[int, ...]) -> None:
    """AssertionError: a round's global adapter is not the mean of the updates that it counts, weighted by examples.

    Args:
        dump: of tests/faults/observed.py.
        sizes: examples of each client. No two sets of clients have the same sum, so a weight says who was counted.
    """
    for server_round in range(1, num_rounds + 1):
        weight = json.loads((dump / f"round_{server_round:06d}.json").read_text())
        counted = clients_of_weight(sizes, weight)
        total: dict[str, Any] = defaultdict(float)
        for client in counted:
            for key, tensor in update_of(dump, server_round, client).items():
                total[key] = total[key] + tensor.astype(np.float64) * sizes[client]
        actual = global_adapter(run_dir, dump, server_round)
        assert actual.keys() == total.keys(), f"round {server_round} has other tensors"
        for key, tensor in actual.items():
            difference = float(np.abs(tensor - total[key] / weight).max())
            assert difference <= TOLERANCE, f"round {server_round}: {key} is {difference:g} from the mean of {counted}"


def clients_of_weight(sizes: tuple[int, ...], weight: float) -> list[int]:
    """The only clients whose sizes have this sum."""
    for chosen in range(2 ** len(sizes)):
        clients = [client for client in range(len(sizes)) if chosen >> client & 1]
        if sum(sizes[client] for client in clients) == weight:
            return clients
    raise AssertionError(f"no clients have {weight:g} examples: one was counted twice, or in part")


def update_of(dump: Path, server_round: int, client: int) -> dict[str, Any]:
    """What a client handed in; every process that trained it in this round must have come to the same."""
    paths = sorted((dump / f"round_{server_round:06d}").glob(f"client_{client:02d}.*.safetensors"))
    assert paths, f"client {client} counts in round {server_round}, and handed nothing in"
    first = load_file(paths[0])
    for path in paths[1:]:
        for key, tensor in load_file(path).items():
            assert np.array_equal(tensor, first[key]), f"client {client} trained round {server_round} otherwise again"
    return first


def global_adapter(run_dir: Path, dump: Path, server_round: int) -> dict[str, Any]:
    """Of a complete round, as it lies there; of one that was deleted since, as it was completed."""
    kept = run_dir / "rounds" / f"round_{server_round:06d}" / "global" / "adapter_model.safetensors"
    return load_file(kept if kept.exists() else dump / f"round_{server_round:06d}.global")
