"""Files of the mount that are not a range of a stream: each open of one is an object with its own state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from imagefs.errors import UsageError
from imagefs.fetch.view import Arrivals, Run, Trace

log = logging.getLogger(__name__)

HEARTBEAT = 1.0
"""Seconds. A reader that was killed is stuck in the kernel until its read is answered, and pyfuse3 does not say that
it was: so every read of ``arrivals`` is answered after this long, with an empty line."""
SHORTEST_LINE = 4
"""Bytes of ``0 1`` and a newline: how many runs may fit into what a reader asks for."""
MAX_LINE = 4096


class OpenFile(Protocol):
    """One open of a file. Raises ImagefsError for what the caller did wrong or a store could not give."""

    async def read(self, offset: int, length: int) -> bytes: ...

    def write(self, data: bytes) -> None:
        """UsageError for text that the file does not take."""

    def close(self) -> None: ...


class SnapshotFile:
    """Text that is made when it is first read, and then stays the same for this open."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._data: bytes | None = None

    async def read(self, offset: int, length: int) -> bytes:
        if self._data is None:
            self._data = self._make()
        return self._data[offset : offset + length]

    def write(self, data: bytes) -> None:
        raise UsageError("cannot be written to")

    def close(self) -> None:
        pass


class TraceFile(SnapshotFile):
    """``.imagefs/trace``. What is written is taken line by line, wherever in the file it is written to."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.text)
        self._trace = trace
        self._rest = b""

    def write(self, data: bytes) -> None:
        lines, newline, rest = (self._rest + data).rpartition(b"\n")
        # Set first: a bad line must not be put in front of what is written next.
        self._rest = b""
        if len(rest) > MAX_LINE:
            raise UsageError(f"a line of more than {MAX_LINE} bytes")
        if newline:
            self._trace.append_text(lines + newline)
        self._rest = rest

    def close(self) -> None:
        if self._rest:
            try:
                self._trace.append_text(self._rest + b"\n")
            except UsageError as error:
                # The writer has gone: nobody is left who could be told.
                log.warning(".imagefs/trace: %s", error)


class ArrivalsFile:
    """``.imagefs/arrivals``: lines ``PAGE COUNT``, what is here first, then what arrives; ends with the last page.

    A stream: where a read says that it wants to begin is ignored. No await between taking runs and moving the cursor,
    so two readers of one open file share the lines between them and lose none.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._cursor = 0
        self._rest = b""

    async def read(self, offset: int, length: int) -> bytes:
        text = self._take(length)
        if text or self._arrivals.complete:
            # What arrived last may have done so between the two looks.
            return text or self._take(length)
        with trio.move_on_after(HEARTBEAT):
            await self._arrivals.wait(self._cursor)
        text = self._take(length)
        return text if text or self._arrivals.complete else b"\n"

    def write(self, data: bytes) -> None:
        raise UsageError("cannot be written to")

    def close(self) -> None:
        pass

    def _take(self, length: int) -> bytes:
        """Text that is ready, at most ``length`` bytes; whole lines wherever one fits."""
        text = self._rest
        while len(text) < length:
            runs, self._cursor = self._arrivals.read(self._cursor, max(1, (length - len(text)) // SHORTEST_LINE))
            if not runs:
                break
            text += b"".join(map(_line, runs))
        cut = len(text) if len(text) <= length else text.rfind(b"\n", 0, length) + 1 or length
        self._rest = text[cut:]
        return text[:cut]


def _line(run: Run) -> bytes:
    return b"%d %d\n" % (run.page, run.count)
