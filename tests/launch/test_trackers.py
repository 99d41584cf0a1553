"""Copies of metrics.jsonl in Weights & Biases and MLflow, by the real libraries, without a network.

Each training is a process of its own (15 s): both libraries have threads, and one a process beside it.
"""

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpa_ds.config.fields import FIELDS
from dpa_ds.config.load import load_config
from dpa_ds.config.validate import flatten
from dpa_ds.runs.trackers import NEVER_SENT, Numbers, numbers_of, public_recipe
from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.launch.processes import RUN, run

BLOCK_BYTES = 32768
HEADER_BYTES = 7


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of its own."""
    data, position, record = path.read_bytes(), HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER_BYTES])
        position += HEADER_BYTES
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_rounds(run_dir: Path) -> tuple[set[str], dict[int, Numbers], dict[str, object]]:
    """Ids of the runs that the offline files are of, their points, and the recipe."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, rounds, recipe = set(), {}, {}
    for path in sorted(run_dir.glob("trackers/wandb/offline-run-*/*.wandb")):
        for content in wandb_records(path):
            record = Record()
            record.ParseFromString(content)
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                    assert not record.run.host
                    recipe |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                case "history":
                    values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                    assert values["_step"] not in rounds, "sent twice"
                    rounds[values["_step"]] = {key: value for key, value in values.items() if key[0] != "_"}
    recipe.pop("_wandb")
    return ids, rounds, recipe


def mlflow_rounds(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], dict[int, Numbers], dict[str, str]]:
    """Ids of the runs in the store, their points, and the recipe."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store.as_uri())
    experiment = client.get_experiment_by_name("dpa_ds")
    runs = client.search_runs([experiment.experiment_id])
    rounds: dict[int, Numbers] = defaultdict(dict)
    recipe = {}
    for found in runs:
        assert found.info.status == "FINISHED"
        recipe |= found.data.params
        for name in found.data.metrics:
            for point in client.get_metric_history(found.info.run_id, name):
                assert name not in rounds[point.step], "sent twice"
                rounds[point.step][name] = point.value
    return {found.info.run_id for found in runs}, dict(rounds), recipe


def test_every_point_is_in_both(model: Path, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the run was resumed, which appends to the same runs."""
    words = tiny.recipe(
        model, federation, tmp_path / "runs", tracking__wandb="offline", tracking__mlflow=tmp_path / "store"
    )
    for num_rounds in (1, 2):
        ended = run([*RUN, *words, f"--federation.num_rounds={num_rounds}"])
        assert ended.returncode == 0, ended.output
        assert "tracking." not in ended.output
    run_dir = tmp_path / "runs" / "tiny"
    expected = numbers_of(read_records(run_dir / "metrics.jsonl"))
    assert sorted(expected) == [0, 1, 2]
    assert {"held_out_loss", "client_00/held_out_loss", "client_01/global_loss"} <= set(expected[1])
    ids, rounds, recipe = wandb_rounds(run_dir)
    assert len(ids) == 1
    assert rounds == expected
    sent = public_recipe(flatten(load_config([*words, "--federation.num_rounds=2"])))
    assert recipe == json.loads(json.dumps(sent))
    assert not set(NEVER_SENT) & set(recipe)
    ids, rounds, recipe = mlflow_rounds(tmp_path / "store", monkeypatch)
    assert len(ids) == 1
    assert rounds == expected
    assert set(recipe) == set(sent)
    for path in run_dir.glob("trackers/wandb/offline-run-*/*.wandb"):
        content = path.read_bytes()
        for private in (str(tmp_path), str(Path.home()), os.uname().release):
            assert private.encode() not in content


def test_a_service_that_fails_costs_a_warning(model: Path, federation: Path, tmp_path: Path) -> None:
    """Nobody listens at either address. What the libraries try again holds the run up by seconds (30 s in all)."""
    words = tiny.recipe(
        model,
        federation,
        tmp_path / "runs",
        federation__num_rounds=1,
        tracking__wandb="online",
        tracking__mlflow="http://127.0.0.1:9",
    )
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    ended = run([*RUN, *words], **key)
    assert ended.returncode == 0, ended.output
    assert ended.num_tracebacks == 0, ended.output
    for name in ("wandb", "mlflow"):
        (warning,) = [line for line in ended.output.splitlines() if line.startswith(f"tracking.{name}: ")]
        assert warning.endswith("the same command sends what is missing")
    assert (tmp_path / "runs" / "tiny" / "results.json").is_file()
    assert ended.seconds < 75


def test_what_is_never_sent_are_fields() -> None:
    """A field that is renamed must not slip through; secrets in it neither."""
    assert set(NEVER_SENT) < set(FIELDS)
    recipe = dict.fromkeys(FIELDS) | {"model.path": "/home/someone/models/llama", "lora.rank": 8}
    sent = public_recipe(recipe)
    assert set(FIELDS) - set(sent) == set(NEVER_SENT)
    assert sent["model.path"] == "llama"


def test_where_sums_are_shared_no_client_is_sent() -> None:
    """What is sent is what metrics.jsonl has: labels and other texts stay."""
    records = [
        {"kind": "round", "round": 1, "held_out_loss": 0.5, "bytes_handed/update": 12.0, "note": "x"},
        {"kind": "client", "round": 2, "client": 3, "label": "hospital", "num_steps": 4},
    ]
    assert numbers_of(records[:1]) == {1: {"held_out_loss": 0.5, "bytes_handed/update": 12.0}}
    assert numbers_of(records) == {1: numbers_of(records[:1])[1], 2: {"client_03/num_steps": 4.0}}
