"""The background sweep: everything that nobody has asked for yet, in the order in which it is stored."""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from imagefs.errors import StoreError
from imagefs.fetch.flights import Priority
from imagefs.fetch.scheduler import Scheduler
from imagefs.image.index import BlockRef, ChunkRef, IndexBlock, StreamRef, span

log = logging.getLogger(__name__)

AHEAD = 1024
"""Chunks queued at a time: what fills 1 Gbit/s over 100 ms, twice, and a mebibyte of memory."""
BATCH = 32
"""Chunks queued without letting others run: half a millisecond."""

FULL_SECONDS = 10.0
"""Between the windows with which a sweep tries whether there is room on the disk again. Pulled out of the air."""


class SweepTarget(Protocol):
    """What the sweep needs of the image that it completes."""

    async def load_block(self, ref: BlockRef, priority: Priority) -> IndexBlock: ...

    def is_here(self, window: int) -> bool: ...

    def want_window(self, window: int, chunk: ChunkRef, priority: Priority) -> None: ...

    @property
    def sink_is_full(self) -> bool:
        """Whether what arrives cannot be kept at present: then there is no use in fetching ahead."""

    def note_leaf(self, first: int, leaf: IndexBlock) -> None:
        """A leaf that covers windows from ``first`` on: the zeros that it knows of need no fetching."""

    def note_zero_windows(self, first: int, count: int) -> None:
        """Windows that are all zero, by the index."""


async def sweep(stream: StreamRef, chunk_pages: int, target: SweepTarget, scheduler: Scheduler) -> None:
    """Queue every window of ``stream`` that is not here, and note those that are zero. Returns when all are queued.

    Cancelling it discards nothing but its place. A window that cannot be had is left to whoever touches it.
    """

    async def visit(ref: BlockRef, first: int, count: int) -> None:
        """The ``count`` windows from ``first`` on, which lie below ``ref``."""
        try:
            block = await target.load_block(ref, Priority.SWEEP)
            children = [(slot, block.child(slot) if ref.level else block.chunk(slot)) for slot in block.occupied()]
        except StoreError as error:
            # What lies below stays remote: it must not be taken for zero. Whoever touches it is told again.
            log.warning("not swept: windows %d to %d: %s", first, first + count - 1, error)
            return
        step = span(ref.level - 1) if ref.level else 1
        if ref.level:
            for slot, empty in block.gaps():
                at = first + slot * step
                target.note_zero_windows(at, min(empty * step, first + count - at))
        else:
            target.note_leaf(first, block)
        for number, (slot, child) in enumerate(children):
            at = first + slot * step
            if isinstance(child, BlockRef):
                await visit(child, at, min(step, first + count - at))
            elif child is not None:
                if number % BATCH == 0:
                    await turn()
                if not target.is_here(at):
                    if target.sink_is_full:
                        await trio.sleep(FULL_SECONDS)
                    target.want_window(at, child, Priority.SWEEP)

    async def turn() -> None:
        await trio.lowlevel.checkpoint()
        await scheduler.wait_for_slack(Priority.SWEEP, AHEAD)

    windows = stream.windows(chunk_pages)
    if stream.root is None:
        target.note_zero_windows(0, windows)
    else:
        await visit(stream.root, 0, windows)
