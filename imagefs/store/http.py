"""A store behind any static HTTP server: GET with Range is all that it needs.

How answers are checked and classed: :mod:`imagefs.store.answer`. What happens to the connection itself (refused,
reset, broken off, TLS, DNS, time-outs, redirects in a circle) is an
:class:`~imagefs.errors.UnavailableError`. Nothing is retried here: the scheduler decides that.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urljoin, urlsplit

import requests
import requests.utils
import urllib3

from imagefs.errors import (
    CorruptObjectError,
    MissingObjectError,
    ReadOnlyStoreError,
    StoreError,
    UnavailableError,
    UsageError,
)
from imagefs.store.answer import Answer
from imagefs.store.base import DEFAULT_LIMIT, READ_ONLY, check_key, check_span, without_credentials
from imagefs.store.shortcut import Shortcut
from imagefs.store.timing import last_byte_came
from imagefs.store.transport import Attempt, DeadlineAdapter, bounded, describe_failure

STREAM_PIECE = 64 << 10
"""Bytes of a piece of a stream: 5 ms of 100 Mbit/s."""
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# A proxy that compresses would make lengths and ranges meaningless.
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "imagefs"}

# urllib3 warns about odd headers with a traceback; what matters of them is checked and raised here.
logging.getLogger("urllib3").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """Counters since the store was opened."""

    requests: int
    """Sent, redirects included."""
    bytes_received: int
    """Of objects, without headers and error pages."""
    errors: int
    """Calls that ended in an error other than *missing*."""
    connections: int
    """Opened; few in comparison with ``requests`` where the server keeps connections alive."""


class HttpStore:
    """A :class:`~imagefs.store.base.Store` at an ``http://`` or ``https://`` URL; it cannot be written to.

    ``connect_timeout`` and ``read_timeout`` are in seconds, for one connect and for one read from the socket. A whole
    request may take ``connect_timeout + read_timeout`` until its headers are there, then ``read_timeout`` plus its
    size at ``slowest`` bytes per second. ``connections`` bounds the connections that are open at once; a request
    beyond them waits for one.

    The proxy variables of the environment, ``REQUESTS_CA_BUNDLE`` and ``~/.netrc`` are honoured as they are when the
    store is opened. A loopback address is never asked for through a proxy. Redirects are followed, but not from
    https to http; credentials go to the URL's own host only. Open the store after a fork, not before.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 15.0,
        slowest: int = 16 * 1024,
        connections: int = 16,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"{without_credentials(url)}: not the URL of a store")
        self._base = without_credentials(url).rstrip("/")
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._slowest = slowest
        if parts.username is not None:
            self._auth: tuple[str, str] | None = (unquote(parts.username), unquote(parts.password or ""))
        else:
            self._auth = requests.utils.get_netrc_auth(self._base)
        self._verify: bool | str = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        self._proxies = _proxies_for(self._base)
        # The adapter alone, without a requests.Session: a session reads ~/.netrc for each request and takes in the
        # whole body of a redirect, however long it is.
        self._adapter = DeadlineAdapter(pool_connections=4, pool_maxsize=connections, max_retries=0, pool_block=True)
        self._shortcut: Shortcut | None = None
        self._lock = threading.Lock()
        self._requests = self._bytes_received = self._errors = self._connections = 0

    def __repr__(self) -> str:
        return f"HttpStore({self._base!r})"

    @property
    def origin(self) -> str:
        return self._base

    def statistics(self) -> HttpStatistics:
        with self._lock:
            return HttpStatistics(self._requests, self._bytes_received, self._errors, self._connections)

    def get(self, key: str, start: int = 0, length: int | None = None, limit: int = DEFAULT_LIMIT) -> bytes:
        check_key(key)
        check_span(start, length)
        if length == 0:
            return b""
        wanted = None
        if start or length is not None:
            wanted = f"bytes={start}-{'' if length is None else start + length - 1}"
        attempt = self._attempt()
        with self._guarded(key, attempt), bounded(attempt):
            direct = None if length is None else self._direct(key, start, length, attempt)
            if isinstance(direct, bytes):
                data = direct
            else:
                with closing(self._send("GET", key, wanted, direct)) as answer:
                    answer.check_status(ranged=wanted is not None)
                    count = answer.whole_length(limit) if wanted is None else answer.range_length(start, length, limit)
                    attempt.allow(limit if count is None else count)
                    # A 416 that is right has a body too, but not the object's.
                    data = b"" if answer.status == 416 else answer.read(count, limit)
        last_byte_came()
        with self._lock:
            self._bytes_received += len(data)
        return data

    def stream(self, key: str, start: int = 0, limit: int = DEFAULT_LIMIT) -> Iterator[bytes]:
        check_key(key)
        check_span(start, None)
        wanted = f"bytes={start}-" if start else None
        attempt = self._attempt()
        with self._guarded(key, attempt):
            # The answer keeps its attempt, whatever thread reads it.
            with bounded(attempt):
                opened = self._send("GET", key, wanted)
            with closing(opened) as answer:
                answer.check_status(ranged=wanted is not None)
                count = answer.whole_length(limit) if wanted is None else answer.range_length(start, None, limit)
                pieces = iter(()) if answer.status == 416 else answer.pieces(count, limit, STREAM_PIECE)
                while True:
                    # Anew for each piece: a stream may take as long as it takes, and so may its reader.
                    attempt.allow(STREAM_PIECE)
                    piece = next(pieces, b"")
                    if not piece:
                        return
                    with self._lock:
                        self._bytes_received += len(piece)
                    yield piece

    def size(self, key: str) -> int:
        with self._head(key) as answer:
            size = answer.content_length()
        if size is None:
            raise CorruptObjectError("the server does not say how long the object is", key=key, origin=self.origin)
        return size

    def has(self, key: str) -> bool:
        try:
            with self._head(key):
                return True
        except MissingObjectError:
            return False

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        raise ReadOnlyStoreError(READ_ONLY, key=check_key(key), origin=self.origin)

    def delete(self, key: str) -> None:
        raise ReadOnlyStoreError(READ_ONLY, key=check_key(key), origin=self.origin)

    def close(self) -> None:
        self._adapter.close()

    def _attempt(self) -> Attempt:
        return Attempt(time.monotonic() + self._connect_timeout + self._read_timeout, self._read_timeout, self._slowest)

    @contextmanager
    def _head(self, key: str) -> Iterator[Answer]:
        """The answer to a HEAD, which has a good status."""
        attempt = self._attempt()
        with self._guarded(check_key(key), attempt), bounded(attempt), closing(self._send("HEAD", key)) as answer:
            answer.check_status(ranged=False)
            answer.drain()
            yield answer

    @contextmanager
    def _guarded(self, key: str, attempt: Attempt) -> Iterator[None]:
        """Around a request and its answer: whatever goes wrong inside becomes a StoreError."""
        failed = True
        try:
            yield
            failed = False
        except (MissingObjectError, GeneratorExit):
            # Not there, or a stream of which somebody has seen enough: no error of the store's.
            failed = False
            raise
        except StoreError:
            raise
        except (requests.exceptions.InvalidHeader, urllib3.exceptions.InvalidHeader) as error:
            reason = "the answer's headers contradict each other"
            raise CorruptObjectError(reason, key=key, origin=self.origin) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(describe_failure(error), key=key, origin=self.origin) from error
        finally:
            with self._lock:
                self._errors += failed
                self._connections += attempt.connections

    def _direct(self, key: str, start: int, length: int, attempt: Attempt) -> bytes | requests.Response | None:
        """A range by the :class:`Shortcut`, where there is one: the store's own host, and no proxy on the way."""
        if self._proxies:
            return None
        if self._shortcut is None:
            request = requests.Request("GET", f"{self._base}/", headers=_HEADERS, auth=self._auth).prepare()
            self._shortcut = Shortcut(self._adapter, request, self._verify, self._count)
        return self._shortcut.get(key, start, length, attempt)

    def _send(
        self, method: str, key: str, byte_range: str | None = None, first: requests.Response | None = None
    ) -> Answer:
        """The first answer that is no redirect. ``first`` is one that is there already."""
        headers = _HEADERS if byte_range is None else _HEADERS | {"Range": byte_range}
        url = f"{self._base}/{key}"
        for _ in range(_MAX_REDIRECTS + 1):
            # Not "first or …": an answer of requests is false where its status is an error.
            response = self._request(method, url, headers) if first is None else first
            first = None
            answer = Answer(response, key=key, origin=self.origin)
            if answer.status not in _REDIRECTS:
                return answer
            try:
                url = self._redirected(key, url, answer)
                answer.drain()
            finally:
                answer.close()
        raise UnavailableError(f"redirected more than {_MAX_REDIRECTS} times", key=key, origin=self.origin)

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> requests.Response:
        auth = self._auth if _host(url) == _host(self._base) else None
        request = requests.Request(method, url, headers=dict(headers), auth=auth).prepare()
        self._count()
        return self._adapter.send(
            request,
            stream=True,
            timeout=(self._connect_timeout, self._read_timeout),
            verify=self._verify,
            proxies=self._proxies if url.startswith(self._base) else _proxies_for(url),
        )

    def _count(self) -> None:
        with self._lock:
            self._requests += 1

    def _redirected(self, key: str, url: str, answer: Answer) -> str:
        try:
            target = urljoin(url, answer.header("Location") or "nowhere:")
            parts = urlsplit(target)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            good = False
        if not good:
            raise UnavailableError("redirected to something that is no URL", key=key, origin=self.origin)
        if url.startswith("https:") and parts.scheme == "http":
            raise UnavailableError("redirected from https to http: refused", key=key, origin=self.origin)
        return without_credentials(target)


def _host(url: str) -> str:
    """``scheme://host:port``: what credentials and proxies belong to."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _proxies_for(url: str) -> dict[str, str]:
    return {} if _is_loopback(url) else requests.utils.get_environ_proxies(url)


def _is_loopback(url: str) -> bool:
    name = urlsplit(url).hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
