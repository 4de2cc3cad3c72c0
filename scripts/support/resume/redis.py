"""A data set that can be checked record by record, and a client for it: plain sockets, Redis' protocol (RESP 2)."""

from __future__ import annotations

import base64
import hashlib
import random
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

RECORD = 1000
"""Bytes of a value."""
RETRY_SECONDS = 0.9
_PIPELINE = 200
"""Requests under way while the data set is loaded."""
_TOKEN = RECORD // 2
_WORDS = (
    *("active", "address", "agent", "amount", "basket", "browser", "city", "closed", "country", "currency", "customer"),
    *("delivery", "device", "discount", "email", "expires", "invoice", "language", "locale", "member", "name", "open"),
    *("order", "payment", "pending", "phone", "price", "product", "quantity", "region", "session", "status", "street"),
)


class WrongAnswerError(Exception):
    """Redis said something else than what is right; names the key."""


@dataclass(frozen=True)
class DataSet:
    """``count`` sessions of a web shop: half of a value is a token, random and in base64, the other half words."""

    count: int
    seed: int = 1

    @property
    def size(self) -> int:
        """Bytes of all values."""
        return self.count * RECORD

    def key(self, number: int) -> bytes:
        return b"session:%08d" % number

    def value(self, number: int) -> bytes:
        """RECORD bytes, a function of the seed and the number alone."""
        drawn = hashlib.shake_128(b"%d:%d" % (self.seed, number)).digest(_TOKEN * 3 // 4 + 64)
        token = base64.b64encode(drawn[64:]).decode()
        words = " ".join([_WORDS[byte & 31] for byte in drawn[:64]])
        return f'{{"id":{number},"token":"{token}","note":"{words}"'.ljust(RECORD - 1)[: RECORD - 1].encode() + b"}"

    def draw(self, count: int, seed: str) -> list[int]:
        """``count`` random numbers of records."""
        return random.Random(seed).choices(range(self.count), k=count)


class Client:
    """One connection. Methods raise OSError (TimeoutError among them), and WrongAnswerError."""

    def __init__(self, port: int, timeout: float) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def get(self, data: DataSet, number: int, timeout: float) -> None:
        """GET a record and compare it."""
        self.ask_for(data, number)
        self.check(data, number, timeout)

    def ask_for(self, data: DataSet, number: int) -> None:
        self._socket.sendall(_request(b"GET", data.key(number)))

    def check(self, data: DataSet, number: int, timeout: float) -> None:
        """Wait for the answer to :meth:`ask_for`."""
        self._socket.settimeout(max(0.001, timeout))
        if self._answer() != data.value(number):
            raise WrongAnswerError(f"Redis answers {data.key(number).decode()} with another value than was stored")

    def load(self, data: DataSet, timeout: float) -> None:
        """SET all records, many at a time."""
        self._socket.settimeout(timeout)
        under_way = 0
        for batch in _batches(data.count):
            requests = [_request(b"SET", data.key(number), data.value(number)) for number in batch]
            self._socket.sendall(b"".join(requests))
            # One batch is on its way while the one before it is answered.
            self._expect_ok(under_way)
            under_way = len(batch)
        self._expect_ok(under_way)

    def _expect_ok(self, count: int) -> None:
        for _ in range(count):
            if self._answer() is not None:
                raise WrongAnswerError("Redis does not answer a SET with OK")

    def _answer(self) -> bytes | None:
        """The value, or None for OK."""
        line = self._line()
        if line == b"+OK":
            return None
        if not line.startswith(b"$") or line == b"$-1":
            raise WrongAnswerError(f"Redis says {line[:200].decode(errors='replace')!r}")
        return self._take(int(line[1:]) + 2)[:-2]

    def _line(self) -> bytes:
        while b"\r\n" not in self._unread:
            self._receive()
        line, _, self._unread = self._unread.partition(b"\r\n")
        return line

    def _take(self, count: int) -> bytes:
        while len(self._unread) < count:
            self._receive()
        taken, self._unread = self._unread[:count], self._unread[count:]
        return taken

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("Redis, or who forwards to it, closed the connection")
        self._unread += data


def first_get(port: int, data: DataSet, number: int, deadline: float) -> Client:
    """GET a record of a Redis that may not be there yet, and return the connection that it answered first.

    QEMU's user network accepts for the guest, then asks the guest (by ARP) where it is, and gives up after a second;
    its next try is six seconds later. A guest that waits for its pages may take longer. So there is another connection
    before the second is over: some connection is waiting whenever the guest is ready.
    """
    clients: list[Client] = []
    try:
        while (now := time.monotonic()) < deadline:
            clients.append(Client(port, deadline - now))
            clients[-1].ask_for(data, number)
            ready, _, _ = select.select(clients, [], [], min(RETRY_SECONDS, deadline - now))
            for client in ready:
                clients.remove(client)
                try:
                    client.check(data, number, deadline - time.monotonic())
                except ConnectionError:
                    client.close()
                else:
                    return client
        raise TimeoutError
    finally:
        for client in clients:
            client.close()


def _request(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _batches(count: int) -> Iterator[range]:
    for first in range(0, count, _PIPELINE):
        yield range(first, min(first + _PIPELINE, count))
