"""The answer that is expected, read without ceremony; whatever else comes goes the usual way.

A range of an object, over a connection that is open: that is what a guest waits for, and it costs ``requests``,
``urllib3`` and ``http.client`` 0.78 ms of processor time, of which 0.03 go into sending, receiving and checking. So
their pool gives a connection, and if the answer is 206 with just the range, the length and nothing that would change
their meaning, it is read here. Otherwise what has been received of it is handed to :mod:`http.client`, as if nothing
had happened, and :mod:`imagefs.store.answer` says what it means.
"""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from imagefs.store.timing import first_byte_came, request_sent
from imagefs.store.transport import Attempt, Response, limit_to_deadline

_HEAD = 1024
"""Bytes that the head of an answer mostly has at most: then a small answer comes with one system call."""
_PIECE = 1024 * 1024
_END = b"\r\n\r\n"
_FIELD = re.compile(rb"([A-Za-z0-9-]+):[ \t]*([^\r\n]*?)[ \t]*", re.ASCII)
_HARMLESS = frozenset(
    b"accept-ranges access-control-allow-origin age alt-svc cache-control connection content-type date etag expires "
    b"keep-alive last-modified server vary via x-cache".split()
)
"""Fields that do not say how the body comes. With any other, the usual way decides."""


class Shortcut:
    """Ranges of objects below one URL. Any thread may call it; a request and its answer are one thread's."""

    def __init__(
        self, adapter: HTTPAdapter, request: requests.PreparedRequest, verify: bool | str, sent: Callable[[], None]
    ) -> None:
        """``request`` is a GET of the store's own URL, ending in a slash, with all its headers. ``sent`` is called for
        each request."""
        self._adapter = adapter
        self._request = request
        self._sent = sent
        # Any: taking connections out and putting them back is not in the typed part of its interface.
        self._pool: Any = adapter.get_connection_with_tls_context(request, verify)
        host = urlsplit(str(request.url)).netloc.rpartition("@")[2]
        self._path = request.path_url.encode("latin-1")
        fields = {"Host": host, **request.headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")

    def get(self, key: str, start: int, length: int, attempt: Attempt) -> bytes | requests.Response | None:
        """The bytes of the range; or an answer that is not what was expected; or None if no connection is open.

        Raises what the adapter would: OSError, or an error of urllib3's.
        """
        connection: Any = self._pool._get_conn()
        if connection.sock is None:
            self._pool._put_conn(connection)
            return None
        try:
            answer = self._exchange(connection, key, start, length, attempt)
        except BaseException as error:
            connection.close()
            self._pool._put_conn(connection)
            if isinstance(error, http.client.HTTPException):
                raise urllib3.exceptions.ProtocolError("no answer", error) from error
            raise
        if isinstance(answer, bytes):
            self._pool._put_conn(connection)
        return answer

    def _exchange(
        self, connection: Any, key: str, start: int, length: int, attempt: Attempt
    ) -> bytes | requests.Response:
        sock: socket.socket = connection.sock
        last = start + length - 1
        limit_to_deadline(sock, attempt)
        request_sent()
        self._sent()
        sock.sendall(
            b"GET %b%b HTTP/1.1\r\n%bRange: bytes=%d-%d\r\n\r\n" % (self._path, key.encode(), self._fields, start, last)
        )
        received = bytearray(min(_HEAD + length, _PIECE))
        limit_to_deadline(sock, attempt)
        got = sock.recv_into(received)
        first_byte_came()
        del received[got:]
        end = received.find(_END)
        close = _is_expected(received[:end], start, length) if end > 0 else None
        if close is None or got - end - len(_END) > length:
            return self._usual(connection, received)
        attempt.allow(length)
        body = bytearray(length)
        view = memoryview(body)
        done = got - end - len(_END)
        view[:done] = memoryview(received)[end + len(_END) :]
        while done < length:
            limit_to_deadline(sock, attempt)
            got = sock.recv_into(view[done : done + _PIECE])
            if not got:
                raise urllib3.exceptions.ProtocolError(
                    "body", http.client.IncompleteRead(bytes(view[:done]), length - done)
                )
            done += got
        if close:
            connection.close()
        return bytes(body)

    def _usual(self, connection: Any, received: bytearray) -> requests.Response:
        """An answer of which ``received`` is the begin, as the adapter would return it."""
        response = Response(connection.sock, method="GET", received=bytes(received))
        try:
            response.begin()
            if response.will_close:
                connection.close()
            return self._adapter.build_response(self._request, self._wrapped(response, connection))
        except BaseException:
            response.close()
            raise

    def _wrapped(self, response: Response, connection: Any) -> urllib3.HTTPResponse:
        return urllib3.HTTPResponse(
            body=response,
            headers=urllib3.HTTPHeaderDict(response.msg.items()),
            status=response.status,
            version=response.version,
            reason=response.reason,
            preload_content=False,
            decode_content=False,
            original_response=response,
            pool=self._pool,
            connection=connection,
            request_method="GET",
        )


def _is_expected(head: bytearray, start: int, length: int) -> bool | None:
    """Whether the connection is to be closed afterwards; None where the head is not just what was asked for."""
    status, *lines = head.split(b"\r\n")
    if not status.startswith(b"HTTP/1.1 206 "):
        return None
    wanted = {b"content-length": b"%d" % length, b"content-range": b"bytes %d-%d/" % (start, start + length - 1)}
    close = False
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            return None
        name, value = match[1].lower(), match[2]
        if name in wanted:
            if name == b"content-range":
                value, slash, total = value.rpartition(b"/")
                value += slash
                if not total.isdigit() or int(total) < start + length:
                    return None
            if wanted.pop(name) != value:
                return None
        elif name not in _HARMLESS:
            return None
        elif name == b"connection":
            close = value.lower() != b"keep-alive"
    return None if wanted else close
