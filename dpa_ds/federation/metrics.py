"""The numbers of a round: each leader fills its clients' rows of one table, whose sum all have; the
coordinator records it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch

from dpa_ds.distributed.world import World
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.progress import RoundMetrics, RoundProgress
from dpa_ds.runs.curves import tag_of
from dpa_ds.runs.folder import client_name
from dpa_ds.runs.tracking import ALL_CLIENTS, Tracker

EVALUATED = ("held_out_loss", "P", "TTP")
"""Columns that have numbers in some rounds only, NaN in the others."""
COLUMNS = (
    "present",
    "participated",
    "num_examples",
    *EVALUATED,
    *(f.name for f in fields(RoundMetrics)),
)
"""One row a client in the table that leaders sum after each round. Beside it, only its label and task names
leave the group."""
TOKENS = ("real_tokens", "restored_tokens", "computed_tokens")
AGREED = ("present", "participated", "rejected")
"""Columns that all leaders need of every client, whatever is shared: who is absent, and whether a round failed."""
NUM_EVALUATED = tuple(f"num_{name}" for name in EVALUATED)
"""Columns of sums over clients: how many have a number."""

Row = dict[str, float]
"""Column -> number of one client."""


@dataclass(frozen=True)
class MetricsTable:
    """The numbers of a round of all clients, the same on every rank."""

    rows: Sequence[Row]
    """By client id. Where only sums are shared they have the columns AGREED alone."""
    labels: Sequence[str]
    sums: Row | None = None
    """Where only these are shared: the columns of all clients present, added up, and NUM_EVALUATED."""

    def present(self) -> dict[int, Row]:
        """Rows of the clients whose leader took part in the exchange, by client id."""
        return {client_id: row for client_id, row in enumerate(self.rows) if row["present"]}

    def absent_clients(self) -> list[int]:
        """Ids of the clients whose leader did not take part."""
        return [client_id for client_id, row in enumerate(self.rows) if not row["present"]]

    def all_rejected(self, client_ids: Sequence[int]) -> bool:
        """Whether there were participants, and what they did was undone for each of them."""
        return bool(client_ids) and all(self.rows[client_id]["rejected"] for client_id in client_ids)


def fill_row(
    client: HostedClient,
    progress: RoundProgress,
    participated: bool,
    evaluated: Mapping[str, float],
) -> Row:
    """What a leader says of one of its clients."""
    row: Row = {
        "present": 1.0,
        "participated": float(participated),
        "num_examples": float(len(client.examples)),
    }
    row |= dict.fromkeys(EVALUATED, math.nan)
    row |= evaluated
    row |= asdict(progress.metrics)
    return row


def exchange_metrics(
    world: World, rows: Mapping[int, Row], labels: Sequence[str], share: Literal["per_client", "sums"]
) -> MetricsTable:
    """The table of all clients: 8 bytes a column and client. Collective: every rank of the job.

    Args:
        rows: those of the clients that this group hosts, by client id.
        share: `sums`: of a client only AGREED leaves its group, of the other columns sums.
    """
    columns = COLUMNS if share == "per_client" else AGREED
    summed = () if share == "per_client" else (*COLUMNS, *NUM_EVALUATED)
    own = torch.zeros(len(labels), len(columns), dtype=torch.float64)
    for client_id, row in rows.items():
        own[client_id] = torch.tensor([row[column] for column in columns], dtype=torch.float64)
    own_sums = sum_rows(list(rows.values()))
    sums = torch.tensor([own_sums[column] for column in summed], dtype=torch.float64)
    buffer = torch.cat([own.view(-1), sums])

    def add_up() -> torch.Tensor:
        assert world.leaders is not None, "a leader"
        world.leaders.all_reduce_(buffer, "metrics")
        return buffer

    buffer = world.from_leader(add_up, like=buffer)
    table, total = buffer[: own.numel()].view(own.shape), buffer[own.numel() :]
    return MetricsTable(
        rows=[dict(zip(columns, row, strict=True)) for row in table.tolist()],
        labels=labels,
        sums=dict(zip(summed, total.tolist(), strict=True)) or None,
    )


def sum_rows(rows: Sequence[Row]) -> Row:
    """Sum of each column, and how many rows have a number in those that are NaN in some."""
    sums: Row = {}
    for name in COLUMNS:
        sums[name] = sum(row[name] for row in rows if not math.isnan(row[name]))
    for name, count in zip(EVALUATED, NUM_EVALUATED, strict=True):
        sums[count] = float(sum(not math.isnan(row[name]) for row in rows))
    return sums


def draw_evaluation(tracker: Tracker, server_round: int, rows: Mapping[int, Row]) -> None:
    """Add a point to the held-out curves of the clients of this rank group: a client's curves have one writer.

    Before the exchange of metrics: after it the round may count, and a group that is lost would not draw it again.

    Args:
        rows: of its clients, by client id.
    """
    for client_id, row in rows.items():
        tagged = {tag_of(name): row[name] for name in EVALUATED if not math.isnan(row[name])}
        tracker.scalars(client_name(client_id), tagged, server_round)


def record_round(
    world: World,
    tracker: Tracker,
    server_round: int,
    table: MetricsTable,
    seconds: Mapping[str, float],
) -> None:
    """Write one record a client and one of the round, and wait until they are on the disk. The coordinator of all
    leaders does; others return at once.

    Args:
        seconds: what each part of the round took; its part `train` is the base of tokens per second.
    """
    if world.leaders is None or not world.leaders.is_coordinator:
        return
    if table.sums is None:
        rows = table.present()
        for client_id, row in rows.items():
            known = {name: value for name, value in row.items() if not math.isnan(value)}
            tracker.record("client", server_round, client=client_id, label=table.labels[client_id], **known)
        summary = _summarize(sum_rows(list(rows.values())), seconds)
    else:
        summary = {"num_examples": table.sums["num_examples"], **_summarize(table.sums, seconds)}
    for purpose, num_bytes in world.leaders.bytes_handed.items():
        summary[f"bytes_handed/{purpose}"] = float(num_bytes)
    world.leaders.bytes_handed.clear()
    tracker.record("round", server_round, **summary)
    tracker.sync_records()
    tracker.scalars(ALL_CLIENTS, {tag_of(name): value for name, value in summary.items()}, server_round)
    shown = [f"{name.replace('held_out_', 'held-out ')} {summary[name]:.4f}" for name in EVALUATED if name in summary]
    if shown:
        tracker.say(f"round {server_round}: mean {', '.join(shown)}")


def _summarize(totals: Row, seconds: Mapping[str, float]) -> dict[str, float]:
    """Numbers of the whole round.

    Args:
        totals: as `sum_rows` gives them, of all clients present.
    """
    summary = {f"seconds/{part}": value for part, value in seconds.items()}
    own_tokens = totals["real_tokens"] - totals["restored_tokens"]  # of this process, as its seconds
    summary["tokens_per_second"] = own_tokens / max(seconds.get("train", 0.0), 1e-9)
    summary["computed_share"] = totals["computed_tokens"] / max(totals["real_tokens"], 1.0)
    for name, count in zip(EVALUATED, NUM_EVALUATED, strict=True):
        if totals[count]:
            summary[name] = totals[name] / totals[count]
    return summary
