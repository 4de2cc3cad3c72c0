"""A server that answers as a test tells it to, byte by byte, however wrong that is."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

Script = Callable[["Visit"], None]


class Visit:
    """One request on one connection, for the script to answer. The connection goes on if the script says so."""

    def __init__(self, server: ScriptedServer, sock: socket.socket, head: str) -> None:
        self._server = server
        self._socket = sock
        self.head = head
        """The request line and the headers."""
        self.path = head.split(" ")[1]
        self.keep = False

    def send(self, data: bytes | str) -> None:
        """OSError when the client has gone."""
        data = data.encode() if isinstance(data, str) else data
        self._socket.sendall(data)
        self._server.bytes_sent += len(data)

    def answer(self, status: str = "200 OK", headers: str = "", body: bytes = b"") -> None:
        """A correct answer, after which the connection is kept."""
        self.send(f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.keep = True

    def wait_for_client_to_go(self) -> None:
        while self._socket.recv(4096):
            pass

    def pause(self, seconds: float) -> None:
        """OSError when the test is over."""
        if self._server.stopping.wait(seconds):
            raise ConnectionAbortedError

    def header(self, name: str) -> str | None:
        for line in self.head.split("\r\n")[1:]:
            field, _, value = line.partition(":")
            if field.lower() == name.lower():
                return value.strip()
        return None


class ScriptedServer:
    """Listens on loopback while its context lasts; ``script`` answers each request, in a thread per connection."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self._script = script
        self._tls = tls
        self._listener = socket.create_server((host, 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="scripted-accept")]
        self.stopping = threading.Event()
        self.heads: list[str] = []
        self.connections = 0
        self.bytes_sent = 0
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://{host}:{self.port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            self.connections += 1
            self._threads.append(threading.Thread(target=self._talk, args=(sock,), name="scripted-connection"))
            self._threads[-1].start()

    def _talk(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            keep = True
            while keep:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    byte = sock.recv(1)
                    if not byte:
                        return
                    head += byte
                self.heads.append(head.decode())
                visit = Visit(self, sock, head.decode())
                self._script(visit)
                keep = visit.keep
        except OSError:
            pass
        finally:
            sock.close()
