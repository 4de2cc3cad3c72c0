"""An image opened for reading: index, scheduler, sink and sweep put together. What a mount holds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import trio
from cachetools import LRUCache

from imagefs.decode import ChunkDecoder
from imagefs.errors import CorruptObjectError, TimedOutError
from imagefs.fetch.arrivals import ArrivalLog
from imagefs.fetch.flights import Flight, Priority
from imagefs.fetch.foresight import Foresight
from imagefs.fetch.locator import Locator
from imagefs.fetch.memory import MemoryPages
from imagefs.fetch.neighbours import Neighbourhood, near_windows
from imagefs.fetch.options import FetchOptions
from imagefs.fetch.published import PublishedSet
from imagefs.fetch.scheduler import Scheduler
from imagefs.fetch.sink import PageSink
from imagefs.fetch.sweep import sweep
from imagefs.fetch.trace import TouchTrace
from imagefs.fetch.transfer import Transfer
from imagefs.fetch.view import PageInfo
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.index import BlockRef, ChunkRef, IndexBlock, NeedBlock
from imagefs.image.native_files import NativeFile
from imagefs.image.streams import MEMORY
from imagefs.store.base import Store
from imagefs.store.location import open_store, parse_location
from imagefs.store.reader import Image, Wanted, expand, load_name, load_named

T = TypeVar("T")
SinkFactory = Callable[[Image], PageSink]

WINDOWS_KEPT = 8 << 20
"""Bytes of windows of the streams other than memory that are kept: the sink keeps memory only."""


class OpenedImage:
    """Implements :class:`imagefs.fetch.view.ImageView`. One event loop; made by :func:`open_image`."""

    def __init__(
        self,
        location: str,
        image: Image,
        store: Store,
        sink: PageSink,
        options: FetchOptions,
        published: PublishedSet | None = None,
    ) -> None:
        self._location = location
        self._image = image
        self._sink = sink
        self._options = options
        self._codec = Codec()
        self._geometry = image.metadata.geometry
        self._chunk_pages = image.manifest.chunk_pages
        self._window_size = image.manifest.window_size
        self._windows: LRUCache[tuple[str, int], bytes] = LRUCache(WINDOWS_KEPT, getsizeof=len)
        self._kinds = image.metadata.kinds
        self._neighbourhood = Neighbourhood(image.manifest.streams[MEMORY].windows(self._chunk_pages))
        self._pages = MemoryPages(self._geometry.pages, self._chunk_pages, sink)
        self.trace = TouchTrace(self._geometry.pages)
        self.foresight = Foresight(image, sink, self.trace, published)
        transfer = Transfer(store, sink, ChunkDecoder(self._chunk_pages), self._chunk_pages, self._geometry.pages)
        self.scheduler = Scheduler(transfer, self._landed, connections=options.connections, origin=store.origin)
        self.locator = Locator(
            image.manifest.streams, self._chunk_pages, image.metadata.parts, sink, self.scheduler, self._leaf_loaded
        )
        for page, data in image.metadata.pages:
            self._pages.keep(page, data)

    def __repr__(self) -> str:
        return f"<OpenedImage {self._location}: {self.scheduler!r}>"

    @property
    def name(self) -> str:
        return self._location

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def document(self) -> Mapping[str, Any]:
        return self._image.metadata.document

    @property
    def native_size(self) -> int:
        return self._image.metadata.checked.native_bytes

    @property
    def native_files(self) -> Sequence[NativeFile]:
        return self._image.metadata.checked.native_files

    @property
    def streams(self) -> Mapping[str, int]:
        return {name: stream.size for name, stream in self._image.manifest.streams.items()}

    @property
    def arrivals(self) -> ArrivalLog:
        return self._pages.arrivals

    def read_present(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes | None:
        length = min(length, self._image.manifest.streams[stream].size - offset)
        if length <= 0:
            return b""
        if stream == MEMORY:
            data = self._sink.read(offset, length)
            if data is not None:
                self._touched(offset, length, trace=touch, missed=False)
            return data
        pieces = [self._windows.get((stream, number)) for number in self._numbers(offset, length)]
        if None in pieces:
            return None
        return self._cut([piece for piece in pieces if piece is not None], offset, length)

    async def read(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes:
        data = self.read_present(stream, offset, length, touch=touch)
        if data is not None:
            return data
        length = min(length, self._image.manifest.streams[stream].size - offset)
        numbers = self._numbers(offset, length)
        with self._patience(f"{stream} at {offset:#x}"):
            if stream == MEMORY and not all(self.locator.knows(stream, number) for number in numbers):
                for number in numbers:
                    await self.locator.find(stream, number, Priority.TOUCH)
                # The leaf may have told that these pages are zero.
                data = self.read_present(stream, offset, length, touch=touch)
                if data is not None:
                    return data
            found = [await self._start(stream, number, missing=len(numbers) == 1) for number in numbers]
            # All flights first, then the waiting: a read of several windows takes one round trip.
            if stream == MEMORY:
                self.foresight.missed()
                self._touched(offset, length, trace=touch, missed=True)
            self.scheduler.dispatch()
            windows = [await each.wait() if isinstance(each, Flight) else each for each in found]
        return self._cut(windows, offset, length)

    async def page_info(self, page: int) -> PageInfo:
        kind = next((k.kind for k in self._kinds if k.first <= page < k.first + k.count), "ram")
        window, slot = divmod(page, self._chunk_pages)
        with self._patience(f"index of page {page}"):
            chunk = await self.locator.find(MEMORY, window, Priority.TOUCH)
        if chunk is None or not chunk.pages >> slot & 1:
            return PageInfo("zero", None, kind)
        here = self._sink.has(page, 1)
        return PageInfo("present" if here else "remote", f"blake3:{chunk.digest.hex()}", kind)

    def present_bitmap(self, offset: int, length: int) -> bytes:
        return self._sink.bitmap(offset, length)

    def status(self) -> dict[str, Any]:
        link, now = self.scheduler.link, trio.current_time()
        return {
            "image": self._image.digest.hex(),
            "source": self._location,
            "memory": {"pages": self._geometry.pages, "page_size": PAGE_SIZE, "complete": self.arrivals.complete},
            "stored_bytes": self._image.manifest.stored_bytes,
            "cache": self._sink.statistics(),
            "fetch": {
                **asdict(self.scheduler.counters),
                "store_answers": not self.scheduler.in_outage,
                "queued": {p.name.lower(): self.scheduler.table.queued(p) for p in Priority},
                "in_flight": [request.statistics(now) for request in self.scheduler.table.requests],
                "prefetch": self._options.prefetch,
                "connections": self._options.connections,
                "round_trip_seconds": link.round_trip or None,
                "bytes_per_second": link.bandwidth or None,
                "window_bytes": link.window(),
                "background_request_bytes": link.request_size(),
            },
            "working_set": self.foresight.statistics(),
            "touches": len(self.trace),
        }

    async def run(self) -> None:
        """Fetch until cancelled: workers, and what is to be fetched before anyone asks."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.scheduler.run, name="scheduler")
            nursery.start_soon(self.foresight.record, name="recording")
            if self._options.prefetch != "none":
                nursery.start_soon(self._fetch_ahead, name="ahead")

    async def _fetch_ahead(self) -> None:
        """The working set, then what is likely and the sweep, if they are wanted."""
        await self.foresight.fetch(self, self.scheduler)
        if self._options.prefetch == "all":
            await self.foresight.fetch_likely(self, self.scheduler)
            await sweep(self._image.manifest.streams[MEMORY], self._chunk_pages, self, self.scheduler)
            self._pages.check_complete()

    # --- reading

    @contextmanager
    def _patience(self, what: str) -> Iterator[None]:
        """For as long as the user wants to wait; TimedOutError after that."""
        timeout = self._options.timeout
        if timeout is None:
            yield
            return
        with trio.move_on_after(timeout) as scope:
            yield
        if scope.cancelled_caught:
            raise TimedOutError(f"{self._location}: {what}: not here after {timeout} s")

    def _numbers(self, offset: int, length: int) -> range:
        return range(offset // self._window_size, (offset + length - 1) // self._window_size + 1)

    def _cut(self, windows: Sequence[bytes | memoryview], offset: int, length: int) -> bytes:
        start = offset % self._window_size
        if len(windows) == 1:
            return bytes(windows[0][start : start + length])
        return b"".join(windows)[start : start + length]

    async def _start(self, stream: str, number: int, *, missing: bool) -> bytes | Flight:
        """The window's bytes if they are here, otherwise its flight. ``missing``: they are known not to be."""
        here = None if missing else self._window_here(stream, number)
        if here is not None:
            return here
        chunk = await self.locator.find(stream, number, Priority.TOUCH)
        if chunk is None:
            if stream == MEMORY:
                self._pages.note_zero_windows(number, 1)
            return bytes(self._window_size)
        what = f"{stream} window {number}"
        payload = self._image.metadata.parts.get(chunk.digest)
        if payload is not None:
            data = expand(self._codec, payload, Wanted(what, chunk), self._chunk_pages, key="metadata", origin="")
            self._keep_window(stream, number, data)
            return data
        return self.scheduler.want((stream, number), what, chunk, Priority.TOUCH)

    def _window_here(self, stream: str, number: int) -> bytes | None:
        if stream == MEMORY:
            offset = number * self._window_size
            data = self._sink.read(offset, min(self._window_size, self._geometry.size - offset))
            return None if data is None else data + bytes(self._window_size - len(data))
        return self._windows.get((stream, number))

    def _touched(self, offset: int, length: int, *, trace: bool, missed: bool) -> None:
        numbers = self._numbers(offset, length)
        if trace:
            first = offset // PAGE_SIZE
            self.trace.touch(first, (offset + length - 1) // PAGE_SIZE - first + 1)
        # What is recorded is a better guess than what lies beside, unless this is a tool's readahead.
        if self._options.prefetch == "all" and (length > self._window_size or not self.foresight.knows):
            near = self._near() if missed else 0
            for number in self._neighbourhood.touched(numbers[0], numbers[-1], missed=missed, near=near):
                self._want_if_known(number)

    def _near(self) -> int:
        link = self.scheduler.link
        return near_windows(link.bandwidth, link.round_trip, self._window_size)

    def _want_if_known(self, number: int) -> None:
        """A neighbour, unless finding it would take a request of its own."""
        try:
            chunk = None if self.is_here(number) else self.locator.find_here(MEMORY, number)
        except (NeedBlock, CorruptObjectError):
            return
        if chunk is not None:
            self.want_window(number, chunk, Priority.NEIGHBOUR)

    # --- what arrives

    def _landed(self, flight: Flight, result: memoryview | IndexBlock) -> None:
        if isinstance(result, IndexBlock):
            assert isinstance(flight.ref, BlockRef)
            self.locator.keep(flight.ref, result)
            return
        stream, number = flight.key
        if stream == MEMORY:
            self._pages.window_landed(number)
            if flight.priority == Priority.LIKELY:
                first = number * self._chunk_pages
                self.trace.guessed(first, min(self._chunk_pages, self._geometry.pages - first))
        else:
            self._windows[stream, number] = bytes(result)

    def _keep_window(self, stream: str, number: int, data: bytes) -> None:
        if stream == MEMORY:
            self._pages.keep(number * self._chunk_pages, data)
        else:
            self._windows[stream, number] = data

    def _leaf_loaded(self, stream: str, first: int, leaf: IndexBlock) -> None:
        if stream == MEMORY:
            self._pages.note_leaf(first, leaf)

    def block_landed(self, ref: BlockRef, block: IndexBlock, window: int) -> None:
        self.locator.keep(ref, block)
        with suppress(NeedBlock, CorruptObjectError):
            self.locator.find_here(MEMORY, window)

    def pages_landed(self, first: int, count: int) -> None:
        self._pages.pages_landed(first, count)

    # --- foresight and the sweep

    async def find_chunk(self, window: int, priority: Priority) -> ChunkRef | None:
        return await self.locator.find(MEMORY, window, priority)

    @property
    def sink_is_full(self) -> bool:
        return self._sink.full

    async def load_block(self, ref: BlockRef, priority: Priority) -> IndexBlock:
        return await self.locator.load_block(ref, priority)

    def is_here(self, window: int) -> bool:
        return self._pages.window_here(window)

    def want_window(self, window: int, chunk: ChunkRef, priority: Priority) -> None:
        self.scheduler.want((MEMORY, window), f"{MEMORY} window {window}", chunk, priority)

    def note_zero_windows(self, first: int, count: int) -> None:
        self._pages.note_zero_windows(first, count)

    def note_leaf(self, first: int, leaf: IndexBlock) -> None:
        self._pages.note_leaf(first, leaf)


@asynccontextmanager
async def open_image(location: str, options: FetchOptions, make_sink: SinkFactory) -> AsyncIterator[OpenedImage]:
    """Open ``STORE/NAME`` and fetch in the background until the block is left.

    Raises StoreError where the image cannot be had: a mount that cannot start says so and does not wait.
    """
    where = parse_location(location)
    # One more, for the working set.
    store = open_store(where, connections=options.connections + 1)
    sink: PageSink | None = None
    try:
        async with trio.open_nursery() as nursery:
            pointer = await _in_thread(load_name, store, where.name)
            published = None
            if options.prefetch != "none":
                published = PublishedSet(store, pointer.manifest)
                nursery.start_soon(published.begin, name="working set")
            image = await _in_thread(load_named, store, where.name, pointer, Codec())
            sink = await trio.to_thread.run_sync(make_sink, image)
            opened = OpenedImage(str(where), image, store, sink, options, published)
            nursery.start_soon(opened.run, name="fetch")
            try:
                yield opened
            finally:
                opened.foresight.save()
            nursery.cancel_scope.cancel()
    finally:
        # Not before the tasks have ended: until then results land.
        if sink is not None:
            sink.close()
        store.close()


async def _in_thread(call: Callable[..., T], *args: object) -> T:
    return await trio.to_thread.run_sync(partial(call, *args), abandon_on_cancel=True)
