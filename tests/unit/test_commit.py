"""A round counts once, whoever of the coordinators is lost while it is recorded and completed; references, too."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import torch

from dpa_ds.config.schema import FederationConfig, TrackingConfig
from dpa_ds.distributed.topology import Topology
from dpa_ds.distributed.world import World
from dpa_ds.federation import loop
from dpa_ds.federation.aggregation.base import LocalUpdate, ServerState
from dpa_ds.federation.aggregation.pipeline import build_aggregation
from dpa_ds.federation.loop import count_round
from dpa_ds.federation.metrics import COLUMNS, MetricsTable
from dpa_ds.federation.round_state import RoundCommit
from dpa_ds.federation.session import Session
from dpa_ds.runs.folder import RunFolder, local_folder
from dpa_ds.runs.storage import BackgroundWriter
from dpa_ds.runs.tracking import Tracker, read_records

ADAPTER = {"a.lora_A.weight": torch.ones(2, 3)}
CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj"])
TABLE = MetricsTable([dict.fromkeys(COLUMNS, 1.0)] * 2, ["client_0", "client_1"])
"""Both clients were present."""


class Leaders:
    """This leader and one other, which is the coordinator until it is lost in the exchange that ends a round."""

    timeout_seconds = 1.0

    def __init__(self, other_does: Callable[[], object], other_is_lost: bool) -> None:
        self.bytes_handed: Counter[str] = Counter()
        self.is_coordinator = False
        self.purposes: list[str] = []
        self._other_does = other_does
        self._other_is_lost = other_is_lost

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        self.purposes.append(purpose)
        if self.is_coordinator:
            return
        self._other_does()
        if self._other_is_lost:
            self.is_coordinator = True
        else:
            buffer.add_(1.0)


def save_all(folder: RunFolder, server_round: int) -> None:
    """What all leaders have written when the metrics were exchanged."""
    for name in ("global", local_folder(0), local_folder(1)):
        folder.save_adapter(server_round, name, ADAPTER, CONFIG, {}, {})


def session_of(run_dir: Path, leaders: Leaders, writer: BackgroundWriter) -> Session:
    """As much of a session as a commit needs, of a group with a launcher of its own."""
    world = World(Topology((1,), 2, num_groups_elsewhere=1, first_group=1), 1, 0, 1, torch.device("cpu"), leaders)
    adapters = cast(Any, SimpleNamespace(peft_config=lambda name: CONFIG))
    parts = {
        "world": world,
        "folder": RunFolder(run_dir),
        "tracker": Tracker(run_dir, True, TrackingConfig(tensorboard=False)),
        "commit": RoundCommit(RunFolder(run_dir), writer, world, 2, adapters),
        "round_state": SimpleNamespace(server_state=ServerState(ADAPTER, torch.zeros(0, 0), scalars={})),
    }
    return cast(Session, SimpleNamespace(**parts))


def nothing(folder: RunFolder, records: Path) -> None:
    """The coordinator is lost before it has done anything."""


def half_a_record(folder: RunFolder, records: Path) -> None:
    with records.open("a") as file:
        file.write('{"kind": "client", "round": 2, "client": 0, "label": "x"}\n{"kind": "cli')


def records_only(folder: RunFolder, records: Path) -> None:
    with records.open("a") as file:
        for kind in ("client", "client", "round"):
            file.write(f'{{"kind": "{kind}", "round": 2}}\n')


def everything(folder: RunFolder, records: Path) -> None:
    records_only(folder, records)
    folder.complete_round(2, {}, keep_rounds=2)


@pytest.mark.parametrize("other_does", [nothing, half_a_record, records_only, everything])
def test_the_next_coordinator_completes_its_predecessors_round(tmp_path: Path, other_does: Any) -> None:
    folder, records = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    records.write_text('{"kind": "round", "round": 1}\n')
    save_all(folder, 1)
    folder.complete_round(1, {}, keep_rounds=2)
    save_all(folder, 2)
    leaders = Leaders(lambda: other_does(folder, records), other_is_lost=True)
    with BackgroundWriter() as writer:
        count_round(session_of(tmp_path, leaders, writer), 2, TABLE, {})
    assert folder.complete_rounds() == [1, 2]
    assert folder.unfinished_rounds() == []
    assert folder.clients(2) == [0, 1], "also the clients of the group that was lost"
    folder.load_adapter(2, "global")
    assert [(r["kind"], r["round"]) for r in read_records(records)] == [
        ("round", 1), ("client", 2), ("client", 2), ("round", 2),
    ]  # fmt: skip
    assert leaders.purposes == ["commit", "commit"]


def test_what_another_coordinator_does_is_not_done_again(tmp_path: Path) -> None:
    folder, records = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    records.write_text("")
    save_all(folder, 2)
    leaders = Leaders(lambda: everything(folder, records), other_is_lost=False)
    with BackgroundWriter() as writer:
        count_round(session_of(tmp_path, leaders, writer), 2, TABLE, {})
    assert leaders.purposes == ["commit"]
    assert len(read_records(records)) == 3


def test_of_several_that_are_left_the_coordinator_alone_rewrites_the_records(tmp_path: Path) -> None:
    """Two that did it at once replaced one another's file, and one ended with an error."""
    folder, records = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    half_a_record(folder, records)
    written = records.stat().st_ino
    answers = iter([0.0, 1.0])

    class OneOfThree(Leaders):
        """The first is lost as it records, the second is the next coordinator, and this is the third."""

        def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
            buffer.add_(next(answers))

    with BackgroundWriter() as writer:
        count_round(session_of(tmp_path, OneOfThree(lambda: None, False), writer), 2, TABLE, {})
    assert records.stat().st_ino == written


def test_the_next_coordinator_tidies_before_the_first_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one was lost when all groups had met, and before it dropped the records of a round that is run again."""
    folder, records = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    records.write_text('{"kind": "round", "round": 1}\n')
    save_all(folder, 1)
    folder.complete_round(1, {}, keep_rounds=2)
    half_a_record(folder, records)
    monkeypatch.setattr(loop, "sync_round", lambda session, is_starting: False)
    with BackgroundWriter() as writer:
        session = cast(Any, session_of(tmp_path, Leaders(lambda: None, other_is_lost=True), writer))
        session.clients = []
        session.round_state = SimpleNamespace(num_completed=1, restore_progress=lambda clients, server_round: None)
        loop.start_rounds(session)
    assert records.read_text() == '{"kind": "round", "round": 1}\n'


def test_a_coordinator_that_wakes_up_late_changes_nothing(tmp_path: Path) -> None:
    """It was stopped before it recorded round 2; the others have completed round 4 without its clients."""
    folder, records = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    for server_round in (2, 3, 4):
        save_all(folder, server_round)
        folder.complete_round(server_round, {}, keep_rounds=1)
    records.write_text('{"kind": "round", "round": 2}\n')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    leaders = Leaders(lambda: None, other_is_lost=False)
    leaders.is_coordinator = True
    with BackgroundWriter() as writer:
        count_round(session_of(tmp_path, leaders, writer), 2, TABLE, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (tmp_path / "adapters").resolve() == folder.round_dir(4)


# ---- the reference mean -----------------------------------------------------------------------------------------------


class Alone:
    """The only leader."""

    timeout_seconds = 1.0
    is_coordinator = True

    def __init__(self) -> None:
        self.bytes_handed: Counter[str] = Counter()

    def all_reduce_(self, buffer: torch.Tensor, purpose: str) -> None:
        self.bytes_handed[purpose] += buffer.numel() * buffer.element_size()


def test_each_clients_references_are_counted_once() -> None:
    """Also those of a client whose leader was lost before it saved: it starts from scratch, and hands them over again."""
    aggregation = build_aggregation(FederationConfig(), seed=0)
    state = ServerState(ADAPTER, torch.zeros(2, 4), references_counted=torch.zeros(3))
    leaders = Alone()
    for server_round, client_ids in enumerate([(0, 2), (0, 1, 2), (0, 1, 2)], 1):
        accumulator = aggregation.accumulator(state)
        for client in client_ids:
            accumulator.add(LocalUpdate(client, 1, ADAPTER, torch.full((2, 4), float(client))))
        # A leader that joins now has what the others have.
        state = replace(state).unflatten(state.flatten())
        state = aggregation.step(state, accumulator.reduce(leaders), server_round)
        assert state.reference_weight == len({0, 2, *client_ids})
    torch.testing.assert_close(state.reference_mean, torch.full((2, 4), 1.0))
    assert state.references_counted.tolist() == [1.0, 1.0, 1.0]
    assert leaders.bytes_handed["references"] == 3 * 4 * (2 * 4 + 1 + 3)
