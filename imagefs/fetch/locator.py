"""Where a window's chunk is: the index, its blocks loaded as they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cachetools import LRUCache

from imagefs.errors import CorruptObjectError
from imagefs.fetch.flights import INDEX, Priority
from imagefs.fetch.scheduler import Scheduler
from imagefs.fetch.sink import PageSink
from imagefs.image.index import FANOUT, BlockRef, ChunkRef, IndexBlock, NeedBlock, StreamRef, find_leaf, parse_child

BLOCKS_KEPT = 512
"""Index blocks in memory, some 12 MiB: 16 GiB of memory without parsing a block twice."""


class Locator:
    """Index lookups of one image. One event loop."""

    def __init__(
        self,
        streams: Mapping[str, StreamRef],
        chunk_pages: int,
        parts: Mapping[bytes, bytes],
        sink: PageSink,
        scheduler: Scheduler,
        leaf_loaded: Callable[[str, int, IndexBlock], None],
    ) -> None:
        """``parts`` are payloads that came with the metadata. ``leaf_loaded`` is told stream, first window and leaf."""
        self._streams = streams
        self._chunk_pages = chunk_pages
        self._parts = parts
        self._sink = sink
        self._scheduler = scheduler
        self._leaf_loaded = leaf_loaded
        self._blocks: LRUCache[bytes, IndexBlock] = LRUCache(BLOCKS_KEPT)
        self._noted: set[tuple[str, int]] = set()

    def knows(self, stream: str, window: int) -> bool:
        """Whether a leaf that covers the window was here before: then its zero pages are."""
        return (stream, window // FANOUT) in self._noted

    def find_here(self, stream: str, window: int) -> ChunkRef | None:
        """The chunk of a window, None where it is all zero. Raises NeedBlock where a block is not here."""
        leaf = find_leaf(self._streams[stream], window, self._block_here)
        if leaf is None:
            return None
        key = stream, window // FANOUT
        if key not in self._noted:
            self._noted.add(key)
            self._leaf_loaded(stream, key[1] * FANOUT, leaf)
        return leaf.chunk(window % FANOUT)

    async def find(self, stream: str, window: int, priority: Priority) -> ChunkRef | None:
        """The same, waiting for blocks. Raises StoreError where one cannot be had."""
        while True:
            try:
                return self.find_here(stream, window)
            except NeedBlock as need:
                await self.load_block(need.ref, priority)

    async def load_block(self, ref: BlockRef, priority: Priority) -> IndexBlock:
        """A block, verified, from wherever it is."""
        try:
            return self._block_here(ref)
        except NeedBlock:
            what = f"index block of level {ref.level}"
            flight = self._scheduler.want((INDEX, ref.digest), what, ref, priority)
            self._scheduler.dispatch()
            block: IndexBlock = await flight.wait()
            return block

    def keep(self, ref: BlockRef, block: IndexBlock) -> None:
        """A block has landed."""
        self._blocks[ref.digest] = block

    def _block_here(self, ref: BlockRef) -> IndexBlock:
        block = self._blocks.get(ref.digest)
        # An index that does harm may name a block where fewer windows are than where it was parsed first.
        if block is not None and block.windows == ref.windows:
            return block
        for origin, data in (("metadata", self._parts.get(ref.digest)), ("cache", self._sink.block(ref.digest))):
            if data is not None:
                try:
                    block = parse_child(data, ref, self._chunk_pages, key=ref.digest.hex(), origin=origin)
                except CorruptObjectError:
                    continue
                self._blocks[ref.digest] = block
                return block
        raise NeedBlock(ref)
