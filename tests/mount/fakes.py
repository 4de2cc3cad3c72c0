"""A scripted image for mounts under test: known content, windows that are held back or fail on command.

As a program it is ``mount.imagefs`` with this image behind it: ``python -m tests.mount.fakes CONTROL SOURCE MOUNTPOINT
…``, told what to do through the Unix socket CONTROL (see :class:`FakeControl`). SOURCE chooses how it starts: an image
named ``broken``, ``missing``, ``killed`` or ``endless`` does not; ``stuck`` does not end.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from imagefs.cli.mount import main
from imagefs.errors import CorruptObjectError, MissingObjectError, TimedOutError
from imagefs.fetch.arrivals import ArrivalLog
from imagefs.fetch.trace import TouchTrace
from imagefs.fetch.view import PageInfo, Run
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.native import TemplateBuilder
from imagefs.image.native_files import NativeFile
from imagefs.image.streams import (
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_LITERALS,
    NATIVE_SUPERSEDED,
    STATE,
)
from imagefs.mount import serve
from imagefs.mount.options import MountOptions

WINDOW_PAGES = 16
WINDOW = WINDOW_PAGES * PAGE_SIZE
MIB = 1 << 20

GEOMETRY = Geometry(
    (
        Region("low", 0, 640 << 10, 0),
        Region("main", 1 * MIB, 31 * MIB, 640 << 10),
        Region("high", 1 << 32, 1 * MIB, (640 << 10) + 31 * MIB),
    )
)
"""As on a PC: a hole below 1 MiB, and memory above 4 GiB."""
DOCUMENT = {"format": "fake", "regions": [region.name for region in GEOMETRY.regions], "native_bytes": 0}
STATE_BYTES = bytes(range(256)) * 777
CONFIG = {"config/domain.xml": b"<domain/>\n", "config/command line": b"qemu\0-m\0", "config/../escape": b"no"}
ZERO_EVERY = 7
"""Every seventh page is zero."""


@functools.cache
def page_bytes(page: int) -> bytes:
    """The content of a page of ``memory``."""
    if page % ZERO_EVERY == 0:
        return bytes(PAGE_SIZE)
    return (b"page %07d says hello, and more %07d.\n" % (page, page * 31)).ljust(64, b"~") * (PAGE_SIZE // 64)


@functools.cache
def memory_bytes() -> bytes:
    return b"".join(map(page_bytes, range(GEOMETRY.pages)))


@functools.cache
def native_streams() -> tuple[bytes, Mapping[str, bytes]]:
    """The native file, and the streams that its template consists of: what a live-migrated guest leaves, in small."""
    entries, literals, exceptions, superseded = bytearray(), bytearray(), bytearray(), bytearray()
    native = bytearray()
    builder = TemplateBuilder(entries.extend, literals.extend)

    def literal(data: bytes) -> None:
        builder.literal(data)
        native.extend(data)

    def record(page: int, data: bytes | None = None) -> None:
        prefix = (page << 12 | 8).to_bytes(8, "big") + b"\3ram"
        at = builder.pages(page, 1, prefix, 0)
        if data is not None:
            exceptions.extend(at.to_bytes(8, "little"))
            superseded.extend(data)
        native.extend(prefix + (page_bytes(page) if data is None else data))

    literal(b"QEVM" + bytes(1000))
    for page in range(600):
        if page % 97 == 5:
            record(page, (b"older %04d " % page * 400)[:PAGE_SIZE])
        elif page % ZERO_EVERY:
            record(page)
    for page in range(0, 600, ZERO_EVERY):
        prefix = (page << 12 | 2).to_bytes(8, "big") + b"\0"
        builder.bare(1, prefix, 0)
        native.extend(prefix)
    for page in range(5, 600, 97):
        record(page)
    for page in range(4000, 0, -3):
        # Backwards, so that each is an entry of its own: more than one block of the table.
        record(page)
    literal(b"the end" * 3000)
    builder.pages(4096, 1024)
    native.extend(memory_bytes()[4096 * PAGE_SIZE : 5120 * PAGE_SIZE])
    builder.finish()
    assert builder.size == len(native)
    streams = {
        NATIVE_ENTRIES: bytes(entries),
        NATIVE_LITERALS: bytes(literals),
        NATIVE_EXCEPTIONS: bytes(exceptions),
        NATIVE_SUPERSEDED: bytes(superseded),
    }
    return bytes(native), streams


def native_bytes() -> bytes:
    return native_streams()[0]


class FakeImage:
    """Implements :class:`imagefs.fetch.view.ImageView`. Everything is here unless a window is held or fails."""

    def __init__(self, name: str = "store/fake", timeout: float | None = None) -> None:
        self.name = name
        self.geometry = GEOMETRY
        self.document: Mapping[str, Any] = DOCUMENT
        self.native_size = len(native_bytes())
        self.native_files: Sequence[NativeFile] = ()
        self.contents: dict[str, bytes] = {
            MEMORY: memory_bytes(),
            STATE: STATE_BYTES,
            **CONFIG,
            **native_streams()[1],
        }
        self.streams = {name: len(data) for name, data in self.contents.items()}
        self.timeout = timeout
        self.held: dict[int, trio.Event] = {}
        self.failing: dict[int, str] = {}
        self.reads: list[tuple[str, int, int]] = []
        """Every ``read`` that had to wait, and every ``read_present``: stream, offset, length."""
        self.arrivals = ArrivalLog(GEOMETRY.pages, self.present_bitmap)
        self.trace = TouchTrace(GEOMETRY.pages)

    def read_present(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes | None:
        self.reads.append((stream, offset, length))
        if stream == MEMORY and any(self._is_away(window) for window in self._windows(offset, length)):
            return None
        return self.contents[stream][offset : offset + length]

    async def read(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes:
        await trio.lowlevel.checkpoint()
        windows = self._windows(offset, length) if stream == MEMORY else range(0)
        with trio.move_on_after(float("inf") if self.timeout is None else self.timeout) as scope:
            for window in windows:
                if window in self.held:
                    await self.held[window].wait()
                self._fail(window)
        if scope.cancelled_caught:
            raise TimedOutError(f"{self.name}: nothing came within {self.timeout} s")
        return self.contents[stream][offset : offset + length]

    async def page_info(self, page: int) -> PageInfo:
        await trio.lowlevel.checkpoint()
        kind = "pml4" if page == 1 else "ram"
        if page % ZERO_EVERY == 0:
            return PageInfo("zero", None, kind)
        return PageInfo("remote" if page // WINDOW_PAGES in self.held else "present", f"blake3:{page:064x}", kind)

    def present_bitmap(self, offset: int, length: int) -> bytes:
        bitmap = bytearray(b"\xff" * -(-GEOMETRY.pages // 8))
        for window in self.held:
            bitmap[window * WINDOW_PAGES // 8 : (window + 1) * WINDOW_PAGES // 8] = bytes(WINDOW_PAGES // 8)
        return bytes(bitmap[offset : offset + length])

    def status(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "memory": {"pages": GEOMETRY.pages, "page_size": PAGE_SIZE, "complete": self.arrivals.complete},
            "held": sorted(self.held),
        }

    def hold(self, first: int, count: int = 1) -> None:
        for window in range(first, first + count):
            self.held.setdefault(window, trio.Event())

    def release(self, first: int, count: int = 1) -> None:
        for window in range(first, first + count):
            event = self.held.pop(window, None)
            if event is not None:
                event.set()
                self.arrivals.add(Run(window * WINDOW_PAGES, WINDOW_PAGES))

    def _windows(self, offset: int, length: int) -> range:
        return range(offset // WINDOW, (offset + max(length, 1) - 1) // WINDOW + 1)

    def _is_away(self, window: int) -> bool:
        return window in self.held or window in self.failing

    def _fail(self, window: int) -> None:
        match self.failing.get(window):
            case "corrupt":
                raise CorruptObjectError("digest is wrong", key=f"objects/window-{window}", origin="http://store")
            case "missing":
                raise MissingObjectError("no such object", key=f"objects/window-{window}", origin="http://store")
            case "bug":
                raise RuntimeError("a mistake in a program")


@asynccontextmanager
async def open_fake(control: Path, source: str, options: MountOptions) -> AsyncIterator[FakeImage]:
    """A session (see :mod:`imagefs.mount.session`) whose image obeys ``control``."""
    match source.rpartition("/")[2]:
        case "broken":
            raise RuntimeError("a mistake in a program")
        case "missing":
            raise MissingObjectError("no such object", key="missing", origin="store")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "endless":
            control.with_suffix(".pid").write_text(str(os.getpid()))
            await trio.sleep_forever()
        case "stuck":
            serve.CLOSING_TIME = 0.5
    image = FakeImage(source, options.timeout)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(control))
    listener.listen(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, image, listener, name="control")
        try:
            yield image
        finally:
            if source.endswith("/stuck"):
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()
        nursery.cancel_scope.cancel()


async def _obey(image: FakeImage, listener: trio.socket.SocketType) -> None:
    stream, _ = await listener.accept()
    buffer = b""
    while data := await stream.recv(65536):
        buffer += data
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            name, *args = json.loads(line)
            result: Any = None
            if name in ("hold", "release"):
                getattr(image, name)(*args)
            elif name == "fail":
                image.failing[args[0]] = args[1]
            elif name == "heal":
                del image.failing[args[0]]
            elif name == "finish":
                image.arrivals.finish()
            elif name == "reads":
                result, image.reads = image.reads, []
            elif name == "trace":
                result = image.trace.text().decode()
            elif name == "stall":
                _stand_still(Path(args[0]))
                continue
            await stream.send(json.dumps(result).encode() + b"\n")


def _stand_still(marker: Path) -> None:
    marker.touch()
    while marker.exists():
        time.sleep(0.01)


class FakeControl:
    """The test's end: each method is done when it returns."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def hold(self, first: int, count: int = 1) -> None:
        """Keep windows of memory away from now on."""
        self._ask("hold", first, count)

    def release(self, first: int, count: int = 1) -> None:
        """Let them arrive."""
        self._ask("release", first, count)

    def fail(self, window: int, kind: str) -> None:
        """``corrupt``, ``missing`` or ``bug`` for whoever reads the window."""
        self._ask("fail", window, kind)

    def heal(self, window: int) -> None:
        self._ask("heal", window)

    def finish(self) -> None:
        """All pages are here."""
        self._ask("finish")

    def reads(self) -> list[tuple[str, int, int]]:
        """What was read of the image since the last call."""
        return [(stream, offset, length) for stream, offset, length in self._ask("reads")]

    def trace(self) -> str:
        return str(self._ask("trace"))

    def stall(self, marker: Path) -> None:
        """Let the daemon's event loop stand still from when it makes ``marker`` until that is removed."""
        self._send("stall", str(marker))

    def _ask(self, *command: object) -> Any:
        self._send(*command)
        return json.loads(self._file.readline())

    def _send(self, *command: object) -> None:
        self._socket.sendall(json.dumps(command).encode() + b"\n")


def run(argv: list[str]) -> int:
    """``mount.imagefs`` with the scripted image."""
    control = Path(argv[0])
    return main(argv[1:], session=lambda source, options: open_fake(control, source, options))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
