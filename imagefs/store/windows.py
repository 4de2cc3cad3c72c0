"""Cutting a stream into windows: scan for zero pages, digest, compress, on all cores and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from imagefs import native
from imagefs.image.capture import ByteSource
from imagefs.image.chunks import Codec, content_digest
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import PayloadRef

BATCH_SIZE = 1 << 20
"""What a worker takes at a time: large enough that handing it over costs nothing beside the work."""
BATCHES_AHEAD = 6
"""Batches read but not yet taken by the consumer: bounds memory at some 12 MiB."""


@dataclass(frozen=True, slots=True)
class Window:
    """A window with content: its digest, and either where the store has the chunk already, or its payload."""

    number: int
    pages: int
    """Bit i is set where page i of the window is not zero."""
    digest: bytes
    known: PayloadRef | None
    payload: bytes


def encode_windows(
    source: ByteSource,
    chunk_pages: int,
    codec: Codec,
    known: Callable[[Sequence[bytes]], Mapping[bytes, PayloadRef]],
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> Iterator[Window]:
    """The windows of ``source`` that are not all zero, ascending.

    ``known`` is asked, from the pool's threads, before contents are compressed. ``progress`` is told the offset up to
    which the source is done. Holes of the source are skipped without being read.
    """
    window_size = chunk_pages * PAGE_SIZE
    # Whole windows: a batch that ended inside of one would make two of it.
    batch_size = max(1, BATCH_SIZE // window_size) * window_size

    def encode(offset: int) -> list[Window]:
        data = memoryview(source.read_at(offset, batch_size))
        if len(data) % PAGE_SIZE:
            data = memoryview(bytes(data) + bytes(-len(data) % PAGE_SIZE))
        first = offset // window_size
        bitmap = native.scan(data)
        found = []
        for at in range(0, len(data), window_size):
            window = data[at : at + window_size]
            bits = bitmap[at // PAGE_SIZE // 8 : (at + window_size) // PAGE_SIZE // 8]
            pages = int.from_bytes(bits, "little")
            if pages:
                full = pages.bit_count() * PAGE_SIZE == len(window)
                content = window if full else native.compact(window, bits)
                found.append((first + at // window_size, pages, content_digest(content), content))
        if not found:
            return []
        refs = known([name for _, _, name, _ in found])
        return [
            Window(number, pages, name, refs.get(name), b"" if name in refs else codec.compress(content))
            for number, pages, name, content in found
        ]

    pending: deque[tuple[int, Future[list[Window]]]] = deque()
    offset = 0
    while True:
        while offset < source.size and len(pending) < BATCHES_AHEAD:
            offset = source.next_data(offset) // batch_size * batch_size
            if offset >= source.size:
                break
            pending.append((offset, pool.submit(encode, offset)))
            offset += batch_size
        if not pending:
            progress(source.size)
            return
        begun, future = pending.popleft()
        progress(begun)
        yield from future.result()
