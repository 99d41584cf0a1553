"""The secret of a job whose groups have launchers of their own: who does not know it is not answered.

launch/rendezvous.py makes it, in a file beside the run's folder that its owner alone can read; the groups read it.
Where they share no folder, DPA_DS_SECRET holds the same text everywhere. It never travels: each side of a connection
proves to the other that it knows it.
"""

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from dpa_ds.errors import ClusterError, storage_errors

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
    """The job's secret; a new one where there is none yet. For launch/rendezvous.py.

    Raises:
        ClusterError, CheckpointError: it is too short, or cannot be written.
    """
    path = _path(run_dir)
    if VARIABLE not in os.environ and not path.exists():
        with storage_errors(path, f"make room, choose another output_dir, or set {VARIABLE}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Exclusive: of two that start at once, one makes it and the other reads it.
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return read_secret(run_dir)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(NONCE_BYTES))
    return read_secret(run_dir)


def read_secret(run_dir: Path, wait_seconds: float = 0.0) -> bytes:
    """The job's secret.

    Args:
        wait_seconds: bound on waiting for the file: launch/rendezvous.py may have been started a moment ago.

    Raises:
        ClusterError: there is none, or it is too short.
    """
    path = _path(run_dir)
    text = os.environ.get(VARIABLE)
    deadline = time.monotonic() + wait_seconds
    while text is None and not path.exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if text is None:
        try:
            text = path.read_text().strip()
        except OSError as error:
            raise ClusterError(
                f"no secret of this run at {path} ({error.strerror}): launch/rendezvous.py makes it, with the same "
                f"output_dir and name; where the groups share no folder, set {VARIABLE} to the same text for all"
            ) from error
    if len(text) < SHORTEST:
        raise ClusterError(
            f"the job's secret ({VARIABLE}, else {path}) has fewer than {SHORTEST} characters: set a longer one, or "
            "delete the file and start launch/rendezvous.py again"
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
    _check(receive_exactly(connection, DIGEST_BYTES), _digest(secret, b"client", nonces))
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
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            raise HungUp("it hung up")
        parts += part
    return bytes(parts)


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
