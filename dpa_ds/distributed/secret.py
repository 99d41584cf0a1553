"""Secrets: who does not know that of a job, or that of a run, is not answered.

There are two, each in a file that its owner alone can read. That of a run is for groups with launchers of their own:
launch/rendezvous.py makes it beside the run's folder, and the groups read it. That of a user is for the ranks of one
job on several hosts: whichever of them is first makes it in the user's home. Where no folder is shared, DPA_DS_SECRET
holds the same text everywhere, in place of both. It never travels: each side of a connection proves to the other that
it knows it.
"""

import hashlib
import hmac
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dpa_ds.errors import CheckpointError, ClusterError, storage_errors

VARIABLE = "DPA_DS_SECRET"
"""Environment variable that holds the secret in place of the file."""
SHORTEST = 16
"""Characters of a secret that a user chooses."""
HANDSHAKE_SECONDS = 10.0
"""Bound on the proof of one connection."""
POLL_SECONDS = 0.2
NONCE_BYTES = 32
LENGTH_BYTES = 4
MOST_JSON_BYTES = 1 << 20
DIGEST_BYTES = 32


class Refused(Exception):
    """The other side of a connection does not know the job's secret."""


class HungUp(Refused):
    """The other side ended the connection before it had said what was expected."""


def make_secret(run_dir: Path) -> bytes:
    """The run's secret; a new one where there is none yet. For launch/rendezvous.py.

    Raises:
        ClusterError, CheckpointError: it is too short, or cannot be written.
    """
    path = _path(run_dir)
    if VARIABLE not in os.environ:
        _make_file(path, f"make room, choose another output_dir, or set {VARIABLE}")
    return read_secret(run_dir)


def read_secret(run_dir: Path, wait_seconds: float = 0.0) -> bytes:
    """The run's secret.

    Args:
        wait_seconds: bound on waiting for the file: launch/rendezvous.py may have been started a moment ago.

    Raises:
        ClusterError: there is none, or it is too short.
    """
    path = _path(run_dir)
    deadline = time.monotonic() + wait_seconds
    while VARIABLE not in os.environ and not path.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return _read(
        path,
        f"launch/rendezvous.py makes it, with the same output_dir and name; where the groups share no folder, set "
        f"{VARIABLE} to the same text for all",
    )


def user_secret() -> bytes:
    """The user's secret, by which the ranks of a job on several hosts know each other; made where there is none yet.

    Raises:
        ClusterError: it is too short, or there is no home folder that can be written.
    """
    remedy = f"set {VARIABLE} to the same text on all hosts of the job"
    if VARIABLE in os.environ:
        return _read(Path(), remedy)
    try:
        # Not XDG_CONFIG_HOME: where ssh starts a rank, variables are not those of rank 0.
        path = Path.home() / ".config" / "dpa_ds" / "secret"
        _make_file(path, remedy)
    except (RuntimeError, CheckpointError) as error:
        raise ClusterError(f"no place for the secret of a job on several hosts ({error}): {remedy}") from error
    return _read(path, remedy)


def _make_file(path: Path, remedy: str) -> None:
    """Unless it is there. Whole from the beginning: others read it in the same moment."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{threading.get_native_id()}.tmp")
    with storage_errors(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(NONCE_BYTES))
        try:
            os.link(draft, path)
        except FileExistsError:  # of two that start at once, one makes it and the other reads it
            pass
        except OSError:  # a file system without hard links
            os.replace(draft, path)
        draft.unlink(missing_ok=True)


def _read(path: Path, remedy: str) -> bytes:
    """From the environment, else from `path`."""
    text = os.environ.get(VARIABLE)
    if text is None:
        try:
            text = path.read_text().strip()
        except OSError as error:
            raise ClusterError(f"no secret at {path} ({error.strerror}): {remedy}") from error
    if len(text) < SHORTEST:
        raise ClusterError(
            f"the secret ({VARIABLE}, else {path}) has fewer than {SHORTEST} characters: set a longer one, or delete "
            "the file, and start again"
        )
    return text.encode()


def prove_as_client(connection: socket.socket, secret: bytes) -> None:
    """Prove to whoever listens that this side knows the secret, and have it prove the same.

    Raises:
        Refused, OSError: it does not, or the connection broke.
    """
    nonces = _exchange_nonces(connection, first=True)
    connection.sendall(_digest(secret, b"client", nonces))
    _check(receive_exactly(connection, DIGEST_BYTES), _digest(secret, b"server", nonces))


def prove_as_server(connection: socket.socket, secret: bytes) -> None:
    """Likewise for the side that listens. It answers only after the other side's proof.

    Raises:
        Refused, OSError: as `prove_as_client`.
    """
    nonces = _exchange_nonces(connection, first=False)
    try:
        _check(receive_exactly(connection, DIGEST_BYTES), _digest(secret, b"client", nonces))
    except HungUp:
        raise
    except Refused:
        connection.sendall(bytes(DIGEST_BYTES))  # no proof: the other side learns that this is not a broken connection
        raise
    connection.sendall(_digest(secret, b"server", nonces))


def send_json(connection: socket.socket, value: Any) -> None:
    """After the proof: a value of a few kB."""
    text = json.dumps(value).encode()
    connection.sendall(len(text).to_bytes(LENGTH_BYTES, "little") + text)


def receive_json(connection: socket.socket) -> Any:
    """Inverse of `send_json`. Raises Refused for what is larger than any value of ours, or no JSON."""
    num_bytes = int.from_bytes(receive_exactly(connection, LENGTH_BYTES), "little")
    if num_bytes > MOST_JSON_BYTES:
        raise Refused(f"it sends {num_bytes} bytes where {MOST_JSON_BYTES} are the most")
    try:
        return json.loads(receive_exactly(connection, num_bytes))
    except (ValueError, RecursionError) as error:
        raise Refused("it sends what is no JSON") from error


def receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """The next `num_bytes` bytes. Raises HungUp if the connection ends before."""
    received = bytearray(num_bytes)
    rest = memoryview(received)
    while rest:
        num_received = connection.recv_into(rest)
        if not num_received:
            raise HungUp("it hung up")
        rest = rest[num_received:]
    return bytes(received)


def _exchange_nonces(connection: socket.socket, first: bool) -> bytes:
    """The client's nonce, then the server's. Both decide on the digests, so that none can be used a second time."""
    mine = secrets.token_bytes(NONCE_BYTES)
    connection.settimeout(HANDSHAKE_SECONDS)
    connection.sendall(mine)
    theirs = receive_exactly(connection, NONCE_BYTES)
    return mine + theirs if first else theirs + mine


def _digest(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    # The role is in it, so that a side cannot be sent its own proof.
    return hmac.new(secret, role + nonces, hashlib.sha256).digest()


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise Refused("it does not know the job's secret")


def _path(run_dir: Path) -> Path:
    # Beside the folder and not in it: the folder appears with the run's recipe.
    return run_dir.with_name(f"{run_dir.name}.secret")
