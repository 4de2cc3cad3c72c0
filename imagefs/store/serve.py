"""A small HTTP server for a store, for trying things; production has nginx.

GET and HEAD with one Range (RFC 9110, section 14), keep-alive, nothing else: no listings, no writing, nothing
outside the directory, and only what is named by a key (so no temporary file of a put).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

from imagefs.errors import UsageError
from imagefs.store.base import check_key

log = logging.getLogger(__name__)

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)


class StoreServer(ThreadingHTTPServer):
    """Serves the files of ``root`` at ``address``: (host, port), port 0 for any that is free.

    Raises OSError if the address cannot be bound, UsageError if ``root`` is no directory. ``serve_forever`` and
    ``shutdown`` are the standard library's.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, root: Path, address: tuple[str, int]) -> None:
        if not root.is_dir():
            raise UsageError(f"{root}: no such directory; a store is a directory that holds images")
        self.root = root.resolve()
        info = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = info[0]
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Of the store; the name of an image goes behind it."""
        host, port = self.server_address[:2]
        return f"http://{format_address(str(host), int(port))}"

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the name service for our own name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):  # a client that goes away in the middle of an answer is no error of ours
            log.info("connection with %s ended early: %s", client_address, error)
        else:
            log.error("failed to answer %s", client_address, exc_info=error)


def parse_address(text: str) -> tuple[str, int]:
    """``ADDR:PORT``, ``[IPv6]:PORT``, ``:PORT`` (loopback) or ``ADDR`` (port 8080); UsageError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^:\[\]/]*))(?::(\d{1,5}))?", text, re.ASCII)
    port = int(match[3]) if match is not None and match[3] is not None else 8080
    if match is None or not text or port > 65535:
        raise UsageError(f"{text!r} is not an address to bind to; use ADDR:PORT, like 127.0.0.1:8080 or [::1]:8080")
    return match[1] or match[2] or "127.0.0.1", port


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Handler(BaseHTTPRequestHandler):
    server: StoreServer
    protocol_version = "HTTP/1.1"
    server_version = "imagefs"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 75
    """Seconds that a connection may be idle; nginx's default."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        log.info("%s %s", self.client_address[0], format % args)

    def _answer(self, with_body: bool) -> None:
        file = self._open()
        if file is None:
            self._refuse(HTTPStatus.NOT_FOUND, with_body)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            span = self._span(size)
            if span is not None and span[0] >= span[1]:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, with_body, f"bytes */{size}")
                return
            start, stop = span or (0, size)
            if span is None:
                self.send_response(HTTPStatus.OK)
            else:
                self.send_response(HTTPStatus.PARTIAL_CONTENT)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if with_body and stop > start and self.connection.sendfile(file, start, stop - start) < stop - start:
                self.close_connection = True  # truncated under us: the client sees it by the connection's end

    def _open(self) -> BinaryIO | None:
        """The file that the request names; None if there is none that may be served."""
        try:
            path = (self.server.root / check_key(self.path.removeprefix("/"))).resolve()
            # A symbolic link may lead out of the store; what it leads to was not meant to be served.
            if not path.is_relative_to(self.server.root):
                return None
            file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
        except (UsageError, OSError):
            return None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            return None
        return file

    def _span(self, size: int) -> tuple[int, int] | None:
        """(first, last + 1) of the Range asked for; None for the whole file, first >= last + 1 if it has no such bytes.

        Several ranges, other units and bad syntax are ignored, which RFC 9110 allows.
        """
        match = _RANGE.fullmatch(self.headers.get("Range", "").strip())
        if match is None or "If-Range" in self.headers or not (match[1] or match[2]):
            return None
        if not match[1]:
            return max(0, size - int(match[2])), size
        first, last = int(match[1]), int(match[2] or size)
        if match[2] and last < first:
            return None
        return first, min(last + 1, size)

    def _refuse(self, status: HTTPStatus, with_body: bool, content_range: str | None = None) -> None:
        body = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
