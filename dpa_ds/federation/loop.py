"""The round loop: sample, train, aggregate, evaluate, save, track."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from dpa_ds.data.batching import num_steps
from dpa_ds.data.sources import NO_TASK, ClientInfo
from dpa_ds.distributed.elastic import ElasticGroup, SyncState
from dpa_ds.errors import ClusterError, TrainingError
from dpa_ds.evaluation.while_training import Scorer, own_and_all
from dpa_ds.federation.aggregation.mean import ClientUpdate, Shared
from dpa_ds.federation.metrics import exchange_metrics, track
from dpa_ds.federation.sampling import sample_clients
from dpa_ds.federation.session import Federation
from dpa_ds.federation.trainer import held_out_loss
from dpa_ds.inference.client_model import ClientModel


def run_rounds(federation: Federation, completed_rounds: int) -> None:
    """Run all rounds after `completed_rounds`. Collective: every rank of the job."""
    config, tracker = federation.config, federation.tracker
    num_rounds = config.federation.num_rounds
    with tracker.progress(remaining_steps(federation, completed_rounds)):
        server_round = begin(federation, completed_rounds, is_coordinator=True)
        while server_round <= num_rounds:
            is_last = server_round == num_rounds
            participants = draw(federation, server_round)
            mine = [client for client in federation.clients if client.client_id in participants]
            with federation.timed("train"):
                trained = [federation.trainer.local_update(client, federation.shared, server_round) for client in mine]
            with federation.timed("aggregate"):
                aggregated = begin_aggregation(federation, [update for update in trained if update is not None])
            with federation.timed("train"):
                for client in mine:
                    federation.trainer.run_stage(client, "during", federation.shared, server_round)
            with federation.timed("aggregate"):
                federation.shared = aggregated()
            with federation.timed("train"):
                for client in mine:
                    federation.trainer.run_stage(client, "after", federation.shared, server_round)
                for client in federation.clients if is_last else ():
                    federation.trainer.finish(client, federation.shared, server_round)
            every = config.evaluation.every_rounds
            finish_round(federation, server_round, participants, is_last or (every > 0 and server_round % every == 0))
            server_round = server_round + 1 if is_last else begin(federation, server_round)


def begin(federation: Federation, completed_rounds: int, is_coordinator: bool = False) -> int:
    """Agree on who is present and what is shared; the round to run next. A group that was away learns both from the others.

    Args:
        is_coordinator: the first round of this process: what an earlier one left half-done is restored.
    """
    world, shared = federation.world, federation.shared
    was_running = False

    def agree() -> torch.Tensor:
        nonlocal was_running
        assert isinstance(world.leaders, ElasticGroup), "a leader"
        agreed, was_running = world.leaders.sync_round(SyncState(completed_rounds, shared.flatten()))
        if is_coordinator and federation.folder.latest_round() > agreed.completed_rounds:
            raise ClusterError("the other groups completed a round while this one was starting: start it again")
        return torch.cat([torch.tensor([float(agreed.completed_rounds)]), agreed.shared])

    if world.topology.num_groups_elsewhere:
        agreed = world.from_leader(agree, like=torch.cat([torch.zeros(1), shared.flatten()]))
        completed_rounds, federation.shared = round(float(agreed[0])), shared.unflatten(agreed[1:])
    if is_coordinator:
        if world.leaders is not None and world.leaders.is_coordinator and not was_running:
            federation.folder.remove_leftovers(completed_rounds)
            federation.tracker.drop_records_after(completed_rounds)
        if completed_rounds == 0:
            finish_round(federation, 0, participants=(), evaluates=True)
        for client in federation.clients:
            federation.trainer.restore_progress(client, completed_rounds + 1)
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


def begin_aggregation(federation: Federation, updates: Sequence[ClientUpdate]) -> Callable[[], Shared]:
    """Leaders average, in the background, while their groups train on.

    Returns:
        what waits for the next global adapter and mean states and brings them to every rank. Collective: all ranks of the
        group.
    """
    world, current = federation.world, federation.shared
    if not federation.trainer.schedule.federated:
        return lambda: current
    leaders, background = world.leaders, ThreadPoolExecutor(1, thread_name_prefix="aggregate")
    average = background.submit(federation.aggregator.aggregate, updates, current, leaders) if leaders else None

    def averaged() -> torch.Tensor:
        assert average is not None, "a leader"
        return average.result().flatten()

    return lambda: current.unflatten(world.from_leader(averaged, like=current.flatten()))


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
    leads = world.leaders is not None and world.leaders.is_coordinator
    with federation.timed("record"):
        table = exchange_metrics(federation, participants, evaluated)
    if participants and all(table[client_id]["rejected"] for client_id in participants):
        raise TrainingError(
            f"every client of round {server_round} diverged or changed the global adapter too much (see above); lower "
            "train.learning_rate. Earlier rounds are intact"
        )
    track(federation, server_round, table)  # before the round counts: a complete round is also a recorded one
    # The exchange was the barrier: all leaders that are present have saved.
    if server_round > 0 and world.leaders is not None and world.leaders.is_coordinator:
        if not leads:  # the leader that had saved the global adapter was lost meanwhile
            save_shared(federation, server_round)
            federation.writer.wait()
        absent = [client_id for client_id, row in enumerate(table) if not row["present"]]
        federation.folder.carry_over(server_round, absent)
        meta = {"clients": list(federation.labels), "absent": absent}
        federation.folder.complete_round(server_round, meta, federation.config.checkpoint.keep_rounds)
    federation.trainer.progress.clear()
    federation.trainer.starts.clear()
    federation.trainer.seconds_saving = 0.0
    federation.end_round(server_round)


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
                federation.trainer.batching,
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
        client_model = ClientModel(info, client.local_state, trained, client.references)
        scores = scorer.score(client_model, federation.shared.reference_mean)
        tagged = {f"scores/{task}": score for task, score in scores.items()}
        federation.tracker.scalars(f"client_{client.client_id:02d}", tagged, server_round)
        own, everything = own_and_all(scores, info.own_tasks)
        result[client.client_id] = {"P": own, "TTP": everything}
    return result


def save(federation: Federation, server_round: int) -> None:
    """Each leader writes its clients' local adapters, the first also what all share, in the background."""
    world, adapters, writer = federation.world, federation.trainer.engine.adapters, federation.writer
    if world.leaders is None:
        return
    if world.leaders.is_coordinator:
        save_shared(federation, server_round)
    write = partial(federation.folder.save_adapter, server_round)
    for client in federation.clients:
        extras = {}
        if client.references is not None:
            extras["references"] = client.references.to_tensors()
        if client.local_optimizer is not None:
            extras["optimizer"] = client.local_optimizer
        if client is federation.clients[0] and federation.aggregator.carried is not None:
            extras["carried"] = federation.aggregator.carried
        info = {"label": client.label, "tasks": client.tasks, "steps_taken": dict(client.steps_taken)}
        name = f"local/client_{client.client_id:02d}"
        writer.submit(partial(write, name, client.local_state, adapters.peft_config("local"), extras, info))


def save_shared(federation: Federation, server_round: int) -> None:
    """Write what all clients share, in the background."""
    shared = federation.shared
    means = {}
    if len(shared.reference_mean):
        means = {
            "reference_mean": {
                "reference_mean": shared.reference_mean,
                "weight": torch.tensor([shared.reference_weight]),
            }
        }
    config = federation.trainer.engine.adapters.peft_config("global")
    federation.writer.submit(
        partial(federation.folder.save_adapter, server_round, "global", shared.adapter, config, means, {})
    )


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
                phases += sum(len(schedule.phases(stage, server_round)) for stage in ("before", "during", "after"))
            total += phases * num_steps(len(client.examples), train.batch_size, train.local_epochs, train.max_steps)
    return total
