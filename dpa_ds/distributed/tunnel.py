"""Connections that begin with a proof of the secret, for services that ask nobody who he is.

torch's TCPStore and torchft's lighthouse (0.2.0) answer whoever reaches them. So they listen on their host's loopback
interface alone. A `Gate` listens in their place, and lets in who knows the secret; a `Tunnel` on each host that is to
reach them proves it, and the library's client connects to that:

    client -> tunnel (loopback) -> network, after a proof -> gate -> service (loopback)
"""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dpa_ds.distributed.launchers import LOOPBACK
from dpa_ds.distributed.pump import Pump
from dpa_ds.distributed.secret import HungUp, Refused, prove_as_client, prove_as_server, receive_json, send_json

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
STORE = "store"
"""Service behind a gate: the key-value store of a job, or of the leaders of groups with launchers of their own."""
LIGHTHOUSE = "lighthouse"
"""Service behind a gate: torchft's list of the groups that are present."""
MOST_PROOFS = 256
"""At a time; further connections wait for their turn."""
BACKLOG = 4096
PRESENT_SECONDS = 10.0
"""A group of which nothing was heard for so long may be replaced. torchft's heartbeats come ten times a second."""


Facts = Mapping[str, str]
"""What must be equal in all groups of a run: names and values, for messages."""


@dataclass(frozen=True)
class Visitor:
    """What a process says of itself, once for each of its connections."""

    target: str
    """Name of the service that it comes for."""
    facts: Facts = field(default_factory=dict)
    """Equal for all that are connected at a time."""
    group: str = ""
    """Which group it is: of those that name one, there is one process for each."""
    process: str = field(default_factory=lambda: secrets.token_hex(8))


def listen(host: str, port: int) -> socket.socket:
    """At the address of `host`; empty: on all interfaces, of IPv4 and, where the host has it, IPv6.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the port is not free, or the address is not of this host.
    """
    if host:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=BACKLOG, dualstack_ipv6=family == socket.AF_INET6)


class _Forwarder:
    """Listens, and joins each connection that comes in with another one, which `_join` opens."""

    def __init__(self, listener: socket.socket) -> None:
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        self._pump = Pump()
        self._free = threading.Semaphore(MOST_PROOFS)
        threading.Thread(target=self._accept, name="tunnel", daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, connection: socket.socket) -> None:
        try:
            self._join(connection)
        except (OSError, Refused) as error:
            connection.close()
            logger.debug("a connection was not forwarded: %s", error)
        finally:
            self._free.release()

    def _join(self, connection: socket.socket) -> None:
        """Open the other connection, and give both to the pump. Raises OSError, Refused."""
        raise NotImplementedError


@dataclass
class _Presence:
    """Of one process, over all of its connections."""

    visitor: Visitor
    """As it came first."""
    num_connections: int = 0
    heard_at: float = field(default_factory=time.monotonic)

    def hear(self) -> None:
        self.heard_at = time.monotonic()


class Gate(_Forwarder):
    """Lets in who knows `secret`, to a service on this host's loopback interface.

    While some visitor is connected, others must have the same facts, and another group.

    Args:
        listener: where it is reached from outside.
        targets: port of each service, by the name that visitors ask for.
        report: called with one line that says who was refused.
    """

    def __init__(
        self, listener: socket.socket, targets: Mapping[str, int], secret: bytes, report: Callable[[str], None]
    ) -> None:
        self._targets = targets
        self._secret = secret
        self._report = report
        self._lock = threading.Lock()
        self._present: dict[str, _Presence] = {}
        """By process."""
        super().__init__(listener)

    def _join(self, connection: socket.socket) -> None:
        try:
            presence, port = self._admit(connection)
        except HungUp:  # such as a look whether somebody answers here
            raise
        except (Refused, TimeoutError) as error:
            reason = "it said nothing" if isinstance(error, TimeoutError) else str(error)
            self._report(f"refused a connection from {_peer(connection)}: {reason}")
            raise
        try:
            target = socket.create_connection((LOOPBACK, port), CONNECT_SECONDS)
            self._pump.add(connection, target, presence.hear, on_end=lambda: self._leave(presence))
        except OSError:
            self._leave(presence)
            raise

    def _admit(self, connection: socket.socket) -> tuple[_Presence, int]:
        """The presence of whoever proves the secret and may come in, and the port it comes for; else it learns why."""
        prove_as_server(connection, self._secret)
        visitor = _visitor(receive_json(connection))
        with self._lock:
            reason = self._reason_against(visitor)
            presence = self._present.get(visitor.process, _Presence(visitor))
            if not reason:
                presence.num_connections += 1
                self._present[visitor.process] = presence
        if reason:
            send_json(connection, reason)
            raise Refused(reason)
        try:
            send_json(connection, reason)
        except OSError:
            self._leave(presence)
            raise
        return presence, self._targets[visitor.target]

    def _reason_against(self, visitor: Visitor) -> str:
        if visitor.target not in self._targets:
            return f"it asks for {visitor.target[:40]!r}, which is not here"
        for other in self._present.values():
            if reason := _difference(other.visitor.facts, visitor.facts):
                return reason
            is_other = visitor.group and visitor.group == other.visitor.group
            is_other = is_other and visitor.process != other.visitor.process
            if is_other and time.monotonic() < other.heard_at + PRESENT_SECONDS:
                return f"{visitor.group} is there already: give each group a number of its own, or end the other"
        return ""

    def _leave(self, presence: _Presence) -> None:
        with self._lock:
            presence.num_connections -= 1
            if presence.num_connections == 0:
                self._present.pop(presence.visitor.process, None)


class Tunnel(_Forwarder):
    """A port of this host's loopback interface that leads through the gate at `host`:`port`."""

    refusal = ""
    """Why the gate did not let this host in, the last time; empty where it did."""

    def __init__(self, host: str, port: int, secret: bytes, visitor: Visitor) -> None:
        self._gate = (host, port)
        self._secret = secret
        self._visitor = visitor
        super().__init__(listen(LOOPBACK, 0))

    def try_gate(self) -> None:
        """Go through the gate once, and come back.

        Raises:
            Refused, OSError: it does not let this process in, or does not answer.
        """
        self._open_gate().close()

    def _join(self, connection: socket.socket) -> None:
        self._pump.add(connection, self._open_gate())

    def _open_gate(self) -> socket.socket:
        gate = socket.create_connection(self._gate, CONNECT_SECONDS)
        try:
            self._pass(gate)
        except (OSError, Refused):
            gate.close()
            raise
        return gate

    def _pass(self, gate: socket.socket) -> None:
        try:
            prove_as_client(gate, self._secret)
        except HungUp:  # it ended meanwhile
            raise
        except Refused:
            self.refusal = "they do not have the same secret"
            raise
        send_json(gate, asdict(self._visitor))
        self.refusal = str(receive_json(gate))
        if self.refusal:
            raise Refused(self.refusal)


def _peer(connection: socket.socket) -> str:
    host, port = connection.getpeername()[:2]
    return f"{host} port {port}"


def _visitor(said: Any) -> Visitor:
    try:
        visitor = Visitor(**said)
    except TypeError as error:
        raise Refused("it says nothing of itself") from error
    texts = (visitor.target, visitor.group, visitor.process)
    if not all(isinstance(text, str) for text in texts) or not isinstance(visitor.facts, dict):
        raise Refused("what it says of itself is malformed")
    return visitor


def _difference(expected: Facts, found: Facts) -> str:
    """The first fact that differs, with both values; empty where none does."""
    for name in sorted({*expected, *found}):
        here, there = found.get(name, "nothing"), expected.get(name, "nothing")
        if here != there:
            return f"its {name} is {here!s:.200}, that of the groups that are there {there!s:.200}"
    return ""
