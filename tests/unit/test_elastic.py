"""The states of an elastic group of leaders and what an exchange may end in, with a manager that plays torchft's part."""

import re
import socket
from typing import Any

import pytest
import torch

from dpa_ds.distributed import elastic
from dpa_ds.distributed.elastic import ElasticGroup, Membership, SyncState
from dpa_ds.distributed.tunnel import LIGHTHOUSE, STORE, Gate, listen
from dpa_ds.distributed.world import check_rendezvous
from dpa_ds.errors import ClusterError, Preempted

OTHERS_CLIENTS = 3.0
PRESENT = torch.tensor([0.0, 1.0])
"""What another leader hands in before a round: it is not late, and it is one."""


class Manager:
    """One other leader, which hosts OTHERS_CLIENTS clients."""

    def __init__(self, group: ElasticGroup) -> None:
        self.group = group
        self.step = 0
        self.commits: list[bool] = []
        """What the next attempts end in; once empty: committed."""
        self.handovers: list[tuple[int, dict[str, Any]] | None] = []
        """Step and state that this leader receives in the next attempts; once empty: nothing."""
        self.shrink_only: list[bool] = []
        self.others_buffer: torch.Tensor | None = torch.tensor([10.0, 10.0, 10.0])
        """What the other leader hands in; None: there is none."""

    def current_step(self) -> int:
        return self.step

    def start_quorum(self, shrink_only: bool) -> None:
        self.shrink_only.append(shrink_only)
        handover = self.handovers.pop(0) if self.handovers else None
        if handover is not None:
            self.step, state = handover
            self.group._receive_handover(state)

    def allreduce(self, total: torch.Tensor, reduce_op: object) -> "Manager":
        if self.others_buffer is not None:
            total[:-1] += self.others_buffer
            total[-1] += OTHERS_CLIENTS
        return self

    def wait(self) -> None:
        pass

    def should_commit(self) -> bool:
        committed = self.commits.pop(0) if self.commits else True
        self.step += committed
        return committed


def build(monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> tuple[ElasticGroup, Manager]:
    monkeypatch.setattr(elastic, "JOIN_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(elastic, "EXCHANGE_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(ElasticGroup, "_build_manager", lambda self, replica_id, host: Manager(self))
    settings: dict[str, Any] = {
        "group": 0,
        "rendezvous": "127.0.0.1:1",
        "secret": b"of the tests, long enough",
        "facts": {},
        "num_groups": 2,
        "num_clients": 2,
        "min_clients": 1,
        "timeout_seconds": 0.2,
        "join_seconds": 60.0,
    }
    group = ElasticGroup(**{**settings, **overrides})
    return group, group._manager  # type: ignore[return-value]


def handover(membership: Membership = Membership.FORMED, completed_rounds: int = 7) -> dict[str, Any]:
    """Of a leader whose last exchange was of three numbers, over five clients."""
    sync_state = SyncState(completed_rounds, torch.tensor([0.5]))
    return elastic._Handover(sync_state, membership, torch.tensor([4.0, 5.0, 6.0, 5.0])).to_dict()


def reduced(group: ElasticGroup) -> list[float]:
    buffer = torch.tensor([1.0, 2.0, 3.0])
    group.all_reduce_(buffer, "update")
    return buffer.tolist()


def test_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    assert reduced(group) == [11.0, 12.0, 13.0]
    assert manager.shrink_only == [True], "nobody joins in the middle of a round"
    assert group.bytes_handed == {"update": 12}
    assert manager.step == 1


def test_failed_attempts_are_repeated_with_what_this_leader_had(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.commits = [False, False, True]
    assert reduced(group) == [11.0, 12.0, 13.0]
    assert manager.step == 1
    assert group.bytes_handed == {"update": 12}, "counted once"


def test_attempts_end_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.commits = [False] * 100_000
    with pytest.raises(ClusterError, match=r"cannot exchange anything for 0\.2 s \(federation\.timeout_seconds\)"):
        reduced(group)


def test_a_result_that_this_leader_missed_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.commits = [False]
    manager.handovers = [None, (1, handover())]
    assert reduced(group) == [4.0, 5.0, 6.0]
    assert group._hand_over()["result"].tolist() == [4.0, 5.0, 6.0, 5.0], "and may be handed on"
    assert reduced(group) == [11.0, 12.0, 13.0], "once"


def test_a_leader_that_fell_behind_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.handovers = [(2, handover())]
    with pytest.raises(ClusterError, match="the other groups continued without this one"):
        reduced(group)


@pytest.mark.parametrize(("min_clients", "is_enough"), [(5, True), (6, False)])
def test_too_few_clients(min_clients: int, is_enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group, _ = build(monkeypatch, min_clients=min_clients)
    reduced(group)  # while groups are waited for, there may be fewer
    group._membership = Membership.FORMED
    if is_enough:
        reduced(group)
        return
    with pytest.raises(ClusterError, match=r"host 5 clients, fewer than federation\.min_clients = 6"):
        reduced(group)


def test_joining_waits_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    others = iter([None, None, None, PRESENT])
    original = manager.start_quorum

    def start_quorum(shrink_only: bool) -> None:
        original(shrink_only)
        manager.others_buffer = next(others)

    manager.start_quorum = start_quorum  # type: ignore[method-assign]
    mine = SyncState(2, torch.tensor([1.5]))
    assert group.sync_round(mine) == (mine, False)
    assert manager.shrink_only == [False] * 4, "who comes may join"
    assert group._membership is Membership.FORMED
    assert group._hand_over()["completed_rounds"] == 2


def test_joining_ends_when_one_has_waited_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch, join_seconds=0.05)
    manager.others_buffer = None
    mine = SyncState(0, torch.zeros(1))
    assert group.sync_round(mine) == (mine, False)
    assert len(manager.shrink_only) > 1


def test_a_formed_group_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.others_buffer = PRESENT
    mine = SyncState(0, torch.zeros(1))
    group.sync_round(mine)
    manager.others_buffer = None
    assert group.sync_round(mine) == (mine, False)
    assert len(manager.shrink_only) == 2


def test_a_leader_that_joins_a_running_federation_starts_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch, num_groups=100)
    manager.others_buffer = None
    manager.handovers = [(40, handover())]
    agreed, others_run = group.sync_round(SyncState(0, torch.zeros(1)))
    assert (agreed.completed_rounds, agreed.shared.tolist(), others_run) == (7, [0.5], True)
    assert group._membership is Membership.FORMED
    manager.others_buffer = torch.tensor([10.0, 10.0, 10.0])
    assert reduced(group) == [11.0, 12.0, 13.0], "what it received is used up"


def test_of_leaders_that_join_together_all_start_from_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)
    manager.others_buffer = PRESENT
    manager.handovers = [(3, handover(Membership.JOINING, completed_rounds=4))]
    agreed, others_run = group.sync_round(SyncState(0, torch.zeros(1)))
    assert (agreed.completed_rounds, others_run) == (4, False)


def test_a_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stop: list[bool] = []
    group, manager = build(monkeypatch, stop_requested=lambda: bool(stop))

    def wait_for_signal(shrink_only: bool) -> None:
        stop.append(True)
        elastic.time.sleep(0.2)

    manager.start_quorum = wait_for_signal  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="while this leader waited for the others"):
        reduced(group)


def test_a_lost_rendezvous_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    group, manager = build(monkeypatch)

    def no_answer(shrink_only: bool) -> None:
        raise TimeoutError("deadline passed\nand more")

    manager.start_quorum = no_answer  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match=r"no answer from the rendezvous at 127\.0\.0\.1:1 .*\(deadline passed\)"):
        reduced(group)


def test_a_group_that_the_gate_refuses_ends_with_the_reason() -> None:
    """torchft's own manager, which connects through the tunnel; nothing listens behind the gate."""
    gate = Gate(listen("127.0.0.1", 0), {LIGHTHOUSE: 1, STORE: 1}, b"of the tests, long enough", report=len)
    settings: dict[str, Any] = {"num_groups": 2, "num_clients": 2, "min_clients": 1, "join_seconds": 2.0}
    settings["timeout_seconds"] = 60.0  # it does not wait that long
    group = ElasticGroup(
        group=0, rendezvous=f"127.0.0.1:{gate.port}", secret=b"another secret, as long", facts={}, **settings
    )
    with pytest.raises(ClusterError, match="refuses this group: they do not have the same secret"):
        group.sync_round(SyncState(0, torch.zeros(3)))


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_rendezvous_is_asked_for_before_anything_is_written(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((host.strip("[]"), 0))
        address = f"{host}:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=re.escape(f"no answer from the rendezvous at {address} within 0.3 s")):
            check_rendezvous(address, 0.3)
        server.listen()
        check_rendezvous(address, 0.3)
    check_rendezvous(None, 0.3)
    with pytest.raises(ClusterError, match=r"no answer from the rendezvous at no.such.host.invalid:29600"):
        check_rendezvous("no.such.host.invalid:29600", 0.3)
