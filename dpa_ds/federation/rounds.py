"""The round loop: sample, train, aggregate, evaluate, save, track."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial

import torch

from dpa_ds.checkpoint import RunFolder
from dpa_ds.config import RunConfig
from dpa_ds.data.batches import num_steps
from dpa_ds.distributed.elastic_group import Agreement, ElasticGroup
from dpa_ds.distributed.world import World
from dpa_ds.errors import ClusterError, TrainingError
from dpa_ds.evaluation.answering import Personality
from dpa_ds.evaluation.answers import NO_TASK, ClientInfo
from dpa_ds.evaluation.held_out import held_out_loss
from dpa_ds.evaluation.while_training import Scorer, own_and_all
from dpa_ds.federation.aggregation import Aggregator, ClientUpdate, Shared
from dpa_ds.federation.client import ClientTrainer, HostedClient
from dpa_ds.federation.progress import RoundMetrics, RoundProgress
from dpa_ds.federation.sampling import sample_clients
from dpa_ds.storage import BackgroundWriter
from dpa_ds.tracking import Tracker

EVALUATED = {"held_out_loss": "held_out/loss", "P": "scores/P", "TTP": "scores/TTP"}
"""Columns that have numbers in some rounds only, NaN in the others, and their TensorBoard tags."""
COLUMNS = ("present", "took_part", "num_examples", *EVALUATED, *(f.name for f in fields(RoundMetrics)))
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
    writer: BackgroundWriter
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
    num_rounds = config.federation.num_rounds
    with tracker.progress(remaining_steps(federation, completed_rounds)):
        server_round = begin(federation, completed_rounds, is_first=True)
        while server_round <= num_rounds:
            is_last = server_round == num_rounds
            participants = draw(federation, server_round)
            mine = [client for client in federation.clients if client.client_id in participants]
            with federation.timed("train"):
                trained = [
                    federation.trainer.before_aggregation(client, federation.shared, server_round) for client in mine
                ]
            with federation.timed("aggregate"):
                federation.shared = aggregate(federation, [update for update in trained if update is not None])
            with federation.timed("train"):
                for client in mine:
                    federation.trainer.after_aggregation(client, federation.shared, server_round)
                for client in federation.clients if is_last else ():
                    federation.trainer.finish(client, federation.shared, server_round)
            every = config.evaluation.every_rounds
            finish_round(federation, server_round, participants, is_last or (every > 0 and server_round % every == 0))
            server_round = server_round + 1 if is_last else begin(federation, server_round)


def begin(federation: Federation, completed_rounds: int, is_first: bool = False) -> int:
    """Agree on who is present and what is shared; the round to run next. A group that was away learns both from the others.

    Args:
        is_first: the first round of this process: what an earlier one left half-done is taken up again.
    """
    world, shared = federation.world, federation.shared
    was_running = False

    def agree() -> torch.Tensor:
        nonlocal was_running
        assert isinstance(world.federation, ElasticGroup), "a leader"
        agreed, was_running = world.federation.begin(Agreement(completed_rounds, shared.flatten()))
        if is_first and federation.folder.latest_round() > agreed.completed_rounds:
            raise ClusterError("the other groups completed a round while this one was starting: start it again")
        return torch.cat([torch.tensor([float(agreed.completed_rounds)]), agreed.shared])

    if world.topology.num_groups_elsewhere:
        agreed = world.from_leader(agree, like=torch.cat([torch.zeros(1), shared.flatten()]))
        completed_rounds, federation.shared = round(float(agreed[0])), shared.unflatten(agreed[1:])
    if is_first:
        if world.federation is not None and world.federation.is_first and not was_running:
            federation.folder.remove_leftovers(completed_rounds)
            federation.tracker.drop_records_after(completed_rounds)
        if completed_rounds == 0:
            finish_round(federation, 0, participants=(), evaluates=True)
        for client in federation.clients:
            federation.trainer.take_up(client, completed_rounds + 1)
    return completed_rounds + 1


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

    def average() -> torch.Tensor:
        assert world.federation is not None, "a leader"
        return federation.aggregator.aggregate(updates, current, world.federation).flatten()

    return current.unflatten(world.from_leader(average, like=current.flatten()))


def finish_round(federation: Federation, server_round: int, participants: Sequence[int], evaluates: bool) -> None:
    """Save, evaluate and track one round. Round 0 is the state before training."""
    world, every = federation.world, federation.config.evaluation.scores_every_rounds
    with federation.timed("save"):
        if server_round > 0:
            save(federation, server_round)  # in the background
    with federation.timed("evaluate"):
        evaluated = evaluate(federation) if evaluates else {}
        if federation.scorer is not None and server_round > 0 and server_round % every == 0:
            for client_id, scores in answer_some(federation, federation.scorer, server_round).items():
                evaluated.setdefault(client_id, {}).update(scores)
    with federation.timed("save"):
        federation.writer.wait()
    leads = world.federation is not None and world.federation.is_first
    table = exchange_metrics(federation, participants, evaluated)
    if participants and all(table[client_id]["rejected"] for client_id in participants):
        raise TrainingError(
            f"no client's update of round {server_round} was fit to count (see above); lower train.learning_rate. Earlier "
            "rounds are intact"
        )
    track(federation, server_round, table)  # before the round counts: a complete round is also a recorded one
    # The exchange was the barrier: all leaders that are present have saved.
    if server_round > 0 and world.federation is not None and world.federation.is_first:
        if not leads:  # the leader that had saved the global adapter was lost meanwhile
            save_shared(federation, server_round)
            federation.writer.wait()
        absent = [client_id for client_id, row in enumerate(table) if not row["present"]]
        federation.folder.carry_over(server_round, absent)
        meta = {"clients": list(federation.labels), "absent": absent}
        federation.folder.complete_round(server_round, meta, federation.config.checkpoint.keep_rounds)
    federation.trainer.progress.clear()
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
    """Each leader writes its clients' local adapters, the first also what all share, in the background."""
    world, adapters, writer = federation.world, federation.trainer.engine.adapters, federation.writer
    if world.federation is None:
        return
    if world.federation.is_first:
        save_shared(federation, server_round)
    write = partial(federation.folder.save_adapter, server_round)
    for client in federation.clients:
        extras = {}
        if client.references is not None:
            extras["references"] = client.references.to_tensors()
        if client.local_optimizer is not None:
            extras["optimizer"] = client.local_optimizer
        info = {"label": client.label, "tasks": client.tasks, "steps_taken": dict(client.steps_taken)}
        name = f"local/client_{client.client_id:02d}"
        writer.submit(partial(write, name, client.local_state, adapters.peft_config("local"), extras, info))


def save_shared(federation: Federation, server_round: int) -> None:
    """Write what all clients share, in the background."""
    shared = federation.shared
    means = {}
    if len(shared.mean_states):
        means = {"mean_states": {"mean_states": shared.mean_states, "weight": torch.tensor([shared.states_weight])}}
    config = federation.trainer.engine.adapters.peft_config("global")
    federation.writer.submit(
        partial(federation.folder.save_adapter, server_round, "global", shared.adapter, config, means, {})
    )


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
            "took_part": float(client.client_id in participants),
            "num_examples": float(len(client.examples)),
            **dict.fromkeys(EVALUATED, float("nan")),
            **evaluated.get(client.client_id, {}),
            **asdict(progress.metrics),
        }
        table[client.client_id] = torch.tensor([values[column] for column in COLUMNS], dtype=torch.float64)

    def add_up() -> torch.Tensor:
        assert world.federation is not None, "a leader"
        world.federation.all_reduce_(table.view(-1), "metrics")
        return table

    table = world.from_leader(add_up, like=table)
    return [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]


def track(federation: Federation, server_round: int, table: Sequence[dict[str, float]]) -> None:
    """Records of the round: one per client, one for the round."""
    world, tracker = federation.world, federation.tracker
    if world.federation is None or not world.federation.is_first:
        return
    present = {client_id: row for client_id, row in enumerate(table) if row["present"]}
    for client_id, row in present.items():
        known = {name: value for name, value in row.items() if value == value}  # NaN: not evaluated
        tracker.record("client", server_round, client=client_id, label=federation.labels[client_id], **known)
        tagged = {tag: row[name] for name, tag in EVALUATED.items() if name in known}
        tracker.scalars(f"client_{client_id:02d}", tagged, server_round)
    totals = {
        name: sum(row[name] for row in present.values()) for name in ("seconds", "real_tokens", "computed_tokens")
    }
    summary = {
        **{f"seconds/{part}": value for part, value in federation.seconds.items()},
        **{f"bytes_handed/{purpose}": n for purpose, n in world.federation.bytes_handed.items()},
        "tokens_per_second": totals["real_tokens"] / max(federation.seconds["train"], 1e-9),
        "padding_share": 1 - totals["real_tokens"] / max(totals["computed_tokens"], 1.0),
    }
    for name in EVALUATED:
        values = [row[name] for row in present.values() if row[name] == row[name]]
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
