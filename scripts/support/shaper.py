"""The model of a network link, as an event loop that relays TCP connections to one target.

The model, per direction:

- One bottleneck of ``mbit`` megabits of payload per second, shared by all connections. Those that have something to
  send take turns, one quantum (half a millisecond of the link's time) each: a fair queue, so a small request on one
  connection does not wait behind a bulk transfer on another.
- What has left the bottleneck arrives ``rtt_ms / 2`` later, in order.
- A connection's queue before the bottleneck is bounded (20 ms of the link, at least 128 KiB), and so is what a
  receiver has not taken: beyond that its sender blocks, as with TCP's windows.
- The first bytes of a client leave one round trip after it connected, so that its first answer takes at least two,
  as with a real handshake.
- Segments are as large as on Ethernet.

What it does not model: loss, slow start, headers (a real 100 Mbit/s Ethernet carries 94 Mbit/s of payload), and a
``connect()`` that takes time: the kernel accepts at once, and a target that refuses shows as a reset connection.

Times are computed, not slept: a quantum begins when the one before it has ended, even if the loop woke up late.
"""

from __future__ import annotations

import math
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_QUANTUM_SECONDS = 0.0005
_QUEUE_SECONDS = 0.02
_MIN_QUANTUM = 1500
_MIN_QUEUE = 128 * 1024
_SLACK = 512 * 1024
"""Bytes that a receiver may leave untaken beyond what is on its way anyway."""
_UNLIMITED = 64 * 1024 * 1024
"""Bytes that bound what a rate of infinity would not."""
_INFINITE_RATE = 1e15
_SOCKET_BUFFER = 256 * 1024
_SEGMENT = 1448
"""Bytes of a TCP segment, as on Ethernet. With the 64 KiB of the loopback device an answer is one or two segments, and
the last of them may wait 40 ms for an acknowledgement that its receiver delays."""
_MAX_CONNECTIONS = 400
"""select() knows 1024 files; a connection has two."""


@dataclass(eq=False)
class _Half:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    not_before: float
    """When the first bytes of ``waiting`` could enter the bottleneck at the earliest."""
    waiting: deque[memoryview] = field(default_factory=deque)
    waiting_bytes: int = 0
    flight: deque[tuple[float, memoryview]] = field(default_factory=deque)
    """(when it arrives, bytes): past the bottleneck, not yet taken by the receiver."""
    flight_bytes: int = 0
    stalled: bool = False
    """The receiver has not taken what arrived, so its window is closed."""
    last_due: float = 0.0
    source_ended: bool = False
    end_sent: bool = False


@dataclass(eq=False)
class _Connection:
    up: _Half
    down: _Half
    connecting: bool
    refused_at: float | None = None


@dataclass(eq=False)
class _Direction:
    bytes: int = 0
    """Past the bottleneck, of all connections since the start."""
    free_at: float = 0.0
    turns: deque[_Half] = field(default_factory=deque)
    """Halves with something waiting, in the order in which they are served."""


class Shaper:
    """Relays what connects to ``listener`` to ``target``, as the module's text says."""

    def __init__(
        self, listener: socket.socket, target: tuple[str, int], mbit: float, rtt_ms: float, clock: Callable[[], float]
    ) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        self._target = target
        self._clock = clock
        self._connections: list[_Connection] = []
        self._up = _Direction()
        self._down = _Direction()
        self.accepted = 0
        self.cut: str | None = None
        """None, ``hang`` or ``reset``."""
        self.set(mbit, rtt_ms)

    def set(self, mbit: float, rtt_ms: float) -> None:
        """What is on its way already keeps its time."""
        if not mbit > 0 or not rtt_ms >= 0 or math.isinf(rtt_ms):
            raise ValueError(f"no link has {mbit} Mbit/s and {rtt_ms} ms")
        self._rate = min(mbit * 1e6 / 8, _INFINITE_RATE)
        self._delay = rtt_ms / 2000
        self._quantum = int(min(max(_MIN_QUANTUM, self._rate * _QUANTUM_SECONDS), _UNLIMITED))
        self._queue = int(min(max(_MIN_QUEUE, self._rate * _QUEUE_SECONDS), _UNLIMITED))
        self._window = int(min(_SLACK + self._rate * rtt_ms / 500, _UNLIMITED))

    @property
    def bytes_up(self) -> int:
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        return self._down.bytes

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def set_cut(self, mode: str | None) -> None:
        """``hang``: nothing moves until mended. ``reset``: connections are reset, new ones too. None: mended."""
        if mode not in (None, "hang", "reset"):
            raise ValueError(f"a link cannot be cut by {mode!r}")
        self.cut = mode
        if mode == "reset":
            for connection in list(self._connections):
                self._abort(connection)
        if mode is None:
            now = self._clock()
            for direction in (self._up, self._down):
                direction.free_at = max(direction.free_at, now)

    def step(self, also: list[int]) -> list[int]:
        """Wait for the next thing to happen, and do it. Returns those of the descriptors ``also`` that are readable."""
        if self.cut == "hang":
            readable, _, _ = select.select(also, [], [])
            return readable
        now = self._clock()
        reading: dict[int, tuple[_Connection, _Half]] = {}
        writing: list[int] = []
        wake = math.inf
        for connection in self._connections:
            if connection.connecting:
                writing.append(connection.up.sink.fileno())
            elif connection.refused_at is not None:
                wake = min(wake, connection.refused_at)
                continue
            for half in (connection.up, connection.down):
                if connection.connecting and half is connection.down:
                    continue
                if not half.source_ended and half.waiting_bytes < self._queue:
                    reading[half.source.fileno()] = (connection, half)
                if half.flight and half.stalled:
                    writing.append(half.sink.fileno())
                elif half.flight:
                    wake = min(wake, half.flight[0][0])
                elif half.source_ended and not half.waiting and not half.end_sent:
                    wake = min(wake, half.last_due)
        for direction in (self._up, self._down):
            for half in direction.turns:
                if half.flight_bytes < self._window:
                    wake = min(wake, max(direction.free_at, half.not_before))
        wait = None if math.isinf(wake) else max(0.0, wake - now)
        door = self._listener.fileno()
        accepting = [door] if len(self._connections) < _MAX_CONNECTIONS else []
        readable, _, _ = select.select([*also, *accepting, *reading], writing, [], wait)
        for fd in readable:
            if fd in reading:
                self._read(*reading[fd])
        self._serve(self._up)
        self._serve(self._down)
        self._deliver()
        if door in readable:
            self._accept()
        return [fd for fd in readable if fd in also]

    def close(self) -> None:
        for connection in list(self._connections):
            self._abort(connection)
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self.accepted += 1
        if self.cut == "reset":
            _reset(client)
            return
        server = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The kernel's own buffers are a queue that the model does not see: keep them small.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        now = self._clock()
        up = _Half(client, server, now + 2 * self._delay)
        down = _Half(server, client, now + self._delay)
        connection = _Connection(up, down, connecting=True)
        self._connections.append(connection)
        try:
            server.connect(self._target)
        except BlockingIOError:
            return
        except OSError:
            connection.refused_at = now + 2 * self._delay
        connection.connecting = False

    def _read(self, connection: _Connection, half: _Half) -> None:
        if connection not in self._connections:
            return
        try:
            data = half.source.recv(self._queue - half.waiting_bytes)
        except BlockingIOError:
            return
        except OSError:
            self._abort(connection)
            return
        now = self._clock()
        if not data:
            half.source_ended = True
            half.last_due = max(half.last_due, now + self._delay)
            return
        if not half.waiting:
            half.not_before = max(half.not_before, now)
            direction = self._up if half is connection.up else self._down
            direction.turns.append(half)
        half.waiting.append(memoryview(data))
        half.waiting_bytes += len(data)

    def _serve(self, direction: _Direction) -> None:
        """Let through what the bottleneck had time for until now."""
        now = self._clock()
        blocked = 0
        while direction.turns and blocked < len(direction.turns) and direction.free_at <= now:
            half = direction.turns[0]
            direction.turns.rotate(-1)
            if half.not_before > now or half.flight_bytes >= self._window:
                blocked += 1
                continue
            blocked = 0
            piece = half.waiting[0][: self._quantum]
            rest = half.waiting[0][self._quantum :]
            if rest:
                half.waiting[0] = rest
            else:
                half.waiting.popleft()
            if not half.waiting:
                direction.turns.pop()
            half.waiting_bytes -= len(piece)
            begin = max(direction.free_at, half.not_before)
            direction.free_at = begin + len(piece) / self._rate
            direction.bytes += len(piece)
            half.last_due = max(half.last_due, direction.free_at + self._delay)
            half.flight.append((half.last_due, piece))
            half.flight_bytes += len(piece)

    def _deliver(self) -> None:
        now = self._clock()
        for connection in list(self._connections):
            if connection.connecting and not self._finish_connecting(connection):
                continue
            if connection.refused_at is not None:
                if connection.refused_at <= now:
                    self._abort(connection)
                continue
            try:
                for half in (connection.up, connection.down):
                    self._deliver_half(half, now)
            except OSError:
                self._abort(connection)
                continue
            if connection.up.end_sent and connection.down.end_sent:
                self._connections.remove(connection)
                connection.up.source.close()
                connection.up.sink.close()

    def _deliver_half(self, half: _Half, now: float) -> None:
        """OSError if the receiver is gone."""
        closed_window = half.flight_bytes >= self._window
        half.stalled = False
        while half.flight and half.flight[0][0] <= now:
            due, data = half.flight[0]
            try:
                sent = half.sink.send(data)
            except BlockingIOError:
                half.stalled = True
                break
            half.flight_bytes -= sent
            if sent < len(data):
                half.flight[0] = (due, data[sent:])
            else:
                half.flight.popleft()
        if closed_window and half.flight_bytes < self._window:
            half.not_before = max(half.not_before, now)
        over = half.source_ended and not half.waiting and not half.flight
        if over and not half.end_sent and half.last_due <= now:
            half.sink.shutdown(socket.SHUT_WR)
            half.end_sent = True

    def _finish_connecting(self, connection: _Connection) -> bool:
        """Whether the target has answered, with yes or no."""
        server = connection.up.sink
        if not select.select([], [server], [], 0)[1]:
            return False
        connection.connecting = False
        if server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            connection.refused_at = max(self._clock(), connection.up.not_before)
        return True

    def _abort(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        for direction, half in ((self._up, connection.up), (self._down, connection.down)):
            if half in direction.turns:
                direction.turns.remove(half)
        _reset(connection.up.source)
        _reset(connection.up.sink)


def _reset(sock: socket.socket) -> None:
    """Close so that the other side sees a reset, not an end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
