"""Real images under test, and what a server was asked for on their behalf.

Bytes are compared page by page, and a page that differs is named, not shown.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from support.nginx import Nginx, Request

from imagefs.cli.opening import image_reader
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import ChunkRef, PayloadRef, find_chunk
from imagefs.image.streams import MEMORY
from imagefs.store.base import object_key
from tests.mount.conftest import environment

WINDOW_PAGES = 16
WINDOW = WINDOW_PAGES * PAGE_SIZE

_marks = itertools.count()


def check_same(got: bytes, want: bytes, what: str, first_page: int = 0) -> None:
    """Fail with the numbers of the pages that differ, never with what is in them."""
    if got == want:
        return
    assert len(got) == len(want), f"{what}: {len(got)} bytes instead of {len(want)}"
    pages = range(0, len(want), PAGE_SIZE)
    differing = [first_page + at // PAGE_SIZE for at in pages if got[at : at + PAGE_SIZE] != want[at : at + PAGE_SIZE]]
    zeros = sum(not any(got[(page - first_page) * PAGE_SIZE :][:PAGE_SIZE]) for page in differing)
    raise AssertionError(f"{what}: {len(differing)} pages differ, {zeros} of them are zero: {differing[:20]}")


def memory_of(windows: int, seed: int, zero_windows: Sequence[range] = ()) -> bytes:
    """Memory in which every page that is not zero is like no other, so that no page can stand for another.

    Every fourth window is text and the others are random, every seventh page is zero, and so are ``zero_windows``.
    """
    rng = random.Random(seed)
    empty = {number for span in zero_windows for number in span}
    out = bytearray()
    for page in range(windows * WINDOW_PAGES):
        window = page // WINDOW_PAGES
        if window in empty or page % 7 == 0:
            out += bytes(PAGE_SIZE)
        elif window % 4 == 0:
            out += (b"page %08d of seed %08d says something.\n" % (page, seed)).ljust(64, b".") * (PAGE_SIZE // 64)
        else:
            out += rng.randbytes(PAGE_SIZE)
    return bytes(out)


@dataclass(frozen=True)
class RealImage:
    """An image in a store, and what was split to make it."""

    store: Path
    name: str
    native: Path
    memory: bytes = field(repr=False)

    @property
    def path(self) -> Path:
        """``STORE/NAME``."""
        return self.store / self.name

    @cached_property
    def chunks(self) -> Mapping[int, ChunkRef]:
        """The chunk of each window of memory that is not zero."""
        with image_reader(str(self.path)) as reader:
            stream = reader.image.manifest.streams[MEMORY]
            found = (
                (number, find_chunk(stream, number, reader.block)) for number in range(stream.windows(WINDOW_PAGES))
            )
            return {number: chunk for number, chunk in found if chunk is not None}

    @property
    def pages(self) -> int:
        return len(self.memory) // PAGE_SIZE

    def page(self, number: int, count: int = 1) -> bytes:
        return self.memory[number * PAGE_SIZE : (number + count) * PAGE_SIZE]

    def contents(self, window: int) -> list[int]:
        """Pages of a window that are not zero: those that need its chunk."""
        return [page for page in range(window * WINDOW_PAGES, (window + 1) * WINDOW_PAGES) if any(self.page(page))]

    def request(self, window: int) -> tuple[str, str]:
        """Path and range of the request that brings just this window."""
        return request_for(self.chunks[window].place)

    def pack(self, window: int) -> Path:
        """The file of the store that holds a window's chunk."""
        return self.store / object_key(self.chunks[window].place.pack.hex())

    @contextmanager
    def damaged(self, window: int) -> Iterator[None]:
        """One byte in the middle of a window's payload is flipped, in place, as long as the context lasts."""
        place = self.chunks[window].place
        at = place.offset + place.length // 2
        self._flip(window, at)
        try:
            yield
        finally:
            self._flip(window, at)

    def _flip(self, window: int, at: int) -> None:
        with self.pack(window).open("r+b") as file:
            file.seek(at)
            (value,) = file.read(1)
            file.seek(at)
            file.write(bytes([value ^ 0x10]))


def request_for(place: PayloadRef) -> tuple[str, str]:
    return f"/{object_key(place.pack.hex())}", f"bytes={place.offset}-{place.offset + place.length - 1}"


def requests_to(server: Nginx) -> list[Request]:
    """All requests that have been answered, in order, but for that for a working set, which is made beside others.

    nginx logs one after the last byte of its answer has gone. A request of our own shows that it has come so far: it
    does one thing at a time.
    """
    mark = f"/mark-{next(_marks)}"
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    with closing(connection):
        connection.request("GET", mark)
        connection.getresponse().read()
    logged = server.wait_for_requests(lambda requests: any(request.path == mark for request in requests))
    return [request for request in logged if not request.path.startswith(("/mark-", "/working-sets/"))]


def pack_requests(requests: Iterable[Request], images: Iterable[RealImage]) -> list[Request]:
    """Those that ask for a part of a pack: for pages, rather than for what every mount needs to begin."""
    packs = {f"/{object_key(chunk.place.pack.hex())}" for image in images for chunk in image.chunks.values()}
    return [request for request in requests if request.path in packs]


def split(source: Path, store: Path, name: str, memory: bytes, *options: str) -> RealImage:
    """``imagefs split``."""
    command = [sys.executable, "-m", "imagefs.cli", "split", "--quiet", *options, str(source), str(store / name)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-500:]
    return RealImage(store, name, source, memory)


def split_raw(directory: Path, store: Path, name: str, memory: bytes) -> RealImage:
    source = directory / f"{name}.raw"
    source.write_bytes(memory)
    return split(source, store, name, memory, "--format", "raw")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
