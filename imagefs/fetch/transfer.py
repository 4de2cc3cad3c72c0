"""The blocking half of a request: runs in a worker thread, returns verified results only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imagefs import native
from imagefs.decode import ChunkDecoder
from imagefs.errors import CorruptObjectError
from imagefs.fetch.flights import Flight
from imagefs.fetch.scheduler import Brought
from imagefs.fetch.sink import PageSink
from imagefs.image.chunks import content_digest
from imagefs.image.index import BlockRef, ChunkRef, IndexBlock
from imagefs.image.streams import MEMORY
from imagefs.store.base import Store
from imagefs.store.reader import Wanted, get_block, get_windows
from imagefs.store.timing import timed

Result = bytes | memoryview | IndexBlock | CorruptObjectError


@dataclass(frozen=True, slots=True)
class Transfer:
    """Fetches flights of one request; see :data:`imagefs.fetch.scheduler.Transfer`. Any thread may call it."""

    store: Store
    sink: PageSink
    decoder: ChunkDecoder
    chunk_pages: int
    memory_pages: int

    def __call__(self, flights: Sequence[Flight]) -> Brought:
        first = flights[0].ref
        if isinstance(first, BlockRef):
            with timed() as timing:
                block, data = get_block(self.store, first, self.chunk_pages)
            self.sink.put_block(first.digest, data)
            return Brought([block], timing.latency, timing.seconds)
        kept = [self._verified_again(flight) for flight in flights]
        missing = [flight for flight, data in zip(flights, kept, strict=True) if data is None]
        fetched: Iterator[Result] = iter(())
        latency = None
        seconds = 0.0
        if missing:
            with timed() as timing:
                fetched = iter(self._fetch(missing))
            latency, seconds = timing.latency, timing.seconds
        results: list[Result] = [next(fetched) if data is None else data for data in kept]
        for flight, result in zip(flights, results, strict=True):
            stream, window = flight.key
            if stream == MEMORY and isinstance(result, bytes | memoryview):
                self.sink.put(window * self.chunk_pages, result)
        return Brought(results, latency, seconds)

    def _fetch(self, flights: Sequence[Flight]) -> Sequence[Result]:
        wanted = [Wanted(f.what, f.ref) for f in flights if isinstance(f.ref, ChunkRef)]
        return get_windows(self.store, wanted, self.decoder)

    def _verified_again(self, flight: Flight) -> bytes | None:
        """A window that was in the cache when the host went down, if it survived that."""
        stream, window = flight.key
        if stream != MEMORY or not isinstance(flight.ref, ChunkRef):
            return None
        first = window * self.chunk_pages
        data = self.sink.distrusted(first, min(self.chunk_pages, self.memory_pages - first))
        if data is None:
            return None
        data += bytes(self.chunk_pages * native.PAGE_SIZE - len(data))
        bitmap = native.scan(data)
        if int.from_bytes(bitmap, "little") != flight.ref.pages:
            return None
        return data if content_digest(native.compact(data, bitmap)) == flight.ref.digest else None
