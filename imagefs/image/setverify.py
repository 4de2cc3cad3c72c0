"""Verifying the records of a working set: each index block against its parent, each page against its leaf.

What has passed is as good as if it had come from a pack: the chain of digests from the manifest on is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from imagefs import native
from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import DIGEST_SIZE, Codec, content_digest, digest
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import (
    FANOUT,
    MAX_BLOCK_SIZE,
    BlockRef,
    ChunkRef,
    IndexBlock,
    StreamRef,
    find_leaf,
    parse_child,
    span,
)
from imagefs.image.setobject import SetBlock, SetPages, SetWindow


@dataclass(frozen=True, slots=True)
class PageRun:
    """Verified pages of ``memory`` from page number ``first`` on."""

    first: int
    data: bytes

    @property
    def count(self) -> int:
        return len(self.data) // PAGE_SIZE


class SetVerifier:
    """Follows one object from its first record on. Holds its index blocks: 12 MiB at most. One thread at a time.

    All methods raise CorruptObjectError.
    """

    def __init__(
        self, memory: StreamRef, chunk_pages: int, parts: Mapping[bytes, bytes], codec: Codec, *, key: str, origin: str
    ) -> None:
        """``parts`` are the payloads that came with the metadata object."""
        self._memory = memory
        self._chunk_pages = chunk_pages
        self._parts = parts
        self._codec = codec
        self._key, self._origin = key, origin
        self._blocks: dict[bytes, IndexBlock] = {}
        self._leaves: dict[int, IndexBlock | None] = {}
        self._windows = memory.windows(chunk_pages)

    def block(self, record: SetBlock) -> tuple[BlockRef, IndexBlock]:
        """The block, and the reference that it fulfils."""
        what = f"index block of level {record.level} at window {record.window}"
        ref = self._memory.root
        while ref is not None and ref.level > record.level and record.window < self._windows:
            ref = self._block(ref).child(record.window // span(ref.level - 1) % FANOUT)
        if ref is None or ref.level != record.level or record.window >= self._windows:
            raise self._bad(f"{what}: the image has none there")
        try:
            data = self._codec.decompress_bounded(record.frame, MAX_BLOCK_SIZE)
        except ValueError as error:
            raise self._bad(f"{what}: {error}") from error
        block = parse_child(data, ref, self._chunk_pages, key=self._key, origin=self._origin)
        self._blocks[ref.digest] = block
        return ref, block

    def pages(self, record: SetPages) -> list[PageRun]:
        """The pages of a record, in its order; those of a whole window as one run, its zero pages included."""
        try:
            content = memoryview(self._codec.decompress(record.frame, record.pages * PAGE_SIZE))
        except ValueError as error:
            raise self._bad(f"pages from window {record.windows[0].window} on: {error}") from error
        runs: list[PageRun] = []
        at = 0
        for window in record.windows:
            end = at + window.pages * PAGE_SIZE
            runs += self._runs(window, content[at:end])
            at = end
        return runs

    def _runs(self, window: SetWindow, content: memoryview) -> Iterator[PageRun]:
        chunk = self._chunk(window.window)
        if window.carried & ~chunk.pages or window.pages + len(window.siblings) // DIGEST_SIZE != chunk.content_pages:
            raise self._bad(f"window {window.window}: not the pages that the index has")
        if _digest(window, chunk.pages, content) != chunk.digest:
            raise self._bad(f"window {window.window}: digest is not {chunk.digest.hex()}")
        first = window.window * self._chunk_pages
        if window.carried == chunk.pages and window.pages < self._chunk_pages:
            bits = chunk.pages.to_bytes(self._chunk_pages // 8, "little")
            yield PageRun(first, native.expand(content, bits, self._chunk_pages))
            return
        at = 0
        for page, count in bit_runs(window.carried):
            yield PageRun(first + page, bytes(content[at : at + count * PAGE_SIZE]))
            at += count * PAGE_SIZE

    def _chunk(self, window: int) -> ChunkRef:
        if window >= self._windows:
            raise self._bad(f"window {window}: beyond the memory")
        number = window // FANOUT
        if number not in self._leaves:
            self._leaves[number] = find_leaf(self._memory, window, self._block)
        leaf = self._leaves[number]
        chunk = None if leaf is None else leaf.chunk(window % FANOUT)
        if chunk is None or chunk.pages >> self._chunk_pages:
            raise self._bad(f"window {window}: all zero by the index")
        return chunk

    def _block(self, ref: BlockRef) -> IndexBlock:
        block = self._blocks.get(ref.digest)
        if block is None or block.windows != ref.windows:
            data = self._parts.get(ref.digest)
            if data is None:
                raise self._bad(f"a page comes before its index block of level {ref.level}")
            block = parse_child(data, ref, self._chunk_pages, key=self._key, origin=self._origin)
            self._blocks[ref.digest] = block
        return block

    def _bad(self, reason: str) -> CorruptObjectError:
        return CorruptObjectError(f"working set: {reason}", key=self._key, origin=self._origin)


def _digest(window: SetWindow, pages: int, content: memoryview) -> bytes:
    """The digest of the chunk with these pages, some from the content and some by their digests."""
    if not window.siblings:
        return content_digest(content)
    carried, siblings = native.page_digests(content), window.siblings
    digests = []
    at = sibling = 0
    while pages:
        lowest = pages & -pages
        if window.carried & lowest:
            digests.append(carried[at : at + DIGEST_SIZE])
            at += DIGEST_SIZE
        else:
            digests.append(siblings[sibling : sibling + DIGEST_SIZE])
            sibling += DIGEST_SIZE
        pages ^= lowest
    return digest(b"".join(digests))


def bit_runs(bits: int) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of each run of set bits."""
    while bits:
        first = (bits & -bits).bit_length() - 1
        rest = ~(bits >> first)
        count = (rest & -rest).bit_length() - 1
        yield first, count
        bits &= -1 << (first + count)
