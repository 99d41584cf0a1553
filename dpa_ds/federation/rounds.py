"""The round loop: sample, train, aggregate, evaluate, save, track."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import torch

from dpa_ds.checkpoint import RunFolder
from dpa_ds.config import RunConfig
from dpa_ds.data.batches import num_steps
from dpa_ds.distributed.world import World
from dpa_ds.evaluation.answering import Personality
from dpa_ds.evaluation.answers import NO_TASK, ClientInfo
from dpa_ds.evaluation.held_out import held_out_loss
from dpa_ds.evaluation.while_training import Scorer, own_and_all
from dpa_ds.federation.aggregation import Aggregator, ClientUpdate, Shared
from dpa_ds.federation.client import ClientTrainer, HostedClient, RoundMetrics
from dpa_ds.federation.sampling import sample_clients
from dpa_ds.tracking import Tracker

EVALUATED = {"held_out_loss": "held_out/loss", "P": "scores/P", "TTP": "scores/TTP"}
"""Columns that have numbers in some rounds only, NaN in the others, and their TensorBoard tags."""
COLUMNS = ("took_part", "num_examples", *EVALUATED, *(f.name for f in fields(RoundMetrics)))
"""One row a client in the table that leaders sum after each round. Beside it, only its label and task names leave the group."""


@dataclass
class Federation:
    """One rank's view of the run between rounds."""

    config: RunConfig
    world: World
    trainer: ClientTrainer
    aggregator: Aggregator
    clients: Sequence[HostedClient]
    """Hosted by this rank group, in order."""
    labels: Sequence[str]
    """Of all clients, for messages."""
    shared: Shared
    folder: RunFolder
    tracker: Tracker
    scorer: Scorer | None
    """Where `evaluation.scores_every_rounds` asks for answers while training."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time of each part of the current round."""

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's duration to `seconds[part]`."""
        started = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - started


def run_rounds(federation: Federation, completed_rounds: int) -> None:
    """Run all rounds after `completed_rounds`. Collective: every rank of the job."""
    config, tracker = federation.config, federation.tracker
    if completed_rounds == 0:
        finish_round(federation, 0, participants=(), evaluates=True)
    with tracker.progress(remaining_steps(federation, completed_rounds)):
        for server_round in range(completed_rounds + 1, config.federation.num_rounds + 1):
            is_last = server_round == config.federation.num_rounds
            participants = draw(federation, server_round)
            mine = [client for client in federation.clients if client.client_id in participants]
            with federation.timed("train"):
                updates = [
                    federation.trainer.before_aggregation(client, federation.shared, server_round) for client in mine
                ]
            with federation.timed("aggregate"):
                federation.shared = aggregate(federation, updates)
            with federation.timed("train"):
                for client in mine:
                    federation.trainer.after_aggregation(client, federation.shared, server_round)
                for client in federation.clients if is_last else ():
                    federation.trainer.finish(client, federation.shared, server_round)
            every = config.evaluation.every_rounds
            finish_round(federation, server_round, participants, is_last or (every > 0 and server_round % every == 0))


def draw(federation: Federation, server_round: int) -> tuple[int, ...]:
    """Clients of `server_round`: every rank computes the same."""
    settings = federation.config.federation
    return sample_clients(
        federation.world.topology,
        settings.client_fraction,
        federation.config.seed,
        server_round,
        settings.stratify_by_group,
    )


def aggregate(federation: Federation, updates: Sequence[ClientUpdate]) -> Shared:
    """The next global adapter and mean states, on every rank: leaders average, then broadcast inside their groups."""
    world, current = federation.world, federation.shared
    if not federation.trainer.schedule.federated:
        return current
    flat = current.flatten()
    if world.federation is not None:
        flat = federation.aggregator.aggregate(updates, current, world.federation).flatten()
    return current.unflatten(world.broadcast_(flat))


def finish_round(federation: Federation, server_round: int, participants: Sequence[int], evaluates: bool) -> None:
    """Evaluate, save and track one round. Round 0 is the state before training."""
    every = federation.config.evaluation.scores_every_rounds
    with federation.timed("evaluate"):
        evaluated = evaluate(federation) if evaluates else {}
        if federation.scorer is not None and server_round > 0 and server_round % every == 0:
            for client_id, scores in answer_some(federation, federation.scorer, server_round).items():
                evaluated.setdefault(client_id, {}).update(scores)
    with federation.timed("save"):
        if server_round > 0:
            save(federation, server_round)
        table = exchange_metrics(federation, participants, evaluated)
    track(federation, server_round, table)  # before the round counts: a complete round is also a recorded one
    if server_round > 0 and federation.world.is_main:  # the exchange was the barrier: all leaders have saved
        federation.folder.complete_round(server_round, {"clients": list(federation.labels)})
    federation.trainer.metrics.clear()
    federation.seconds.clear()


def evaluate(federation: Federation) -> dict[int, dict[str, float]]:
    """Held-out loss of every hosted client that has held-out examples, with the method's fixed mix.

    A client whose local adapter was never trained (not drawn so far) is scored with the global one alone.
    """
    config, engine = federation.config, federation.trainer.engine
    losses = {}
    engine.write_state("global", federation.shared.adapter)
    for client in federation.clients:
        if client.held_out is not None:
            engine.write_state("local", client.local_state)
            loss = held_out_loss(
                engine,
                federation.world,
                client.held_out,
                federation.trainer.schedule.inference_alpha if client.steps_taken["local"] else 0.0,
                config.evaluation.max_examples,
                config.train.micro_batch_tokens,
                federation.trainer.pad_id,
            )
            losses[client.client_id] = {"held_out_loss": loss}
    return losses


def answer_some(federation: Federation, scorer: Scorer, server_round: int) -> dict[int, dict[str, float]]:
    """P and TTP of every hosted client on a few instances; by task they go to TensorBoard."""
    federation.trainer.engine.write_state("global", federation.shared.adapter)
    result = {}
    for client in federation.clients:
        info = ClientInfo(client.client_id, client.label, client.tasks or (NO_TASK,))
        trained = client.steps_taken["local"] > 0
        personality = Personality(info, client.local_state, trained, client.references)
        scores = scorer.score(personality, federation.shared.mean_states)
        tagged = {f"scores/{task}": score for task, score in scores.items()}
        federation.tracker.scalars(f"client_{client.client_id:02d}", tagged, server_round)
        own, everything = own_and_all(scores, info.own_tasks)
        result[client.client_id] = {"P": own, "TTP": everything}
    return result


def save(federation: Federation, server_round: int) -> None:
    """Each leader writes its clients' local adapters, the main leader also the global one."""
    world, adapters, folder = federation.world, federation.trainer.engine.adapters, federation.folder
    if not world.is_leader:
        return
    if world.is_main:
        shared = federation.shared
        weight = torch.tensor([shared.states_weight])
        means = (
            {"mean_states": {"mean_states": shared.mean_states, "weight": weight}} if len(shared.mean_states) else {}
        )
        folder.save_adapter(server_round, "global", shared.adapter, adapters.peft_config("global"), means, {})
    for client in federation.clients:
        extras = {}
        if client.references is not None:
            extras["references"] = client.references.to_tensors()
        if client.local_optimizer is not None:
            extras["optimizer"] = client.local_optimizer
        folder.save_adapter(
            server_round,
            f"local/client_{client.client_id:02d}",
            client.local_state,
            adapters.peft_config("local"),
            extras,
            {"label": client.label, "tasks": client.tasks, "steps_taken": client.steps_taken},
        )


def exchange_metrics(
    federation: Federation, participants: Sequence[int], evaluated: dict[int, dict[str, float]]
) -> list[dict[str, float]]:
    """One row per client of the federation, on leaders: each fills its own clients' rows, the sum is the table."""
    world, clients = federation.world, federation.clients
    if world.federation is None:
        return []
    table = torch.zeros(len(federation.labels), len(COLUMNS), dtype=torch.float64)
    for client in clients:
        values = {
            "took_part": float(client.client_id in participants),
            "num_examples": float(len(client.examples)),
            **dict.fromkeys(EVALUATED, float("nan")),
            **evaluated.get(client.client_id, {}),
            **asdict(federation.trainer.metrics.get(client.client_id, RoundMetrics())),
        }
        table[client.client_id] = torch.tensor([values[column] for column in COLUMNS], dtype=torch.float64)
    world.federation.all_reduce_(table.view(-1), "metrics")
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]


def track(federation: Federation, server_round: int, table: Sequence[dict[str, float]]) -> None:
    """Records of the round: one per client, one for the round."""
    world, tracker = federation.world, federation.tracker
    if not world.is_main or world.federation is None:
        return
    for client_id, (label, row) in enumerate(zip(federation.labels, table, strict=True)):
        known = {name: value for name, value in row.items() if value == value}  # NaN: not evaluated
        tracker.record("client", server_round, client=client_id, label=label, **known)
        tagged = {tag: row[name] for name, tag in EVALUATED.items() if name in known}
        tracker.scalars(f"client_{client_id:02d}", tagged, server_round)
    totals = {name: sum(row[name] for row in table) for name in ("seconds", "real_tokens", "computed_tokens")}
    summary = {
        **{f"seconds/{part}": value for part, value in federation.seconds.items()},
        **{f"bytes_handed/{purpose}": n for purpose, n in world.federation.bytes_handed.items()},
        "tokens_per_second": totals["real_tokens"] / max(federation.seconds["train"], 1e-9),
        "padding_share": 1 - totals["real_tokens"] / max(totals["computed_tokens"], 1.0),
    }
    for name in EVALUATED:
        values = [row[name] for row in table if row[name] == row[name]]
        if values:
            summary[name] = sum(values) / len(values)
    tracker.record("round", server_round, **summary)
    tracker.scalars("rounds", summary, server_round)
    world.federation.bytes_handed.clear()
    said = [f"{name.replace('held_out_', 'held-out ')} {summary[name]:.4f}" for name in EVALUATED if name in summary]
    if said:
        tracker.say(f"round {server_round}: mean {', '.join(said)}")


def remaining_steps(federation: Federation, completed_rounds: int) -> int:
    """Optimizer steps that this rank group has yet to take: exact, because sampling is a pure function."""
    config, schedule = federation.config, federation.trainer.schedule
    train = config.train
    total = 0
    for server_round in range(completed_rounds + 1, config.federation.num_rounds + 1):
        participants = draw(federation, server_round)
        is_last = server_round == config.federation.num_rounds
        for client in federation.clients:
            phases = len(schedule.final) if is_last else 0
            if client.client_id in participants:
                phases += len(schedule.phases("before", server_round)) + len(schedule.phases("after", server_round))
            total += phases * num_steps(len(client.examples), train.batch_size, train.local_epochs, train.max_steps)
    return total
