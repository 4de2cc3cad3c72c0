"""Chunks: what is stored for one window of a stream.

A window's *content* is its non-zero pages, end to end; which pages those are is in the index, so two windows
with the same content but different holes share one chunk. A chunk is stored as one zstd frame of its content.

Its digest is BLAKE3(BLAKE3(page 0) ‖ BLAKE3(page 1) ‖ …) over the content's pages: a page can so be verified
with the list of its siblings' digests alone, without their bytes. That costs 0.5 ns a byte instead of 0.16 for
one digest over the whole content, and lets a working set carry single pages.
"""

from __future__ import annotations

import threading

import zstandard
from blake3 import blake3

from imagefs import native
from imagefs.errors import CorruptObjectError
from imagefs.image.geometry import PAGE_SIZE

DIGEST_SIZE = 32
DEFAULT_LEVEL = 3
MAX_CHUNK_PAGES = 1024
"""4 MiB: bounds what a hostile index can make a reader allocate for one chunk."""

Buffer = bytes | bytearray | memoryview


def digest(data: Buffer) -> bytes:
    """BLAKE3 of plain bytes: objects, index blocks, single pages. 32 bytes."""
    return blake3(data).digest()


def content_digest(content: Buffer) -> bytes:
    """The digest of a chunk with this content (whole pages)."""
    return digest(native.page_digests(content))


class Codec:
    """zstd contexts, one pair a thread: they are costly to make and must not be shared between threads."""

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self.level = level
        self._local = threading.local()

    def compress(self, content: Buffer) -> bytes:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self.level, write_content_size=True, write_checksum=False)
            self._local.compressor = compressor
        result: bytes = compressor.compress(content)
        return result

    def decompress(self, payload: Buffer, size: int) -> bytes:
        """Exactly ``size`` bytes; ValueError for anything else. Never allocates more than ``size``."""
        try:
            # The frame's own header is not yet verified: it must not decide how much is allocated.
            if zstandard.get_frame_parameters(payload).content_size != size:
                raise ValueError("the frame's content size is not the index's")
            decompressor = getattr(self._local, "decompressor", None)
            if decompressor is None:
                decompressor = zstandard.ZstdDecompressor()
                self._local.decompressor = decompressor
            content: bytes = decompressor.decompress(payload, max_output_size=size)
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from error
        if len(content) != size:
            raise ValueError(f"{len(content)} bytes instead of {size}")
        return content

    def decompress_bounded(self, payload: Buffer, limit: int) -> bytes:
        """At most ``limit`` bytes, as many as the frame says; ValueError for more or for a frame that is none."""
        try:
            size = zstandard.get_frame_parameters(payload).content_size
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from error
        if size > limit:
            raise ValueError(f"a frame of {size} bytes where {limit} are allowed")
        return self.decompress(payload, size)


def decode_chunk(codec: Codec, payload: Buffer, pages: int, want: bytes, *, what: str, key: str, origin: str) -> bytes:
    """The verified content of a chunk of ``pages`` pages. CorruptObjectError names ``what`` it was."""
    try:
        content = codec.decompress(payload, pages * PAGE_SIZE)
    except ValueError as error:
        raise CorruptObjectError(f"{what}: {error}", key=key, origin=origin) from error
    if content_digest(content) != want:
        raise CorruptObjectError(f"{what}: digest is not {want.hex()}", key=key, origin=origin)
    return content
