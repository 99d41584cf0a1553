"""Connections to the rendezvous: from a leader's host, through a proof of the job's secret, to torchft's lighthouse.

torchft (0.2.0) asks nobody who he is: whoever reaches its lighthouse may join, or end a group. So it listens on its
host's loopback interface alone. A `Gate` listens in its place, and lets in who knows the secret; a `Tunnel` on each
leader's host proves it, and torchft connects to that.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from dpa_ds.distributed.secret import HungUp, Refused, prove_as_client, prove_as_server, receive_json, send_json

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
MOST_CONNECTIONS = 1024
"""At a time. A group has a few; more are somebody's mistake, or intent."""
CHUNK_BYTES = 1 << 16


Facts = Mapping[str, str]
"""What must be equal in all groups of a run: names and values, for messages."""


def listen_on_all_interfaces(port: int) -> socket.socket:
    """Of IPv4 and, where the host has it, IPv6. Port 0: any that is free. Raises OSError if it is not free."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)


class _Forwarder:
    """Listens, and connects each connection that comes in to another one.

    Args:
        open_other_end: given a connection, a context with the one that it is to be connected to.
    """

    def __init__(
        self, listener: socket.socket, open_other_end: Callable[[socket.socket], AbstractContextManager[socket.socket]]
    ) -> None:
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

    While some group is connected, others must have the same facts.

    Args:
        port: of all interfaces.
        report: called with one line that says who was refused.

    Raises:
        OSError: the port is not free.
    """

    def __init__(self, port: int, target_port: int, secret: bytes, report: Callable[[str], None]) -> None:
        self._target_port = target_port
        self._secret = secret
        self._report = report
        self._lock = threading.Lock()
        self._facts: Facts = {}
        """Of the groups that are connected."""
        self._num_connected = 0
        super().__init__(listen_on_all_interfaces(port), self._open_target)

    @contextlib.contextmanager
    def _open_target(self, connection: socket.socket) -> Iterator[socket.socket]:
        try:
            self._admit(connection)
        except HungUp:  # such as a look whether somebody answers here
            raise
        except (Refused, TimeoutError) as error:
            host, peer_port = connection.getpeername()[:2]
            reason = "it said nothing" if isinstance(error, TimeoutError) else str(error)
            self._report(f"refused a connection from {host} port {peer_port}: {reason}")
            raise
        try:
            with socket.create_connection((LOOPBACK, self._target_port), CONNECT_SECONDS) as target:
                yield target
        finally:
            with self._lock:
                self._num_connected -= 1

    def _admit(self, connection: socket.socket) -> None:
        """Count a connection that proves the secret, and has the facts of the others. It learns the reason if not."""
        prove_as_server(connection, self._secret)
        facts = receive_json(connection)
        if not isinstance(facts, dict):
            raise Refused("it says nothing of itself")
        with self._lock:
            if self._num_connected == 0:
                self._facts = facts
            reason = _difference(self._facts, facts)
            if not reason:
                self._num_connected += 1
        send_json(connection, reason)
        if reason:
            raise Refused(reason)


class Tunnel(_Forwarder):
    """A port of this host's loopback interface that leads through the gate at `host`:`port`.

    Args:
        facts: what must be equal in all groups that are connected there.
    """

    refusal = ""
    """Why the gate did not let this host in, the last time; empty where it did."""

    def __init__(self, host: str, port: int, secret: bytes, facts: Facts) -> None:
        self._gate = (host, port)
        self._secret = secret
        self._facts = facts
        super().__init__(socket.create_server((LOOPBACK, 0)), self._open_gate)

    @contextlib.contextmanager
    def _open_gate(self, _: socket.socket) -> Iterator[socket.socket]:
        with socket.create_connection(self._gate, CONNECT_SECONDS) as gate:
            try:
                prove_as_client(gate, self._secret)
            except Refused:
                self.refusal = "they do not have the same secret"
                raise
            send_json(gate, self._facts)
            self.refusal = str(receive_json(gate))
            if self.refusal:
                raise Refused(self.refusal)
            yield gate


def _difference(expected: Facts, found: Facts) -> str:
    """The first fact that differs, with both values; empty where none does."""
    for name in sorted({*expected, *found}):
        here, there = found.get(name, "nothing"), expected.get(name, "nothing")
        if here != there:
            return f"its {name} is {here!s:.200}, that of the groups that are there {there!s:.200}"
    return ""


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Until `source` ends; the other direction may continue."""
    with contextlib.suppress(OSError):
        while chunk := source.recv(CHUNK_BYTES):
            sink.sendall(chunk)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
