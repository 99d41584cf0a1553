"""The numbers of a round: each leader fills its clients' rows of one table, whose sum all have; the first leader records it."""

from collections.abc import Sequence
from dataclasses import asdict, fields

import torch

from dpa_ds.federation.round_state import RoundMetrics, RoundProgress
from dpa_ds.federation.session import Federation

EVALUATED = {"held_out_loss": "held_out/loss", "P": "scores/P", "TTP": "scores/TTP"}
"""Columns that have numbers in some rounds only, NaN in the others, and their TensorBoard tags."""
COLUMNS = ("present", "participated", "num_examples", *EVALUATED, *(f.name for f in fields(RoundMetrics)))
"""One row a client in the table that leaders sum after each round. Beside it, only its label and task names leave the group."""


def exchange_metrics(
    federation: Federation, participants: Sequence[int], evaluated: dict[int, dict[str, float]]
) -> list[dict[str, float]]:
    """One row per client of the federation: each leader fills its own clients' rows, the sum is the table."""
    world = federation.world
    table = torch.zeros(len(federation.labels), len(COLUMNS), dtype=torch.float64)
    for client in federation.clients:
        progress = federation.trainer.progress.get(client.client_id, RoundProgress())
        values = {
            "present": 1.0,
            "participated": float(client.client_id in participants),
            "num_examples": float(len(client.examples)),
            **dict.fromkeys(EVALUATED, float("nan")),
            **evaluated.get(client.client_id, {}),
            **asdict(progress.metrics),
        }
        table[client.client_id] = torch.tensor([values[column] for column in COLUMNS], dtype=torch.float64)

    def add_up() -> torch.Tensor:
        assert world.leaders is not None, "a leader"
        world.leaders.all_reduce_(table.view(-1), "metrics")
        return table

    table = world.from_leader(add_up, like=table)
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]


def track(federation: Federation, server_round: int, table: Sequence[dict[str, float]]) -> None:
    """Records of the round: one per client, one for the round."""
    world, tracker = federation.world, federation.tracker
    if world.leaders is None or not world.leaders.is_coordinator:
        return
    present = {client_id: row for client_id, row in enumerate(table) if row["present"]}
    for client_id, row in present.items():
        known = {name: value for name, value in row.items() if value == value}  # NaN: not evaluated
        tracker.record("client", server_round, client=client_id, label=federation.labels[client_id], **known)
        tagged = {tag: row[name] for name, tag in EVALUATED.items() if name in known}
        tracker.scalars(f"client_{client_id:02d}", tagged, server_round)
    totals = {
        name: sum(row[name] for row in present.values())
        for name in ("real_tokens", "restored_tokens", "computed_tokens")
    }
    own_tokens = totals["real_tokens"] - totals["restored_tokens"]  # of this process, as its seconds
    summary = {
        **{f"seconds/{part}": value for part, value in federation.seconds.items()},
        "seconds/save_inside_phases": federation.trainer.seconds_saving,  # a part of seconds/train
        **{f"bytes_handed/{purpose}": n for purpose, n in world.leaders.bytes_handed.items()},
        "tokens_per_second": own_tokens / max(federation.seconds["train"], 1e-9),
        "computed_share": totals["computed_tokens"] / max(totals["real_tokens"], 1.0),
    }
    for name in EVALUATED:
        values = [row[name] for row in present.values() if row[name] == row[name]]
        if values:
            summary[name] = sum(values) / len(values)
    tracker.record("round", server_round, **summary)
    tracker.scalars("rounds", summary, server_round)
    world.leaders.bytes_handed.clear()
    said = [f"{name.replace('held_out_', 'held-out ')} {summary[name]:.4f}" for name in EVALUATED if name in summary]
    if said:
        tracker.say(f"round {server_round}: mean {', '.join(said)}")
