"""Numbers on disk: curves may be lost, and the training is not; whatever ends a run, they are written before its end."""

import errno
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from dpa_ds.config.schema import TrackingConfig
from dpa_ds.errors import CheckpointError, Preempted
from dpa_ds.evaluation.report import write_report
from dpa_ds.runs.curves import CurveWriter, tag_of
from dpa_ds.runs.storage import BackgroundWriter
from dpa_ds.runs.tracking import RESULT, LogFile, Tracker, logger, read_records, setup_logging


def write_curves(run_dir: Path) -> None:
    tracker = Tracker(run_dir, True, TrackingConfig())
    for step in range(50):
        tracker.scalars("client_00", {"loss": [1.0] * 20}, 20 * step)
        tracker.scalars("rounds", {"loss/held_out": 1.0}, step)
    tracker.close()
    tracker.close()
    tracker.record("round", 1, held_out_loss=1.0)
    tracker.sync_records()
    assert len(read_records(run_dir / "metrics.jsonl")) == 1


def warned_once(caplog: pytest.LogCaptureFixture, error: str) -> None:
    (warning,) = [record.getMessage() for record in caplog.records]
    assert error in warning
    assert "the training continues without TensorBoard curves" in warning


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("num_written", [0, 1, 30])
def test_a_full_disk_costs_the_curves_only(
    num_written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full from the first event on, from the second, or from a later one."""
    events: list[bytes] = []
    write = RecordWriter.write

    def write_until_full(self: RecordWriter, data: bytes) -> None:
        if len(events) == num_written:
            raise OSError(errno.ENOSPC, "No space left on device")
        events.append(data)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_until_full)
    with caplog.at_level(logging.WARNING, "dpa_ds"):
        write_curves(tmp_path)
    warned_once(caplog, "No space left on device")


def test_a_file_in_the_place_of_the_folder_costs_the_curves_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("")
    with caplog.at_level(logging.WARNING, "dpa_ds"):
        write_curves(tmp_path)
    warned_once(caplog, "tensorboard")


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dpa_ds"):
        write_curves(tmp_path)
    assert not caplog.records
    assert list((tmp_path / "tensorboard").glob("*/events*"))


def test_records_of_a_round_are_dropped_with_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "round", "round": 0}\n{"kind": "client", "round": 1}\n{"kind": "cl')
    Tracker(tmp_path, True, TrackingConfig()).drop_records_of(1)
    assert path.read_text() == '{"kind": "round", "round": 0}\n'


def test_a_resumed_run_draws_in_place_of_what_it_draws_again(tmp_path: Path) -> None:
    """Two rounds of 60 steps an adapter; the process ends when it has drawn round 3, which does not count."""
    config = TrackingConfig()
    first = Tracker(tmp_path, True, config)
    for server_round in (1, 2, 3):
        first.scalars("client_01", {"loss/global": [1.0] * 60}, 60 * (server_round - 1))
        first.scalars("client_01", {"loss/local": [1.0] * 60}, 60 * (server_round - 1))
        first.scalars("client_01", {"loss/held_out": 1.0}, server_round)
    again = Tracker(tmp_path, True, config)  # the first was killed: it closes nothing
    again.scalars("client_01", {"loss/global": [2.0] * 60}, 120)
    again.scalars("client_01", {"loss/local": [2.0] * 30}, 120)
    again.scalars("client_01", {"loss/held_out": 2.0}, 3)
    again.close()
    folder = tmp_path / "tensorboard" / "client_01"
    assert shown(folder, "loss/global") == {**dict.fromkeys(range(120), 1.0), **dict.fromkeys(range(120, 180), 2.0)}
    assert shown(folder, "loss/local") == {**dict.fromkeys(range(120), 1.0), **dict.fromkeys(range(120, 150), 2.0)}
    assert shown(folder, "loss/held_out") == {1: 1.0, 2: 1.0, 3: 2.0}
    assert len(list(folder.iterdir())) == 1
    assert not (tmp_path / "tensorboard" / "client_00").exists()


def test_a_client_whose_round_was_undone_draws_these_steps_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, True, TrackingConfig())
    for value in (1.0, 2.0):
        tracker.scalars("client_00", {"loss/global": [value] * 4}, 8)
    tracker.close()
    assert shown(tmp_path / "tensorboard" / "client_00", "loss/global") == dict.fromkeys(range(8, 12), 2.0)


def test_curves_of_an_older_version_are_continued_and_mended(tmp_path: Path) -> None:
    """It named them otherwise, and hid by one step number what the round numbers of another curve were below."""
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "tensorboard" / "client_00"
    for number, purge_step in enumerate((None, 3)):
        old = SummaryWriter(str(folder), purge_step=purge_step)
        for step in range(10 * number, 10 * number + 10):
            old.add_scalar("global/loss", 1.0, step)
        old.add_scalar("held_out/loss", 1.0, number)
        old.close()
    tracker = Tracker(tmp_path, True, TrackingConfig())
    tracker.scalars("client_00", {"loss/global": [2.0] * 5}, 20)
    tracker.scalars("client_00", {"loss/held_out": 2.0}, 2)
    tracker.close()
    assert list(shown(folder, "loss/global")) == list(range(25))
    assert shown(folder, "loss/held_out") == {0: 1.0, 1: 1.0, 2: 2.0}


def test_private_curves_follow_their_client_to_another_group(tmp_path: Path) -> None:
    places = [tmp_path / "private" / str(group) for group in range(2)]
    for server_round, group in enumerate((0, 1, 1, 0)):
        tracker = Tracker(tmp_path, True, TrackingConfig(), places[group], [tmp_path, *places])
        tracker.scalars("client_00", {"loss/held_out": 1.0}, server_round)
        tracker.close()
    assert list(shown(places[0] / "tensorboard" / "client_00", "loss/held_out")) == [0, 1, 2, 3]
    assert not list((places[1] / "tensorboard" / "client_00").iterdir())
    assert not (tmp_path / "tensorboard").exists()


def test_a_disk_that_is_full_when_a_run_resumes_costs_no_earlier_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "client_00"
    writer = CurveWriter(folder)
    writer.draw({"loss/held_out": [1.0] * 9}, 0)
    writer.close()
    events: list[bytes] = []
    write = RecordWriter.write

    def write_until_full(self: RecordWriter, data: bytes) -> None:
        if len(events) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        events.append(data)
        write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "write", write_until_full)
        with pytest.raises(OSError, match="No space"):
            CurveWriter(folder)
    assert list(shown(folder, "loss/held_out")) == list(range(9))


def test_losses_come_first_and_bytes_last() -> None:
    """TensorBoard sorts the curves of its page by their tags."""
    names = ["bytes_handed/update", "seconds/train", "held_out_loss", "tokens_per_second", "P", "computed_share"]
    tags = [*map(tag_of, names), "loss/global", "optimizer/global_lr"]
    assert sorted(tags)[:2] == ["loss/global", "loss/held_out"]
    assert sorted(tags)[-1] == "traffic_bytes/update"


def test_a_point_is_in_the_file_when_it_was_drawn(tmp_path: Path) -> None:
    """What is saved next says that the step is done: a process that is killed then would leave a gap in the curve."""
    tracker = Tracker(tmp_path, True, TrackingConfig())
    for step in range(3):
        tracker.scalars("client_00", {"loss": [1.0] * 5}, 5 * step)
        assert num_events(tmp_path / "tensorboard" / "client_00", "loss") == 5 * (step + 1)
    tracker.close()


def test_the_rounds_of_several_coordinators_are_one_curve(tmp_path: Path) -> None:
    """Group 1 takes rounds 3 and 6; group 0 is back for 4 and 5. Each takes over what the other one drew."""
    config = TrackingConfig()
    trackers = [Tracker(tmp_path, True, config) for _ in range(2)]
    for server_round, coordinator in ((1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 1)):
        for group, tracker in enumerate(trackers):
            if group == coordinator:
                tracker.scalars("rounds", {"loss/held_out": 1.0}, server_round)
            else:
                tracker.leave_curves("rounds")
    for tracker in trackers:
        tracker.close()
    assert num_events(tmp_path / "tensorboard" / "rounds", "loss/held_out") == 6


def test_curves_are_written_before_a_signal_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank: only then may the job say that all is saved."""
    from dpa_ds.cli import session as module

    tracker = Tracker(tmp_path, True, TrackingConfig())
    written: list[bytes] = []
    write = RecordWriter.write

    def write_slowly(self: RecordWriter, data: bytes) -> None:
        time.sleep(0.01)
        written.append(data)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)

    def train_until_the_signal(session: Any) -> None:
        session.tracker.scalars("client_00", {"loss": [1.0] * 30}, 0)
        raise Preempted("a signal")

    monkeypatch.setattr(module, "run_rounds", train_until_the_signal)
    parts = {
        "world": SimpleNamespace(leaders=None),
        "folder": SimpleNamespace(run_dir=tmp_path),
        "writer": BackgroundWriter(),
        "tracker": tracker,
    }
    with pytest.raises(Preempted):
        module.run(cast(Any, SimpleNamespace(**parts)))
    num_written = len(written)
    assert num_events(tmp_path / "tensorboard" / "client_00", "loss") == 30
    assert len(written) == num_written, "later, when the process has ended"


def num_events(folder: Path, tag: str) -> int:
    return len(shown(folder, tag))


def shown(folder: Path, tag: str) -> dict[int, float]:
    """Step -> value, of a curve that TensorBoard shows; no step may be there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    curve = {event.step: event.value for event in events}
    assert len(curve) == len(events), f"a step of {tag} is there twice"
    return curve


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        (None, "metrics.jsonl cannot be read .No such file or directory.: restore it"),
        ([], "metrics.jsonl lacks records of the rounds of this run .IndexError: .*: restore it"),
        ([{"kind": "client", "round": 1}, {"kind": "round", "round": 1}], "metrics.jsonl lacks records .*KeyError"),
    ],
)
def test_a_finished_run_without_its_records(records: list[object] | None, fault: str, tmp_path: Path) -> None:
    if records is not None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(CheckpointError, match=fault):
        write_report(tmp_path, 1, 0.0)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("loss", [{}, {"held_out_loss": 2.0}])
def test_a_table_says_why_its_cells_are_empty(loss: dict[str, float], tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, True, TrackingConfig())
    for server_round in (0, 1):
        tracker.record("client", server_round, client=0, label="a", num_examples=3, held_out_loss=2.0)
        tracker.record("client", server_round, client=1, label="b", num_examples=3, **loss)
        tracker.record("round", server_round, tokens_per_second=1.0, computed_share=1.0)
    text = write_report(tmp_path, 1, 0.0)
    assert ("no held-out examples; set data.held_out_fraction" in text) == (not loss)


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[LogFile]:
    handler = LogFile(tmp_path / "log.txt")
    handlers, level = logger.handlers, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.handlers = [other for other in handlers if other is not handler]
    logger.setLevel(level)


def test_the_log_file_has_what_was_said_before_there_was_a_run(log_file: LogFile, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("of an earlier process\n")
    logger.info("before")
    assert path.read_text() == "of an earlier process\n"
    log_file.begin()
    logger.warning("after")
    first, *others = path.read_text().splitlines()
    assert first == "of an earlier process"
    assert [line.split(" ", 2)[2] for line in others] == ["before", "after"]


def test_a_log_file_that_cannot_be_written_costs_the_log_only(
    log_file: LogFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger.propagate = True
    (tmp_path / "log.txt").mkdir()
    log_file.begin()
    logger.info("later")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, "the warning comes once"
    assert "the training continues without its log file" in said[0]


def test_quiet_leaves_warnings_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log file has every line."""
    setup_logging(is_coordinator=True, quiet=True)
    file = LogFile(tmp_path / "log.txt")
    logger.addHandler(file)
    file.begin()
    logger.info("round 1")
    logger.log(RESULT, "a table")
    logger.warning("a fault")
    assert capsys.readouterr().out == "a table\na fault\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3
    setup_logging(is_coordinator=True)
    logger.info("round 2")
    assert capsys.readouterr().out == "round 2\n"
