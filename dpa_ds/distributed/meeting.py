"""Where rank 0 tells the ranks beside it, on one host and under one launcher, which port it has found free.

An abstract Unix socket (Linux), whose name follows from the launcher's process. The kernel says whose process is at the
other end, so nobody else's is believed, and no file is left behind.
"""

import contextlib
import os
import socket
import struct
import threading
import time

import psutil

from dpa_ds.errors import ClusterError

POLL_SECONDS = 0.02
PORT_BYTES = 2


def announce_port(launcher: int, port: int) -> None:
    """Answer everybody of this user who asks, until this process ends. Rank 0 only.

    Args:
        launcher: process id of the launcher that all ranks of the job have above them.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_name(launcher))
    listener.listen(socket.SOMAXCONN)

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if _owner(connection) == os.getuid():
                    connection.sendall(port.to_bytes(PORT_BYTES, "little"))

    threading.Thread(target=answer, name="meeting", daemon=True).start()


def ask_port(launcher: int, timeout_seconds: float) -> int:
    """The port that rank 0 of the job under `launcher` announces.

    Raises:
        ClusterError: it does not, for so long.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(_name(launcher))
            said = connection.recv(PORT_BYTES)
            if len(said) == PORT_BYTES and _owner(connection) == os.getuid():
                return int.from_bytes(said, "little")
        time.sleep(POLL_SECONDS)
    raise ClusterError(
        f"rank 0 of this job has not come within {timeout_seconds:g} s (cluster.timeout_seconds): look at its output"
    )


def _name(launcher: int) -> str:
    # Process ids are used again: the time of the start tells them apart.
    return f"\0dpa_ds/{os.getuid()}/{launcher}/{psutil.Process(launcher).create_time():.2f}"


def _owner(connection: socket.socket) -> int:
    """User id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return int(user)
