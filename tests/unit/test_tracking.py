"""What the tracker and the report find in a run folder that is not as they left it."""

import json
from pathlib import Path

import pytest

from dpa_ds.config.schema import TrackingConfig
from dpa_ds.errors import CheckpointError
from dpa_ds.evaluation.report import write_report
from dpa_ds.runs.tracking import Tracker


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_something_else_is_where_the_curves_belong(kind: str, tmp_path: Path) -> None:
    events = tmp_path / "tensorboard"
    if kind == "file":
        events.write_text("")
    else:
        events.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="tensorboard is not the folder that curves are written to: move it away"):
        Tracker(tmp_path, True, TrackingConfig())
    Tracker(tmp_path, True, TrackingConfig(tensorboard=False))
    Tracker(None, False, TrackingConfig())


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
