"""The wire below :class:`~imagefs.store.http.HttpStore`: requests' adapter, with a deadline for each request.

``requests`` timeouts are per socket operation: a server that sends one byte every few seconds, in its headers or
in its body, holds a reader for ever. Here every read from the socket gets what is left until the request's
deadline as its timeout, so no request outlives it.

A request and all reads of its answer happen in one thread; the thread's current :class:`Attempt` is how the
deadline gets past ``requests`` and ``urllib3`` down to the socket.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import urllib3
import urllib3.connection
from requests import exceptions as requests_exceptions
from requests.adapters import HTTPAdapter

from imagefs.store.timing import first_byte_came, request_sent

_READ_BUFFER = 32 * 1024
"""Bytes: an answer's headers and the begin of its body arrive with one system call."""


@dataclass
class Attempt:
    """One request as the wire sees it. Belongs to the thread that makes the request."""

    deadline: float
    """``time.monotonic()`` seconds after which every read fails; may be moved once the size is known."""
    read_timeout: float
    """Seconds that one read from the socket may take."""
    slowest: int
    """Bytes per second that an answer must come with at least."""
    connections: int = 0
    """Connections that were opened for it: 0 when one was reused."""

    def allow(self, size: int) -> None:
        """The headers are there, and ``size`` bytes follow: the deadline is theirs from now on."""
        self.deadline = time.monotonic() + self.read_timeout + size / self.slowest


_current = threading.local()


@contextmanager
def bounded(attempt: Attempt) -> Iterator[None]:
    """Requests of this thread are part of ``attempt`` inside the block."""
    _current.attempt = attempt
    try:
        yield
    finally:
        _current.attempt = None


class DeadlineAdapter(HTTPAdapter):
    """A pool of keep-alive connections whose requests end by the deadline of their :class:`Attempt`."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # SOCKS needs connections of its own: no deadline in its reads
            manager.pool_classes_by_scheme = _POOLS
        return manager


class _DeadlineReader(io.RawIOBase):
    """The socket's raw reader; each read gets no more time than the attempt has left."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, attempt: Attempt, received: bytes) -> None:
        self._raw = raw
        self._socket = sock
        self._attempt = attempt
        self._received = received

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._received:
            count = min(len(buffer), len(self._received))
            buffer[:count], self._received = self._received[:count], self._received[count:]
            return count
        limit_to_deadline(self._socket, self._attempt)
        count = self._raw.readinto(buffer) or 0
        first_byte_came()
        return count

    def close(self) -> None:
        try:
            self._raw.close()
        finally:
            super().close()


def limit_to_deadline(sock: socket.socket, attempt: Attempt) -> None:
    """The next operation of ``sock`` gets what is left until the deadline; TimeoutError if that is nothing."""
    left = attempt.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline")
    seconds = min(left, attempt.read_timeout)
    # Each setting is a system call.
    if sock.gettimeout() != seconds:
        sock.settimeout(seconds)


class Response(http.client.HTTPResponse):
    """An answer of which ``received`` has been read from the socket already."""

    def __init__(self, sock: socket.socket, *args: Any, received: bytes = b"", **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        attempt = getattr(_current, "attempt", None)
        if attempt is not None:
            self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), sock, attempt, received), _READ_BUFFER)


class _HTTPConnection(urllib3.connection.HTTPConnection):
    response_class = Response

    def connect(self) -> None:
        super().connect()
        _count_connection()


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = Response

    def connect(self) -> None:
        super().connect()
        _count_connection()


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


_POOLS = {"http": _HTTPPool, "https": _HTTPSPool}


def _count_connection() -> None:
    attempt = getattr(_current, "attempt", None)
    if attempt is not None:
        attempt.connections += 1
    request_sent()


def describe_failure(error: BaseException) -> str:
    """A few words for the innermost cause of a failed request; never a URL, a header or urllib3's repr."""
    causes = list(_causes(error))
    through = "proxy: " if any(isinstance(cause, requests_exceptions.ProxyError) for cause in causes) else ""
    return through + _reason(causes)


def _reason(causes: list[BaseException]) -> str:
    for cause in reversed(causes):
        match cause:
            case socket.gaierror():
                return f"the host's name cannot be resolved ({cause.strerror})"
            case ssl.SSLCertVerificationError():
                return f"TLS: {cause.verify_message}"
            case ssl.SSLError():
                return f"TLS: {(cause.reason or 'failed').replace('_', ' ').lower()}"
            case TimeoutError() | requests_exceptions.Timeout() | urllib3.exceptions.TimeoutError():
                connecting = any(isinstance(c, urllib3.exceptions.ConnectTimeoutError) for c in causes)
                return "no connection in time" if connecting else "no answer in time"
            case http.client.RemoteDisconnected():
                return "the server closed the connection without an answer"
            case http.client.IncompleteRead():
                return "the connection broke off in the middle of the answer"
            case http.client.HTTPException():
                return "the answer is not HTTP"
            case OSError(strerror=str(text)):
                return text.lower()
    return f"the request failed ({type(causes[0]).__name__})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and, outermost first, what it wraps: as its cause, ``reason`` or argument.

    Not as its context, which may be something else that the caller was handling.
    """
    queue: list[BaseException] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = (getattr(current, "reason", None), *current.args, current.__cause__)
        queue.extend(item for item in inner if isinstance(item, BaseException))
