"""A small synchronous client of QEMU's machine protocol (QMP), as docs/interop/qmp-spec specifies it.

One command at a time, over a unix socket. A QMP socket serves one client at a time: a second one connects, and
then gets no greeting until the first has left.
"""

from __future__ import annotations

import array
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from imagefs.errors import RestoreError, UsageError

GREETING_SECONDS = 10.0
COMMAND_SECONDS = 120.0
"""``stop`` waits for the guest's disk I/O, so a command may take long. Pulled out of the air."""

POLL_SECONDS = 0.001
KEPT_EVENTS = 1000
LONGEST_MESSAGE = 64 << 20


class QmpError(RestoreError):
    """QEMU refused a command; ``error_class`` and ``description`` are QEMU's own words."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        self.command = command
        self.error_class = error_class
        self.description = description
        super().__init__(f"QEMU refused {command}: {description} ({error_class})")


class QmpClosedError(RestoreError):
    """The connection has ended: QEMU has, or it has closed its monitor."""


class Qmp:
    """A connection on which capabilities have been negotiated; a context manager that closes it.

    ``events`` holds the events that came, oldest first, as QEMU sent them; the oldest go when there are more than
    KEPT_EVENTS.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        greeting_timeout: float = GREETING_SECONDS,
        *,
        out_of_band: bool = False,
    ) -> None:
        """Takes the connection over. RestoreError where what answers is not QMP, or nothing does.

        With ``out_of_band``, commands can be executed so if QEMU offers it.
        """
        self.name = name
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._socket = connection
        self._buffer = bytearray()
        self._serial = 0
        try:
            try:
                greeting = self._receive(time.monotonic() + greeting_timeout)
            except TimeoutError:
                raise RestoreError(f"{name}: no QMP greeting; is another client connected to this socket?") from None
            if "QMP" not in greeting:
                raise RestoreError(f"{name}: what answers there does not speak QMP")
            self.version: str = _version(greeting)
            self._out_of_band = out_of_band and "oob" in greeting["QMP"].get("capabilities", ())
            enable = {"enable": ["oob"]} if self._out_of_band else None
            self.execute("qmp_capabilities", enable, timeout=greeting_timeout)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def connect(
        cls, path: str | Path, greeting_timeout: float = GREETING_SECONDS, *, out_of_band: bool = False
    ) -> Self:
        """UsageError where no QEMU listens at ``path``."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(greeting_timeout)
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            reason = error.strerror or str(error)
            raise UsageError(
                f"{path}: no QEMU listens there ({reason}); start it with -qmp unix:PATH,server=on,wait=off"
            ) from error
        return cls(connection, str(path), greeting_timeout, out_of_band=out_of_band)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For waiting until something comes; :meth:`poll` then takes it."""
        return self._socket.fileno()

    def poll(self) -> None:
        """Take the messages that have come into ``events``, without waiting. QmpClosedError where QEMU has gone."""
        while True:
            try:
                self._receive(time.monotonic() + POLL_SECONDS)
            except TimeoutError:
                return

    def __repr__(self) -> str:
        return f"<Qmp {self.name} QEMU {self.version}, {len(self.events)} events>"

    @property
    def peer_pid(self) -> int:
        """Process that listens on the socket; 0 if it is not in our PID namespace."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout: float = COMMAND_SECONDS,
        out_of_band: bool = False,
    ) -> Any:
        """Run a command and return what it returns. ``fds`` travel along with it (for ``getfd``) and stay ours.

        ``out_of_band`` is for the few commands that QEMU executes so even while its main loop is stuck, if that was
        agreed on.

        Raises QmpError where QEMU refuses, QmpClosedError where it has gone, RestoreError after ``timeout`` seconds;
        the connection is of no use after the last two.
        """
        self._serial += 1
        verb = "exec-oob" if out_of_band and self._out_of_band else "execute"
        request: dict[str, Any] = {verb: command, "id": self._serial}
        if arguments:
            request["arguments"] = dict(arguments)
        deadline = time.monotonic() + timeout
        try:
            self._send(json.dumps(request).encode() + b"\n", fds, timeout)
            while True:
                answer = self._receive(deadline)
                if answer.get("id") == self._serial and "return" in answer:
                    return answer["return"]
                # An answer without an id is QEMU's to something that it could not parse: ours, too.
                if "error" in answer and answer.get("id", self._serial) == self._serial:
                    error = answer["error"]
                    raise QmpError(command, str(error.get("class", "?")), str(error.get("desc", "no reason given")))
        except TimeoutError:
            raise RestoreError(f"{self.name}: QEMU did not answer {command} within {timeout:g} seconds") from None

    def wait_event(self, *names: str, timeout: float = COMMAND_SECONDS) -> dict[str, Any]:
        """The first event of one of these names that has come or comes; it and those before it are dropped."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                while self.events:
                    event = self.events.popleft()
                    if event["event"] in names:
                        return event
                self._receive(deadline)
        except TimeoutError:
            wanted = " or ".join(names)
            raise RestoreError(f"{self.name}: no {wanted} event from QEMU within {timeout:g} seconds") from None

    def wait_closed(self, timeout: float = COMMAND_SECONDS) -> None:
        """Until QEMU hangs up, which it does when it ends."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self._receive(deadline)
        except QmpClosedError:
            return
        except TimeoutError:
            raise RestoreError(f"{self.name}: QEMU did not end within {timeout:g} seconds") from None

    def _send(self, data: bytes, fds: Sequence[int], timeout: float) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.settimeout(timeout)
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):  # QEMU may have answered and hung up by now, and then an empty send fails
                self._socket.sendall(data[sent:])
        except TimeoutError:
            raise
        except OSError as error:
            raise QmpClosedError(f"{self.name}: QEMU has closed the connection ({error.strerror})") from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; an event is appended to ``events`` as well. TimeoutError after the deadline."""
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError as error:
                raise QmpClosedError(f"{self.name}: QEMU has closed the connection ({error.strerror})") from error
            if not data:
                raise QmpClosedError(f"{self.name}: QEMU has closed the connection")
            self._buffer += data
            if len(self._buffer) > LONGEST_MESSAGE:
                raise RestoreError(f"{self.name}: what answers there does not speak QMP")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise RestoreError(f"{self.name}: what answers there does not speak QMP")
        if "event" in message:
            self.events.append(message)
        return message


def _version(greeting: Mapping[str, Any]) -> str:
    try:
        number = greeting["QMP"]["version"]["qemu"]
        return f"{number['major']}.{number['minor']}.{number['micro']}"
    except (KeyError, TypeError):
        return "of unknown version"
