"""Each host has the files of its own clients only: training, held-out losses and the report of the data need no other."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.multirank
CLIENTS = ("south", "north")


def train_on_host(job: Any, argv: Sequence[str], hosts: Sequence[str]) -> str:
    """Train in a folder of this rank; what was logged."""
    from dpa_ds.cli.session import train
    from dpa_ds.config.load import load_config
    from dpa_ds.runs.tracking import logger

    os.chdir(hosts[job.launch.global_rank])
    lines: list[str] = []
    usual = {"info": logger.info, "warning": logger.warning}

    def noting(name: str) -> Any:
        def log(text: str, *arguments: Any) -> None:
            lines.append(text)
            usual[name](text, *arguments)

        return log

    for name in usual:
        setattr(logger, name, noting(name))
    train(load_config(argv), job)
    return "\n".join(lines)


def name_clients(job: Any, argv: Sequence[str], hosts: Sequence[str]) -> str:
    from dpa_ds.config.load import load_config
    from dpa_ds.errors import DataError
    from dpa_ds.federation.clients import agree_on_client_names

    os.chdir(hosts[job.launch.global_rank])
    config = load_config(argv)
    try:
        return ",".join(agree_on_client_names(config.data, 0, False, job))
    except DataError as error:
        return str(error)


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[str, str]:
    """Host 0 has the files of client 0, host 1 those of client 1, whose training file has a row twice and a test row."""
    for number, name in enumerate(CLIENTS):
        rows = [{"instruction": f"{name} {n} {word}", "output": word} for n, word in enumerate(tiny.WORDS[:7])]
        train, test = rows[:5], rows[5:]
        if number == 1:
            train += [rows[0], rows[6]]
        for folder, content in (("data", train), ("test", test)):
            path = tmp_path / f"host_{number}" / folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(tmp_path / "host_0"), str(tmp_path / "host_1")


def recipe(tmp_path: Path, output: str, **overrides: Any) -> list[str]:
    settings = {
        "data__format": "table",
        "data__test_path": "test/{client}.jsonl",
        "data__clients": list(CLIENTS),
        "evaluation__every_rounds": 1,
        **overrides,
    }
    model = tmp_path / "model"
    if not model.exists():
        tiny.make_model(model)
    return tiny.recipe(model, Path("data/{client}.jsonl"), tmp_path / output, **settings)


def held_out(run_dir: Path) -> list[tuple[int, str, float]]:
    records = [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == "client"]
    return [(record["round"], record["label"], record["held_out_loss"]) for record in records]


def test_each_host_has_its_own_clients_files_only(hosts: tuple[str, str], tmp_path: Path) -> None:
    logs = run_on_ranks(train_on_host, 2, tmp_path, recipe(tmp_path, "apart"), hosts)
    apart = held_out(tmp_path / "apart" / "tiny")
    assert {label for _, label, _ in apart} == set(CLIENTS)
    assert all(loss > 0 for _, _, loss in apart)
    # The same where one host has all files.
    together = tmp_path / "host_all"
    for host in hosts:
        shutil.copytree(host, together, dirs_exist_ok=True)
    run_on_ranks(train_on_host, 2, tmp_path, recipe(tmp_path, "together"), [str(together)] * 2)
    assert held_out(tmp_path / "together" / "tiny") == apart
    # Counts of both clients at the coordinator; the place of a private row at the host that has it.
    table = {line.split()[0]: line.split()[1:] for line in logs[0].splitlines() if line.startswith("  ")}
    assert (table["south"][0], table["south"][2:]) == ("5", ["0", "0", "0"])
    assert (table["north"][0], table["north"][2:]) == ("7", ["0", "1", "1"])
    assert "north: 1 of the rows to be scored on are trained on, too, such as data/north.jsonl:7: " in logs[1]
    assert "trained on, too" not in logs[0]


def test_only_sums_are_shared(hosts: tuple[str, str], tmp_path: Path) -> None:
    """Then the coordinator's table has the clients of its own group."""
    private = {"metrics__share": "sums", "private_dir": tmp_path / "private_{group}", "federation__num_rounds": 1}
    logs = run_on_ranks(train_on_host, 2, tmp_path, recipe(tmp_path, "sums", **private), hosts)
    tables = [[line.split()[0] for line in log.splitlines() if line.startswith("  ")] for log in logs]
    assert "south" in tables[0]
    assert "north" not in tables[0]


def test_hosts_that_find_different_clients_are_asked_for_their_names(hosts: tuple[str, str], tmp_path: Path) -> None:
    argv = recipe(tmp_path, "runs", data__clients=None)
    assert run_on_ranks(name_clients, 2, tmp_path, argv, [hosts[0]] * 2) == ["south", "south"]
    found = run_on_ranks(name_clients, 2, tmp_path, argv, hosts)
    assert found[0] == "south"
    assert (
        "has files of north, and the host of rank 0 those of other clients: give all hosts the same files" in found[1]
    )
