"""Who does not know the job's secret is not answered, and what a leader hands over can run no code."""

import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dpa_ds.distributed import handover, secret, tunnel
from dpa_ds.distributed.elastic import split_address
from dpa_ds.distributed.handover import HandoverTransport, decode, encode
from dpa_ds.distributed.secret import Refused, make_secret, read_secret
from dpa_ds.distributed.tunnel import STORE, Gate, Tunnel, Visitor, listen
from dpa_ds.errors import ClusterError

SECRET = b"of the tests, long enough"
SECONDS = timedelta(seconds=10)
MOST_BYTES = 10_000
FACTS = {"train.learning_rate": "0.01", "base model": "abc"}


def state(**changes: Any) -> dict[str, Any]:
    user = {
        "completed_rounds": 3,
        "membership": "FORMED",
        "shared": torch.arange(5.0),
        "result": torch.arange(4, dtype=torch.int32),
    }
    return {"user": {"default": user | changes}, "torchft": {"step": 7, "batches_committed": 9}}


def transport(known: bytes = SECRET, most_bytes: int = MOST_BYTES) -> HandoverTransport:
    return HandoverTransport("127.0.0.1", known, lambda: most_bytes, timeout_seconds=0.5)


# ---- what is handed over ------------------------------------------------------------------------------------------


def test_a_leader_that_is_behind_receives_the_state() -> None:
    sender, receiver = transport(), transport()
    sender.send_checkpoint([1], 7, state(), SECONDS)
    received = receiver.recv_checkpoint(0, sender.metadata(), 7, SECONDS)
    assert received["torchft"] == {"step": 7, "batches_committed": 9}
    expected = state()["user"]["default"]
    found = received["user"]["default"]
    assert found.keys() == expected.keys()
    for name in ("shared", "result"):
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
    assert (found["completed_rounds"], found["membership"]) == (3, "FORMED")


def test_it_waits_for_a_sender_that_is_not_ready_yet() -> None:
    sender, receiver = transport(), transport()
    threading.Timer(0.1, sender.send_checkpoint, ([1], 7, state(), SECONDS)).start()
    assert receiver.recv_checkpoint(0, sender.metadata(), 7, SECONDS)["torchft"]["step"] == 7


@pytest.mark.parametrize("step", [6, 8])
def test_another_step_is_not_handed_over(step: int) -> None:
    sender, receiver = transport(), transport()
    sender.send_checkpoint([1], 7, state(), SECONDS)
    with pytest.raises(Refused, match="it has 0 bytes"):
        receiver.recv_checkpoint(0, sender.metadata(), step, SECONDS)


def test_a_state_that_may_change_is_not_handed_over() -> None:
    sender, receiver = transport(), transport()
    sender.send_checkpoint([1], 7, state(), SECONDS)
    sender.disallow_checkpoint()
    with pytest.raises(Refused):
        receiver.recv_checkpoint(0, sender.metadata(), 7, SECONDS)


def test_neither_side_answers_without_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    sender, stranger = transport(), transport(known=b"another secret, as long")
    for one, other in ((sender, stranger), (stranger, sender)):
        one.send_checkpoint([1], 7, state(), SECONDS)
        with pytest.raises(Refused):
            other.recv_checkpoint(0, one.metadata(), 7, SECONDS)
    deadline = time.monotonic() + SECONDS.total_seconds()
    while "refused 127.0.0.1" not in caplog.text.replace("::ffff:", ""):  # by the sender's thread, a moment later
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)
    assert "does not know the job's secret" in caplog.text


def test_a_size_is_checked_before_memory_is_taken() -> None:
    sender, receiver = transport(), transport(most_bytes=100)
    sender.send_checkpoint([1], 7, state(), SECONDS)
    with pytest.raises(Refused, match="expected 1 to 100"):
        receiver.recv_checkpoint(0, sender.metadata(), 7, SECONDS)


@pytest.mark.parametrize("address", ["", "nothing", "127.0.0.1:", "host:99999", "file:///etc/passwd", "http://a/b:x"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(Refused, match=r"no host:port"):
        transport().recv_checkpoint(0, address, 7, SECONDS)


def saved(header: str, **tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save(tensors, metadata={handover.HEADER_KEY: header})


VECTOR, OTHER = torch.zeros(2), torch.ones(2)
HEADER = '{"step": 1, "batches_committed": 1, "completed_rounds": 1, "membership": "FORMED"}'


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (pickle.dumps({"user": 1}), "no handover"),
        (b"", "no handover"),
        (encode(state())[:-1], "no handover"),
        (safetensors.torch.save({"shared": VECTOR, "result": OTHER}), "no handover"),
        (saved("[", shared=VECTOR, result=OTHER), "no handover"),
        (saved("[]", shared=VECTOR, result=OTHER), "other fields"),
        (saved(HEADER.replace('"step": 1', '"step": -1'), shared=VECTOR, result=OTHER), "its step is '-1'"),
        (saved(HEADER.replace('"step": 1', '"step": true'), shared=VECTOR, result=OTHER), "its step is 'True'"),
        (saved(HEADER.replace('"step": 1', '"step": 1e300'), shared=VECTOR, result=OTHER), "its step"),
        (saved(HEADER.replace('"FORMED"', "[]"), shared=VECTOR, result=OTHER), "its membership"),
        (saved(HEADER, shared=VECTOR), r"the tensors \['shared'\]"),
        (saved(HEADER, shared=VECTOR, result=torch.zeros(2, 2)), "result is no vector"),
        (saved(HEADER, shared=VECTOR.bool(), result=OTHER), "shared is no vector"),
    ],
)
def test_a_file_of_another_schema_is_refused(file: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        decode(file)


# ---- who may connect ----------------------------------------------------------------------------------------------


def echo(connection: socket.socket) -> None:
    with connection, suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            connection.sendall(part)


@pytest.fixture
def echo_port() -> Any:
    """A server in place of the lighthouse, which sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def gate_to(port: int, refusals: list[str]) -> Gate:
    """A gate of this host before the service at `port`."""
    return Gate(listen("127.0.0.1", 0), {STORE: port}, SECRET, refusals.append)


def said(port: int, text: bytes) -> bytes:
    """What comes back through a port of this host, until it is closed."""
    found = bytearray()
    # OSError: a gate that has closed the connection already leaves nothing to shut down.
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.settimeout(10)
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            found += part
    return bytes(found)


def test_a_tunnel_leads_through_the_gate(echo_port: int) -> None:
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    through = Tunnel("127.0.0.1", gate.port, SECRET, Visitor(STORE, FACTS))
    text = bytes(range(256)) * 4000
    for _ in range(3):
        assert said(through.port, text) == text
    assert (refusals, through.refusal) == ([], "")


def test_the_gate_lets_nobody_else_in(echo_port: int) -> None:
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    stranger = Tunnel("127.0.0.1", gate.port, b"another secret, as long", Visitor(STORE, FACTS))
    assert said(stranger.port, b"hello") == b""
    assert stranger.refusal == "they do not have the same secret"
    assert b"hello" not in said(gate.port, b"GET /status HTTP/1.1\r\n\r\n" + b"hello" * 100)
    wait_for(lambda: len(refusals) == 2)
    assert all("does not know the job's secret" in line for line in refusals)


def test_groups_that_are_there_together_have_equal_facts(echo_port: int) -> None:
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    first = Tunnel("127.0.0.1", gate.port, SECRET, Visitor(STORE, FACTS))
    other = Tunnel("127.0.0.1", gate.port, SECRET, Visitor(STORE, FACTS | {"train.learning_rate": "0.02"}))
    with socket.create_connection(("127.0.0.1", first.port)) as connected:
        connected.sendall(b"a")
        assert secret.receive_exactly(connected, 1) == b"a"
        assert said(other.port, b"hello") == b""
        reason = "its train.learning_rate is 0.02, that of the groups that are there 0.01"
        assert other.refusal == reason
        wait_for(lambda: len(refusals) == 1)
        assert refusals[0].endswith(reason)
    wait_for(lambda: not gate._present)
    # All of the other run have left: this one may begin.
    assert said(other.port, b"hello") == b"hello"
    assert other.refusal == ""


@pytest.mark.parametrize("facts", [b"[]", b"{", b"null"])
def test_who_says_nothing_of_itself_is_refused(echo_port: int, facts: bytes) -> None:
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    with socket.create_connection(("127.0.0.1", gate.port)) as connection:
        secret.prove_as_client(connection, SECRET)
        connection.sendall(len(facts).to_bytes(secret.LENGTH_BYTES, "little") + facts)
        wait_for(lambda: len(refusals) == 1)
    with socket.create_connection(("127.0.0.1", gate.port)) as connection:
        secret.prove_as_client(connection, SECRET)
        connection.sendall(b"\xff" * secret.LENGTH_BYTES)
        wait_for(lambda: len(refusals) == 2)


def test_a_silent_connection_ends(echo_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "HANDSHAKE_SECONDS", 0.1)
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    with socket.create_connection(("127.0.0.1", gate.port)):
        wait_for(lambda: bool(refusals))
    assert "it said nothing" in refusals[0]


def test_a_proof_cannot_be_used_again(echo_port: int) -> None:
    """A stranger in between sends what a leader has sent once more, to another connection of the gate."""
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    with socket.create_connection(("127.0.0.1", gate.port)) as recorded:
        server_nonce = secret.receive_exactly(recorded, 32)
        client_nonce = bytes(32)
        proof = secret._digest(SECRET, b"client", client_nonce + server_nonce)
        recorded.sendall(client_nonce + proof)
        assert len(secret.receive_exactly(recorded, 32)) == 32, "it is a good one"
    with socket.create_connection(("127.0.0.1", gate.port)) as replayed:
        replayed.settimeout(10)
        secret.receive_exactly(replayed, 32)
        replayed.sendall(client_nonce + proof)
        assert secret.receive_exactly(replayed, 32) == bytes(32), "which is no proof"
        assert replayed.recv(1) == b""
    wait_for(lambda: bool(refusals))


def test_the_secret_is_made_once_and_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secret.VARIABLE, raising=False)
    run_dir = tmp_path / "runs" / "demo"
    with pytest.raises(ClusterError, match=r"launch/rendezvous\.py makes it"):
        read_secret(run_dir)
    made = make_secret(run_dir)
    assert made == make_secret(run_dir) == read_secret(run_dir)
    assert len(made) == 64
    assert stat.S_IMODE((tmp_path / "runs" / "demo.secret").stat().st_mode) == 0o600
    assert not run_dir.exists(), "it appears with its recipe"
    monkeypatch.setenv(secret.VARIABLE, "a text of the users")
    assert read_secret(run_dir) == b"a text of the users"
    monkeypatch.setenv(secret.VARIABLE, "short")
    with pytest.raises(ClusterError, match="fewer than 16 characters"):
        read_secret(run_dir)


@pytest.mark.parametrize(("address", "expected"), [("a:1", ("a", 1)), ("[::1]:29600", ("::1", 29600))])
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_secret_of_a_user_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secret.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as ranks:
        found = set(ranks.map(lambda _: secret.user_secret(), range(8)))
    assert len(found) == 1
    files = list((tmp_path / ".config" / "dpa_ds").iterdir())
    assert [file.name for file in files] == ["secret"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
    files[0].unlink()
    (tmp_path / ".config" / "dpa_ds").rmdir()
    (tmp_path / ".config" / "dpa_ds").touch()
    with pytest.raises(ClusterError, match="set DPA_DS_SECRET to the same text on all hosts"):
        secret.user_secret()


def test_a_group_is_let_in_once(echo_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless nothing is heard of the first any more."""
    refusals: list[str] = []
    gate = gate_to(echo_port, refusals)
    first, second, third = (
        Tunnel("127.0.0.1", gate.port, SECRET, Visitor(STORE, group=f"group {g}")) for g in (1, 1, 2)
    )
    with socket.create_connection(("127.0.0.1", first.port)) as connected:
        connected.sendall(b"a")
        assert secret.receive_exactly(connected, 1) == b"a"
        assert said(first.port, b"once more") == b"once more", "a process may have many connections"
        assert said(second.port, b"hello") == b""
        assert second.refusal.startswith("group 1 is there already")
        assert said(third.port, b"hello") == b"hello"
        monkeypatch.setattr(tunnel, "PRESENT_SECONDS", 0.0)
        assert said(second.port, b"hello") == b"hello"


def test_a_gate_that_ends_is_no_refusal(echo_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ending:
        leader = Tunnel("127.0.0.1", ending.getsockname()[1], SECRET, Visitor(STORE))
        threading.Thread(target=lambda: ending.accept()[0].close(), daemon=True).start()
        with pytest.raises((secret.HungUp, OSError)):
            leader.try_gate()
    assert leader.refusal == ""


def test_a_peer_that_reads_slowly_gets_everything(echo_port: int) -> None:
    """64 MB, more than the buffers of all sockets on the way, of a client that first sends all and then reads."""
    gate = gate_to(echo_port, [])
    leader = Tunnel("127.0.0.1", gate.port, SECRET, Visitor(STORE))
    text = bytes(range(256)) * (1 << 18)
    with socket.create_connection(("127.0.0.1", leader.port), 10) as connection:
        sender = threading.Thread(target=connection.sendall, args=(text,), daemon=True)
        sender.start()
        sender.join(0.3)
        assert sender.is_alive(), "it waits for this side to read"
        assert secret.receive_exactly(connection, len(text)) == text
