"""One thread that carries bytes between pairs of connections, however many: rank 0 of a large job has thousands."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

CHUNK_BYTES = 1 << 16


def _nothing() -> None:
    pass


@dataclass
class _Direction:
    """What is read from one connection of a pair and written to the other."""

    source: socket.socket
    sink: socket.socket
    heard: Callable[[], None]
    """Called when `source` has sent something."""
    waiting: bytes = b""
    """Read, and not yet written. Nothing more is read meanwhile."""
    source_ended: bool = False
    is_over: bool = False
    """All is written, and the other side knows that nothing more comes."""

    def move(self) -> None:
        """Read if nothing waits, and write what can be written at once. Raises OSError if a connection broke."""
        if not self.waiting and not self.source_ended:
            with contextlib.suppress(BlockingIOError):
                self.waiting = self.source.recv(CHUNK_BYTES)
                self.source_ended = not self.waiting
                self.heard()
        if self.waiting:
            with contextlib.suppress(BlockingIOError):
                self.waiting = self.waiting[self.sink.send(self.waiting) :]
        if self.source_ended and not self.waiting and not self.is_over:
            self.sink.shutdown(socket.SHUT_WR)
            self.is_over = True


class _Pair:
    """Two connections. One may end while the other still sends."""

    def __init__(
        self, first: socket.socket, second: socket.socket, heard: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        self.ends = (first, second)
        self.on_end = on_end
        self.directions = (_Direction(first, second, heard), _Direction(second, first, _nothing))

    def move(self) -> bool:
        """Move what can be moved; False once the pair is over."""
        try:
            for direction in self.directions:
                direction.move()
        except OSError:
            return False
        return not all(direction.is_over for direction in self.directions)

    def events_of(self, end: socket.socket) -> int:
        """What to wait for at one end."""
        events = 0
        for direction in self.directions:
            if end is direction.source and not direction.waiting and not direction.source_ended:
                events |= selectors.EVENT_READ
            if end is direction.sink and direction.waiting:
                events |= selectors.EVENT_WRITE
        return events


class Pump:
    """Carries bytes both ways between the connections of each pair that it is given, until both have ended."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._new: list[_Pair] = []
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="pump", daemon=True).start()

    def add(
        self,
        first: socket.socket,
        second: socket.socket,
        heard: Callable[[], None] = _nothing,
        on_end: Callable[[], None] = _nothing,
    ) -> None:
        """Join two connections, which are the pump's from now on. It closes both.

        Args:
            heard: called, in the pump's thread, when something has come from `first`.
            on_end: called, in the pump's thread, when both are closed.
        """
        for end in (first, second):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        with self._lock:
            self._new.append(_Pair(first, second, heard, on_end))
        self._wake.send(b"+")

    def _run(self) -> None:
        while True:
            ready = {key.data for key, _ in self._selector.select()}
            if None in ready:
                ready.remove(None)
                self._admit_new()
            for pair in ready:
                self._serve(pair)

    def _admit_new(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(CHUNK_BYTES)
        with self._lock:
            new, self._new = self._new, []
        for pair in new:
            self._serve(pair)  # a proof may have left bytes behind it

    def _serve(self, pair: _Pair) -> None:
        is_open = pair.move()
        for end in pair.ends:
            self._wait_for(end, pair.events_of(end) if is_open else 0, pair)
            if not is_open:
                end.close()
        if not is_open:
            pair.on_end()

    def _wait_for(self, end: socket.socket, events: int, pair: _Pair) -> None:
        known = self._selector.get_map().get(end)
        if known is None and events:
            self._selector.register(end, events, pair)
        elif known is not None and not events:
            self._selector.unregister(end)
        elif known is not None and known.events != events:
            self._selector.modify(end, events, pair)
