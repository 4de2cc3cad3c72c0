"""Chunks into verified windows, natively and many at a time (``native/chunks.h``). Releases the GIL.

One chunk at a time by way of ``zstandard`` and ``blake3`` costs 160 µs a window of 64 KiB, of which a third holds the
GIL, sixteen digests among it.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagefs._native import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK = struct.Struct("@QQ32sB7x")
_WRONG = 48
_scratch = ffi.new_allocator(should_clear_after_alloc=False)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as it lies in what was fetched."""

    offset: int
    size: int
    """Bytes of its payload."""
    digest: bytes
    """32 bytes, as in the index."""
    pages: int
    """Bit i is set where page i of the window is in it; not zero."""


class ChunkDecoder:
    """For windows of ``window_pages`` pages (a multiple of 8). Any thread may call it."""

    def __init__(self, window_pages: int) -> None:
        assert _CHUNK.size == ffi.sizeof("struct imagefs_chunk")
        self.window_pages = window_pages
        self._size = window_pages * lib.IMAGEFS_PAGE_SIZE
        self._local = threading.local()

    def decode(self, data: Buffer, chunks: Sequence[EncodedChunk]) -> list[memoryview | None]:
        """Each chunk's whole window, zero pages included; None where the payload is not what its digest says.

        ValueError for a chunk that is not within ``data``, or whose bitmap no window has.
        """
        source = ffi.from_buffer("uint8_t[]", data)
        table, bitmaps = bytearray(), bytearray()
        for chunk in chunks:
            if chunk.offset < 0 or chunk.size < 0 or chunk.offset + chunk.size > len(source):
                raise ValueError(f"{chunk.size} bytes at {chunk.offset} of {len(source)}")
            if not 0 < chunk.pages < 1 << self.window_pages:
                raise ValueError(f"page bitmap {chunk.pages:#x} of a window of {self.window_pages} pages")
            table += _CHUNK.pack(chunk.offset, chunk.size, chunk.digest, 1)
            bitmaps += chunk.pages.to_bytes(self.window_pages // 8, "little")
        entries = ffi.from_buffer("struct imagefs_chunk[]", table, require_writable=True)
        out = _scratch("uint8_t[]", self._size * len(chunks))
        lib.imagefs_decode(self._decoder(), source, entries, len(chunks), ffi.from_buffer("uint8_t[]", bitmaps), out)
        windows = memoryview(ffi.buffer(out)).toreadonly()
        return [
            None if table[at * _CHUNK.size + _WRONG] else windows[at * self._size : (at + 1) * self._size]
            for at in range(len(chunks))
        ]

    def _decoder(self) -> Any:
        """This thread's own."""
        decoder = getattr(self._local, "decoder", None)
        if decoder is None:
            decoder = lib.imagefs_decoder_new(self.window_pages)
            if decoder == ffi.NULL:
                raise MemoryError
            decoder = self._local.decoder = ffi.gc(decoder, lib.imagefs_decoder_free)
        return decoder
