"""The round loop: sample, train, reduce, step, evaluate, commit."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dpa_ds.distributed.elastic import ElasticGroup, SyncState
from dpa_ds.distributed.world import World
from dpa_ds.errors import ClusterError, TrainingError
from dpa_ds.federation.aggregation.pipeline import Accumulator, ReducedRound
from dpa_ds.federation.clients import HostedClient
from dpa_ds.federation.metrics import (
    MetricsTable,
    draw_evaluation,
    exchange_metrics,
    fill_row,
    record_round,
)
from dpa_ds.federation.round_evaluation import Evaluated
from dpa_ds.federation.sampling import sample_clients
from dpa_ds.federation.session import Session
from dpa_ds.runs.tracking import ALL_CLIENTS


@dataclass(frozen=True)
class Cohort:
    """The clients that take part in a round."""

    client_ids: tuple[int, ...]
    """Of the whole federation, ascending."""
    hosted: list[HostedClient]
    """Those that this rank group hosts."""


def run_rounds(session: Session) -> None:
    """Run all rounds that are left. Collective: every rank of the job."""
    rounds = session.round_state
    with session.tracker.progress(remaining_steps(session)):
        start_rounds(session)
        while rounds.num_completed < session.num_rounds:
            server_round = rounds.num_completed + 1
            cohort = sample_cohort(session, server_round)
            train_round(session, cohort, server_round)
            finish_round(session, cohort, server_round)
            if server_round < session.num_rounds:
                sync_round(session)


def train_round(session: Session, cohort: Cohort, server_round: int) -> None:
    """From the server state that a round starts from to the next one. Collective: every rank of the job."""
    rounds, part = session.round_state, session.timer.part
    trainer, aggregation = session.trainer, session.aggregation
    with part("train"):
        accumulator = aggregation.accumulator(rounds.server_state)
        for client in cohort.hosted:
            update = trainer.local_update(client, rounds.server_state, server_round)
            if update is not None:
                accumulator.add(update)
    with part("aggregate"):
        # In a thread of the leader: on a slow network the exchange takes as long as a phase.
        pending = start_reduce(session, accumulator)
    with part("train"):
        # Needs nothing of the average, so it runs while the updates travel.
        trainer.run_stage("overlap", cohort.hosted, rounds.server_state, server_round)
    with part("aggregate"):
        # Assigned, not kept beside the old one: of two states the older would stay in memory for the rest of the round.
        rounds.server_state = aggregation.step(rounds.server_state, pending.result(), server_round)
    with part("train"):
        trainer.run_stage("after", cohort.hosted, rounds.server_state, server_round)
        if server_round == session.num_rounds:
            trainer.finalize(session.clients, rounds.server_state, server_round)


def finish_round(session: Session, cohort: Cohort, server_round: int) -> None:
    """Evaluate and commit a round. Round 0 is the state before training. Collective: every rank of the job."""
    rounds, commit, part = session.round_state, session.commit, session.timer.part
    with part("save"):
        if server_round > 0:  # before training there is nothing to save
            leader_state = session.aggregation.reduction.leader_state
            commit.start(server_round, session.clients, rounds.server_state, leader_state)
    with part("evaluate"):
        evaluated = session.evaluation.evaluate_if_due(session.clients, rounds.server_state, server_round)
    with part("save"):
        # Before the exchange of metrics, which tells the other leaders that this one's files are on disk.
        commit.wait()
    rows = fill_rows(session, cohort, evaluated)
    draw_evaluation(session.tracker, server_round, rows)
    with part("record"):
        table = exchange_metrics(session.world, rows, session.labels, session.share)
    # All ranks have the same table, so all of them stop, or none.
    if table.all_rejected(cohort.client_ids):
        raise TrainingError(
            f"every client of round {server_round} diverged or changed the global adapter too much (see above); lower "
            "train.learning_rate. Earlier rounds are intact"
        )
    seconds = {**session.timer.seconds, "save_inside_phases": rounds.seconds_saving}
    count_round(session, server_round, table, seconds)
    if session.world.leaders is not None:
        session.folder.delete_private_rounds()
    rounds.end_round(server_round)
    session.timer.end_round(server_round)


def count_round(session: Session, server_round: int, table: MetricsTable, seconds: Mapping[str, float]) -> None:
    """Record the round and make it count: the coordinator does. Collective: every rank of the job."""
    world = session.world
    if world.leaders is not None and not world.leaders.is_coordinator:
        session.tracker.leave_curves(ALL_CLIENTS)  # to the coordinator

    def is_on_disk() -> bool:
        """Whether it counts already: another coordinator came so far before it was lost, or this one was slow."""
        return session.folder.latest_round() >= max(1, server_round)

    def count() -> None:
        # The record first: a process that ends between the two writes it once more, and never none.
        if not is_on_disk():
            record_round(world, session.tracker, server_round, table, seconds)
        if server_round > 0:
            session.commit.finish(server_round, session.round_state.server_state, table)
            session.tracker.publish()

    def drop_records() -> None:
        """Of the coordinator that was lost, which wrote some of them."""
        if not is_on_disk():
            session.tracker.drop_records_of(server_round)

    do_as_coordinator(world, count, drop_records)


def do_as_coordinator(world: World, do: Callable[[], None], undo: Callable[[], None]) -> None:
    """Have the coordinator do what belongs to all. Collective: every rank of the job.

    Where groups may be lost, all wait until it is done. If the coordinator is lost meanwhile, the next one calls
    `undo`, for what the first one may have left half done, and does it.
    """

    def is_done() -> bool:
        """Whether some leader that is still present has done it. Collective: all leaders."""
        assert world.leaders is not None, "a leader"
        num_done = torch.zeros(1)
        if world.leaders.is_coordinator:
            do()
            num_done += 1.0
        world.leaders.all_reduce_(num_done, "commit")
        return bool(num_done > 0)

    def do_until_done() -> None:
        assert world.leaders is not None, "a leader"
        while not is_done():
            if world.leaders.is_coordinator:  # it alone: two that rewrite one file would lose it
                undo()

    if world.topology.num_groups_elsewhere:
        world.on_leader(do_until_done)
    elif world.leaders is not None and world.leaders.is_coordinator:
        do()


# ---- the parts of a round -------------------------------------------------------------------------------------


def sample_cohort(session: Session, server_round: int) -> Cohort:
    """The clients of a round: every rank computes the same."""
    settings = session.federation
    client_ids = sample_clients(
        session.world.topology,
        settings.client_fraction,
        session.seed,
        server_round,
        settings.stratify_by_group,
    )
    return Cohort(client_ids, [client for client in session.clients if client.client_id in client_ids])


@dataclass(frozen=True)
class PendingReduce:
    """An exchange among the leaders that is under way."""

    world: World
    exchange: Future[ReducedRound] | None
    """On leaders."""

    def result(self) -> ReducedRound | None:
        """Wait for it; None on ranks that are no leaders. Collective: all ranks of the group.

        Raises:
            Preempted: on all ranks of the group, if its leader was asked to stop meanwhile.
        """
        return self.world.on_leader(self._wait)

    def _wait(self) -> ReducedRound | None:
        return None if self.exchange is None else self.exchange.result()


def start_reduce(session: Session, accumulator: Accumulator) -> PendingReduce:
    """Have the leaders exchange their sums in the background, while their groups train on."""
    leaders = session.world.leaders
    if leaders is None or not session.trainer.schedule.federated:
        return PendingReduce(session.world, None)
    background = ThreadPoolExecutor(1, thread_name_prefix="reduce")
    return PendingReduce(session.world, background.submit(accumulator.reduce, leaders))


def fill_rows(session: Session, cohort: Cohort, evaluated: Evaluated) -> dict[int, dict[str, float]]:
    """The rows of the metrics table that this group fills, by client id."""
    rows = {}
    for client in session.clients:
        client_id = client.client_id
        progress = session.round_state.progress_of(client)
        rows[client_id] = fill_row(client, progress, client_id in cohort.client_ids, evaluated[client_id])
    return rows


def remaining_steps(session: Session) -> int:
    """Optimizer steps that this rank group has yet to take: exact, because sampling is a pure function."""
    schedule, total = session.trainer.schedule, 0
    for server_round in range(session.round_state.num_completed + 1, session.num_rounds + 1):
        sampled = sample_cohort(session, server_round).client_ids
        of_round = sum(len(schedule.phases(stage, server_round)) for stage in ("before", "overlap", "after"))
        for client in session.clients:
            phases = of_round if client.client_id in sampled else 0
            if server_round == session.num_rounds:
                phases += len(schedule.final)
            total += phases * session.trainer.num_steps(client)
    return total


# ---- who is present, and where everybody starts ---------------------------------------------------------------


def start_rounds(session: Session) -> None:
    """Before the first round of this process: agree with the other groups, and resume what an earlier process
    left undone.

    Collective: every rank of the job.
    """
    rounds = session.round_state
    was_running = sync_round(session, is_starting=True)

    def tidy() -> None:
        session.folder.remove_leftovers(rounds.num_completed)
        if rounds.num_completed:
            session.folder.repair_link(rounds.num_completed)
        session.tracker.drop_records_after(rounds.num_completed)

    # Not where others have been running: what looks left over is their current round. All leaders know it alike, or
    # the one that joins would be alone in the exchange.
    if not was_running:
        do_as_coordinator(session.world, tidy, undo=lambda: None)
    if session.world.leaders is not None:
        clients = [client.client_id for client in session.clients]
        session.folder.remove_private_leftovers(clients, rounds.num_completed)
    if rounds.num_completed == 0:
        finish_round(session, Cohort((), []), server_round=0)
    # After the leftovers are gone: what is found now belongs to the round that comes next.
    rounds.restore_progress(session.clients, rounds.num_completed + 1)


def sync_round(session: Session, is_starting: bool = False) -> bool:
    """Agree on who is present, and on the server state that the next round starts from.

    A group that was away learns the state from the others. Collective: every rank of the job.

    Args:
        is_starting: this process has run no round yet.

    Returns:
        whether the others had been running before this group joined.
    """
    rounds, world = session.round_state, session.world
    if not world.topology.num_groups_elsewhere:  # the groups of one job start and end together
        return False

    def agree() -> tuple[SyncState, bool]:
        assert isinstance(world.leaders, ElasticGroup), "a leader"
        mine = SyncState(rounds.num_completed, rounds.server_state.flatten())
        agreed, was_running = world.leaders.sync_round(mine)
        if is_starting and _is_outdated(session, agreed.completed_rounds):
            raise ClusterError("the other groups completed a round while this one was starting: start it again")
        return agreed, was_running

    found = world.on_leader(agree)
    was_running = False
    if found is not None:
        agreed, was_running = found
        rounds.server_state = rounds.server_state.unflatten(agreed.shared)
        rounds.num_completed = agreed.completed_rounds
    shared = world.broadcast_(torch.tensor([rounds.num_completed, int(was_running)])).tolist()
    rounds.num_completed = shared[0]
    return bool(shared[1])


def _is_outdated(session: Session, completed_rounds: int) -> bool:
    """Whether the others completed a round, after this process read its clients, that has later ones of them.

    So it is if this group was lost when all had saved, and started again before that round counted.
    """
    folder = session.folder
    if folder.latest_round() > completed_rounds:
        return True
    if completed_rounds == 0:
        return False
    saved = folder.clients(completed_rounds)
    for client in session.clients:
        if client.client_id in saved:
            info = folder.info(completed_rounds, client.folder)
            if info["steps_taken"] != client.state.num_steps:
                return True
    return False
