"""What a client keeps to itself stays with its group: on disk, between groups, in reports, and through a resume."""

import json
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpa_ds.runs.tracking import read_records
from tests import tiny
from tests.launch.processes import (
    PYTHON,
    RUN,
    Ended,
    Forked,
    Running,
    adapters,
    assert_same_adapters,
    run,
    run_by_hand,
    run_forked,
    start_by_hand,
    wait_for,
)
from tests.launch.test_elastic import last_round, presence, rendezvous, wait_until
from tests.launch.test_resume import kill_when

pytestmark = pytest.mark.launch
EVALUATE = ("--beams", "1", "--max_new_tokens", "4")
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients whose training texts occur nowhere by chance."""
    folder = tmp_path_factory.mktemp("secrets") / "federation"
    tiny.make_federation(folder, sizes=(7, 5))
    for client in range(2):
        path = folder / "2" / f"local_training_{client}.json"
        rows = json.loads(path.read_text())
        for number, row in enumerate(rows):
            row["instruction"] = f"patient {client}-{number} has a secret"
            row["output"] = f"diagnosis Q{client}{number}Z"
        path.write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def arguments(model: Path, secrets: Path) -> Arguments:
    """Rounds of about a second, with dropout and optimizer state that must be restored too."""

    def arguments(folder: Path, private: bool = True, **overrides: object) -> list[str]:
        folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {"train__local_epochs": 5.0, "lora__dropout": 0.1}
        settings["train__keep_optimizer_state"] = True
        if private:
            settings["private_dir"] = folder / "private" / "{group}"
        return tiny.recipe(model, secrets, folder / "runs", **{**settings, **overrides})

    return arguments


@pytest.fixture(scope="module")
def in_one_part(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two groups without private_dir."""
    folder = tmp_path_factory.mktemp("one")
    two_groups(arguments(folder, private=False))
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def in_two_parts(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Folder of a run of two groups with private_dir, evaluated, and all bytes that crossed the loopback interface."""
    folder = tmp_path_factory.mktemp("two")
    with recorded_exchange() as exchange:
        outputs = two_groups(arguments(folder))
    assert f"what clients keep to themselves goes to {folder}/private/{{group}}/tiny" in outputs[0].output
    well_ended(run_forked(["--run", str(folder / "runs" / "tiny"), *EVALUATE], program="launch/evaluate.py"))
    return folder, b"".join(exchange)


def two_groups(argv: list[str]) -> list[Ended]:
    return [well_ended(one) for one in run_by_hand(start_by_hand([*RUN, *argv], 2))]


def well_ended(ended: Ended) -> Ended:
    assert ended.returncode == 0, ended.output
    return ended


@contextmanager
def recorded_exchange() -> Iterator[list[bytes]]:
    """Every packet on the loopback interface, which is all that two leaders on one host can say to each other."""
    packets: list[bytes] = []
    try:
        recorder = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    except PermissionError:
        pytest.skip("recording packets needs CAP_NET_RAW")
    recorder.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
    recorder.bind(("lo", 0))
    recorder.settimeout(0.2)
    done = threading.Event()

    def record() -> None:
        while not done.is_set():
            try:
                packets.append(recorder.recv(1 << 17))
            except TimeoutError:
                continue

    thread = threading.Thread(target=record)
    thread.start()
    try:
        yield packets
    finally:
        done.set()
        thread.join()
        recorder.close()


def everything_below(folder: Path) -> bytes:
    """All bytes of all files, and their names."""
    found = []
    for path in sorted(folder.rglob("*")):
        found.append(str(path.relative_to(folder)).encode())
        if path.is_file():
            found.append(path.read_bytes())
    return b"\0".join(found)


def texts_of(data: Path) -> list[str]:
    rows = []
    for client in range(2):
        rows += json.loads((data / "2" / f"local_training_{client}.json").read_text())
    return [row[column] for row in rows for column in ("instruction", "output")]


def needles(texts: list[str], private: Path) -> dict[str, bytes]:
    """What nobody but its group may see: each text, its tokens in both widths, each tensor of a local adapter."""
    found: dict[str, bytes] = {}
    tokenizer = tiny.make_tokenizer()
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        found[text] = text.encode()
        found[f"{text} as int32"] = np.array(tokens, np.int32).tobytes()
        found[f"{text} as int64"] = np.array(tokens, np.int64).tobytes()
    for path in private.glob("*/tiny/rounds/*/local/*/adapter_model.safetensors"):
        for key, tensor in load_file(path).items():
            found[f"{path} {key}"] = tensor.numpy().tobytes()
    return found


def private_adapters(folder: Path, server_round: int) -> dict[str, torch.Tensor]:
    """All tensors after a round, under the keys of `adapters`."""
    tensors = {}
    name = f"round_{server_round:06d}"
    paths = [*(folder / "runs" / "tiny" / "rounds" / name).glob("global/adapter_model.safetensors")]
    paths += (folder / "private").glob(f"*/tiny/rounds/{name}/local/*/adapter_model.safetensors")
    for path in paths:
        for key, tensor in load_file(path).items():
            tensors[f"{str(path.parent).partition(name + '/')[2]}/{key}"] = tensor
    return tensors


# ---- what leaves a group --------------------------------------------------------------------------------------------


def test_nothing_of_a_client_is_in_the_common_folder_or_the_exchange(
    in_two_parts: tuple[Path, bytes], secrets: Path
) -> None:
    folder, exchange = in_two_parts
    wanted = needles(texts_of(secrets), folder / "private")
    assert len(wanted) > 24 * 3 + 8
    own = everything_below(folder / "private")
    for name, needle in wanted.items():
        if name.startswith(str(folder)) or (name.startswith("patient") and name.endswith("int32")):
            assert needle in own, f"{name}: the search finds what is there"
    common = everything_below(folder / "runs")
    assert b"client_0 colour0" in exchange, "names are exchanged"
    assert b"client_0 colour0" in common
    for name, needle in wanted.items():
        assert needle not in common, name
        assert needle not in exchange, name


def test_the_search_finds_what_a_run_in_one_part_has(in_one_part: Path, secrets: Path) -> None:
    """A test that cannot fail shows nothing: tokens of the references, and local adapters, are in that folder."""
    found = everything_below(in_one_part)
    prompts = [text for text in texts_of(secrets) if text.startswith("patient")]
    tokenizer = tiny.make_tokenizer()
    tokens = [np.array(tokenizer(text)["input_ids"], np.int32).tobytes() for text in prompts]
    assert sum(needle in found for needle in tokens) >= 10
    assert list(in_one_part.glob("rounds/*/local/client_01/adapter_model.safetensors"))


def test_who_may_read_what(in_two_parts: tuple[Path, bytes], in_one_part: Path) -> None:
    folder, _ = in_two_parts
    for path in [p for group in "01" for p in (folder / "private" / group / "tiny").rglob("*")]:
        if "evaluations" in path.parts and path.is_dir() and path.name != "answers":
            continue  # inside of a closed folder
        assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path
    for group in "01":
        assert mode_of(folder / "private" / group / "tiny") == 0o700
        assert mode_of(folder / "private" / group / "tokens") == 0o700
    for path in (folder / "runs" / "tiny").rglob("*"):
        if not path.is_symlink():
            assert mode_of(path) == (0o755 if path.is_dir() else 0o644), path
    # In one part, too: what is a client's is its owner's, and the rest the umask's.
    last = in_one_part / "rounds" / "round_000002"
    assert mode_of(last / "local" / "client_00") == 0o700
    assert {mode_of(path) for path in (last / "local" / "client_00").iterdir()} == {0o600}
    assert {mode_of(path) for path in (last / "global").iterdir()} == {0o644}
    assert {mode_of(path) for path in (in_one_part.parent / "cache" / "tokens").iterdir()} == {0o600}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_shared_files_follow_the_umask(tmp_path: Path, arguments: Arguments) -> None:
    argv = arguments(tmp_path, federation__num_rounds=1, train__max_steps=1)
    well_ended(run(["sh", "-c", f'umask 027; exec {PYTHON} launch/run.py "$@"', "sh", *argv]))
    for path in (tmp_path / "runs" / "tiny" / "rounds").rglob("*"):
        assert mode_of(path) == (0o750 if path.is_dir() else 0o640), path
    assert {mode_of(path) for path in (tmp_path / "private").glob("0/tiny/rounds/*/local/*/*")} == {0o600}


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_it_is_the_same_run(in_two_parts: tuple[Path, bytes], in_one_part: Path) -> None:
    assert_same_adapters(private_adapters(in_two_parts[0], 2), adapters(in_one_part), tolerance=0.0)


def test_killed_inside_a_round_and_after_the_private_part_was_saved(tmp_path: Path, arguments: Arguments) -> None:
    plain = tmp_path / "plain"
    well_ended(run_forked(arguments(plain, private=False)))
    expected = adapters(plain / "runs" / "tiny")
    folder = tmp_path / "split"
    argv = [*arguments(folder), "--checkpoint.every_steps", "1"]
    rounds = folder / "private" / "0" / "tiny" / "rounds"
    progress = rounds / "round_000002" / "progress" / "client_01"
    kill_when([*RUN, *argv], *(progress / f"{number:06d}" / "state.json" for number in (1, 2)))
    ended = well_ended(run_forked(argv))
    assert "continues after round 1 of 2" in ended.output
    assert_same_adapters(private_adapters(folder, 2), expected, tolerance=0.0)
    assert not list(rounds.glob("*/progress"))

    # Killed between the save and the rename: the private part is newer.
    common = folder / "runs" / "tiny" / "rounds"
    shutil.rmtree(common / "round_000002")
    ended = well_ended(run_forked(argv))
    assert "continues after round 1 of 2" in ended.output
    assert_same_adapters(private_adapters(folder, 2), expected, tolerance=0.0)

    # Lost: the private part is older, which only its owner can mend.
    shutil.rmtree(rounds / "round_000002" / "local" / "client_01")
    ended = run_forked(argv)
    assert ended.returncode == 4
    (line,) = ended.errors
    assert "the adapter of client 1 after round 2 is not at" in line
    assert f"delete {common / 'round_000002'} to continue from the round before" in line
    shutil.rmtree(common / "round_000002")
    well_ended(run_forked(argv))
    assert_same_adapters(private_adapters(folder, 2), expected, tolerance=0.0)


def test_clients_move_to_other_groups(tmp_path: Path, arguments: Arguments) -> None:
    """Two groups for a round, then one for a round, then two."""
    results = {}
    for private in (True, False):
        folder = tmp_path / str(private)
        argv = arguments(folder, private)
        two_groups([*argv, "--federation.num_rounds", "1"])
        well_ended(run_forked([*argv, "--federation.num_rounds", "2"]))
        two_groups([*argv, "--federation.num_rounds", "3"])
        results[private] = private_adapters(folder, 3) if private else adapters(folder / "runs" / "tiny", 3)
    assert_same_adapters(results[True], results[False], tolerance=0.0)


@contextmanager
def site(argv: list[str], group: int, meeting: str, root: Path) -> Iterator[Running]:
    """A group with a launcher of its own, whose private folder the other one cannot see."""
    own = ["--cluster.group", str(group), "--cluster.rendezvous", meeting]
    with Forked([*RUN, *argv, *own], DS_ACCELERATOR="cpu", SITE=str(root / f"site{group}")) as running:
        yield running


def last_saved(run_dir: Path, server_round: int) -> list[int]:
    meta = json.loads((run_dir / "rounds" / f"round_{server_round:06d}" / "meta.json").read_text())
    return list(meta["last_saved"])


def test_a_group_of_its_own_site_is_lost_and_comes_back(tmp_path: Path, arguments: Arguments) -> None:
    settings: dict[str, Any] = {"federation__num_rounds": 500, "train__max_steps": 60, "checkpoint__every_steps": 10}
    settings |= {"private_dir": "${SITE}/private", "federation__timeout_seconds": 15}
    settings |= {"cluster__heartbeat_timeout_seconds": 3}
    argv, run_dir = arguments(tmp_path, **settings), tmp_path / "runs" / "tiny"
    own = tmp_path / "site1" / "private" / "tiny" / "rounds"

    def is_absent(server_round: int) -> bool:
        return presence(run_dir).get(server_round) == [0]

    with rendezvous(argv) as (meeting, _), site(argv, 0, meeting, tmp_path) as survivor:
        with site(argv, 1, meeting, tmp_path) as lost:
            wait_for(own, "round_000003/progress/client_01/*", [survivor, lost], 150)
            lost.process.kill()
            wait_until(lambda: is_absent(last_round(run_dir)) and is_absent(last_round(run_dir) - 1), survivor)
        (saved, *_) = last_saved(run_dir, last_round(run_dir))[1:]
        kept = load_file(own / f"round_{saved:06d}" / "local" / "client_01" / "adapter_model.safetensors")
        assert saved < last_round(run_dir) - 1, "the rounds that named it first are deleted, and it is not"
        with site(argv, 1, meeting, tmp_path) as back:
            wait_until(lambda: last_saved(run_dir, last_round(run_dir))[1] > saved, survivor, back)
            for group in (survivor, back):
                group.process.terminate()
            assert [group.wait(150).returncode for group in (survivor, back)] == [75, 75]
    assert kept
    rounds = last_round(run_dir) + 1
    for number in range(2):
        found = {path.name for path in (tmp_path / f"site{number}").glob("private/tiny/rounds/*/*/client_*")}
        assert found == {f"client_0{number}"}, "a site has its own clients only"
    assert not list(run_dir.rglob("client_*"))

    with rendezvous(argv) as (meeting, _):
        again = arguments(tmp_path, **{**settings, "federation__num_rounds": rounds})
        with site(again, 0, meeting, tmp_path) as one, site(again, 1, meeting, tmp_path) as other:
            for group in (one, other):
                well_ended(group.wait(150))
    assert last_saved(run_dir, rounds) == [rounds, rounds]


# ---- evaluation -------------------------------------------------------------------------------------------------------


def summary_of(run_dir: Path, part: str) -> dict[str, Any]:
    (path,) = run_dir.glob(f"evaluations/*/{part}/summary.json")
    return dict(json.loads(path.read_text()))


def evaluate(run_dir: Path, *more: str) -> str:
    return well_ended(run_forked(["--run", str(run_dir), *EVALUATE, *more], program="launch/evaluate.py")).output


def test_each_group_evaluates_its_clients_and_the_report_is_joined(
    in_two_parts: tuple[Path, bytes], in_one_part: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(in_two_parts[0], tmp_path / "two", symlinks=True))
    run_dir, away = folder / "runs" / "tiny", tmp_path / "away"
    shutil.rmtree(run_dir / "evaluations")
    for group in "01":
        shutil.rmtree(folder / "private" / group / "tiny" / "evaluations")
    seen = ("--private_dir", str(folder / "private" / "{group}"))
    for group, part in (("1", "clients_0"), ("0", "all")):
        (folder / "private" / group).rename(away)
        evaluate(run_dir, *seen)
        assert summary_of(run_dir, part)["num_answers"] > 0
        away.rename(folder / "private" / group)
    evaluate(in_one_part)
    joined, plain = summary_of(run_dir, "all"), summary_of(in_one_part, "all")
    for key in ("clients", "P", "TTP", "tasks", "floors", "num_answers"):
        assert joined[key] == plain[key], key
    assert plain["examples"] == {"best": [], "worst": []}
    assert not list(run_dir.rglob("rank_*.jsonl"))


def test_texts_are_shown_where_they_are_asked_for(in_one_part: Path) -> None:
    evaluate(in_one_part, "--evaluation.examples", "true", "--evaluation.instances_per_task", "2")
    shown = summary_of(in_one_part, "first_2")["examples"]["worst"]
    assert shown[0]["instruction"]
    assert "constant_answer" in summary_of(in_one_part, "first_2")["tasks"][0]


def test_one_answers_as_a_client_that_can_be_seen(in_two_parts: tuple[Path, bytes]) -> None:
    folder, _ = in_two_parts
    argv = ["--run", str(folder / "runs" / "tiny"), "--client", "1", "--prompt", "which cat", "--max_new_tokens", "3"]
    assert "[alpha " in well_ended(run_forked(argv, program="launch/generate.py")).output
    ended = run_forked([*argv, "--private_dir", str(folder / "nowhere")], program="launch/generate.py")
    assert ended.returncode == 4
    assert "the adapter of client 1 after round 2 is not at" in ended.output


# ---- sums ---------------------------------------------------------------------------------------------------------------


def test_only_sums_are_shared(tmp_path: Path, arguments: Arguments, in_one_part: Path) -> None:
    argv = arguments(tmp_path, metrics__share="sums", tracking__tensorboard=True)
    outputs = two_groups(argv)
    run_dir = tmp_path / "runs" / "tiny"
    records = read_records(run_dir / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"round"}
    expected = [r for r in read_records(in_one_part / "metrics.jsonl") if r["kind"] == "round"]
    for record, other in zip(records, expected, strict=True):
        assert record["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-12)
        assert record["num_examples"] == 12
    assert [path.name for path in (run_dir / "tensorboard").iterdir()] == ["rounds"]
    for client in range(2):
        assert list((tmp_path / "private" / str(client) / "tiny" / "tensorboard").glob(f"client_0{client}/*"))
    assert "mean over clients" in outputs[0].output
    (course,) = json.loads((run_dir / "results.json").read_text())["clients"]
    assert course["label"] == "mean over clients"

    evaluate(run_dir)
    evaluate(in_one_part)
    means, plain = summary_of(run_dir, "all"), summary_of(in_one_part, "all")
    for measure in ("P", "TTP"):
        for metric, value in means[measure].items():
            assert value == pytest.approx(plain[measure][metric]["mean"])
    assert means["clients"] == [0, 1]
    common = everything_below(run_dir / "evaluations")
    assert b'"alpha"' not in common
    for client in range(2):
        assert summary_of(tmp_path / "private" / str(client) / "tiny", f"clients_{client}")["clients"]
