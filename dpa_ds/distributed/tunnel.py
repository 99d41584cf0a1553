"""Connections to the rendezvous: from a leader's host, through a proof of the job's secret, to torchft's lighthouse.

torchft (0.2.0) asks nobody who he is: whoever reaches its lighthouse may join, or end a group. So it listens on its
host's loopback interface alone. A `Gate` listens in its place, and lets in who knows the secret; a `Tunnel` on each
leader's host proves it, and torchft connects to that.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from dpa_ds.distributed.secret import Refused, prove_as_client, prove_as_server

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
MOST_CONNECTIONS = 1024
"""At a time. A group has a few; more are somebody's mistake, or intent."""
CHUNK_BYTES = 1 << 16


class _Forwarder:
    """Listens, and connects each connection that comes in to another one."""

    def __init__(self, listener: socket.socket, open_other_end: Callable[[socket.socket], socket.socket]) -> None:
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        self._open_other_end = open_other_end
        self._free = threading.Semaphore(MOST_CONNECTIONS)
        threading.Thread(target=self._accept, name="tunnel", daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, connection: socket.socket) -> None:
        try:
            with connection, self._open_other_end(connection) as other:
                for end in (connection, other):
                    end.settimeout(None)  # the proof had a bound; a connection that is open may be silent
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=_copy, args=(other, connection), daemon=True)
                back.start()
                _copy(connection, other)
                back.join()
        except (OSError, Refused) as error:
            logger.debug("a connection was not forwarded: %s", error)
        finally:
            self._free.release()


class Gate(_Forwarder):
    """Lets in who knows `secret`, to `target_port` of this host's loopback interface.

    Args:
        port: of all interfaces.
        report: called with one line that says who was refused.

    Raises:
        OSError: the port is not free.
    """

    def __init__(self, port: int, target_port: int, secret: bytes, report: Callable[[str], None]) -> None:
        def open_target(connection: socket.socket) -> socket.socket:
            try:
                prove_as_server(connection, secret)
            except (Refused, TimeoutError) as error:
                host, peer_port = connection.getpeername()[:2]
                reason = "it said nothing" if isinstance(error, TimeoutError) else str(error)
                report(f"refused a connection from {host} port {peer_port}: {reason}")
                raise
            return socket.create_connection((LOOPBACK, target_port), CONNECT_SECONDS)

        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
        super().__init__(listener, open_target)


class Tunnel(_Forwarder):
    """A port of this host's loopback interface that leads through the gate at `host`:`port`."""

    refusal = ""
    """Why the gate did not let this host in, the last time; empty where it did."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        def open_gate(_: socket.socket) -> socket.socket:
            gate = socket.create_connection((host, port), CONNECT_SECONDS)
            try:
                prove_as_client(gate, secret)
            except (OSError, Refused) as error:
                gate.close()
                if isinstance(error, Refused):
                    self.refusal = f"this group and {host}:{port} do not have the same secret"
                raise
            self.refusal = ""
            return gate

        super().__init__(socket.create_server((LOOPBACK, 0)), open_gate)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Until `source` ends; the other direction may continue."""
    with contextlib.suppress(OSError):
        while chunk := source.recv(CHUNK_BYTES):
            sink.sendall(chunk)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
