"""What the start of a run says of the data: rows, tokens, what is left out, what is there twice, what is in the test.

Counts alone leave a rank group. Rows are compared within the group that read them: a digest of a private text tells
whoever guesses the text that it is there.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from dpa_ds.distributed.job_store import JobStore
from dpa_ds.distributed.world import World
from dpa_ds.federation.clients import ClientTokens
from dpa_ds.runs.tracking import logger

MOST_LINES = 16
"""Clients of the table; of more the first ones, and the sum of all."""


@dataclass(frozen=True)
class DataCounts:
    """Of one client, or of all."""

    rows: int
    """Training rows, also those that are left out."""
    tokens: int
    """Of the rows that are trained on."""
    dropped: int
    """Rows that are longer than data.max_length."""
    duplicates: int
    """Training rows whose texts came before."""
    in_test: int
    """Rows to be scored on that are trained on, too."""

    @classmethod
    def of(cls, client: ClientTokens) -> "DataCounts":
        """What is known of a client's tokens."""
        dropped = client.examples.num_dropped
        duplicates, in_test = 0, 0
        if client.quality is not None:
            duplicates, in_test = client.quality.num_duplicates, client.quality.num_leaked
        return cls(len(client.examples) + dropped, int(client.examples.offsets[-1]), dropped, duplicates, in_test)


def report_data(
    clients: Sequence[ClientTokens],
    labels: Sequence[str],
    job: JobStore,
    world: World,
    share: Literal["per_client", "sums"],
) -> None:
    """Log the table of all clients, and warn of test rows that are trained on. Collective: all leaders of the job.

    Args:
        clients: of this rank group.
        labels: of all clients, by id.
        share: with sums the coordinator sees the clients of its own group only.
    """
    if not world.is_leader:
        return
    counts = {client.client_id: DataCounts.of(client) for client in clients}
    for client in clients:
        if client.quality is not None and client.quality.leaked_place is not None:
            logger.warning(
                f"{client.label}: {client.quality.num_leaked} of the rows to be scored on are trained on, too, such as "
                f"{client.quality.leaked_place}: their scores and losses say nothing; take them out of one of the files"
            )
    if share == "per_client":
        for client_id, of_client in counts.items():
            job.publish(f"data/{client_id}", astuple(of_client))
    if world.is_coordinator:
        if share == "per_client":
            for group in world.topology.groups:
                for client_id in world.topology.clients_of_group(group):
                    counts[client_id] = DataCounts(*job.lookup(f"data/{client_id}"))
        for line in describe_counts([(labels[client_id], counts[client_id]) for client_id in sorted(counts)]):
            logger.info(f"  {line}")


def describe_counts(counts: Sequence[tuple[str, DataCounts]]) -> list[str]:
    """Lines of a table: labels and counts, and below more than one client their sum."""
    lines: list[tuple[str, ...]] = [("data", "rows", "tokens", "left out", "twice", "in the test")]
    for label, of_client in counts[:MOST_LINES]:
        lines.append((label, *(f"{number:,}" for number in astuple(of_client))))
    if len(counts) > 1:
        sums = [sum(numbers) for numbers in zip(*(astuple(of_client) for _, of_client in counts), strict=True)]
        lines.append((f"all {len(counts)} clients", *(f"{number:,}" for number in sums)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rendered = []
    for name, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        rendered.append("  ".join([name.ljust(widths[0]), *padded]))
    return rendered
