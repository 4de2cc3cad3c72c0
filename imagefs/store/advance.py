"""What travels with the metadata in advance, because whoever resumes the VM wants it first.

In this order, as far as there is room: index blocks above the leaves, leaves and chunks of the small streams (device
state and config), essential pages (the guest's page tables, from the root down), leaves of memory, leaves of the
native file's template. Page tables go before leaves: a guest's every touch begins with them, while a leaf saves the
one round trip at the first touch of its 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from imagefs import native
from imagefs.image.capture import KERNEL_TEXT, PAGE_TABLE_KINDS, ByteSource, PageKind
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.metadata import MAX_RUN_PAGES, TARGET_SIZE
from imagefs.image.streams import CONFIG_PREFIX, MEMORY, STATE

ADVANCE_LIMIT = 384 << 10
"""Chunks of state and config travel with the metadata up to so many bytes."""

_SMALL, _MEMORY, _NATIVE = range(3)


class Advance:
    """Collects index blocks and chunks while an image is written; bounded by what the metadata object may have."""

    def __init__(self) -> None:
        self._chunks: list[tuple[bytes, bytes]] = []
        self._room = ADVANCE_LIMIT
        self._blocks: list[tuple[tuple[int, int, int], bytes, bytes]] = []
        self._blocks_size = 0
        self._count = 0

    def add_chunk(self, name: bytes, payload: bytes) -> None:
        if len(payload) <= self._room:
            self._chunks.append((name, payload))
            self._room -= len(payload)

    def add_block(self, stream: str, level: int, name: bytes, data: bytes) -> None:
        """Keep a block while there is room for it: high levels first, then small streams, then low memory."""
        self._count += 1
        rank = _SMALL if is_small(stream) else _MEMORY if stream == MEMORY else _NATIVE
        self._blocks.append(((-level, rank, self._count), name, data))
        self._blocks_size += len(data)
        while self._blocks_size > TARGET_SIZE:
            least = max(self._blocks)
            self._blocks.remove(least)
            self._blocks_size -= len(least[2])

    def first(self) -> Iterator[tuple[bytes, bytes]]:
        """What goes before the essential pages."""
        for (level, rank, _), name, data in sorted(self._blocks):
            if level < 0 or rank == _SMALL:
                yield name, data
        yield from self._chunks

    def rest(self) -> Iterator[tuple[bytes, bytes]]:
        """What goes behind them."""
        for (level, rank, _), name, data in sorted(self._blocks):
            if level == 0 and rank != _SMALL:
                yield name, data


def is_small(stream: str) -> bool:
    """Whether a stream's chunks travel with the metadata."""
    return stream == STATE or stream.startswith(CONFIG_PREFIX)


def essential_pages(memory: ByteSource, kinds: Iterable[PageKind]) -> Iterator[tuple[int, bytes]]:
    """Page tables in runs of neighbours, the root's level first, then by page number. Frames of zeros are left out: the
    index knows them. Kernel text would fill the object alone."""
    tables = (kind for kind in kinds if kind.kind != KERNEL_TEXT)
    for kind in sorted(tables, key=lambda kind: (_rank(kind.kind), kind.first)):
        for first in range(kind.first, kind.first + kind.count, MAX_RUN_PAGES):
            count = min(MAX_RUN_PAGES, kind.first + kind.count - first)
            data = memory.read_at(first * PAGE_SIZE, count * PAGE_SIZE)
            for begin, end in _runs(native.scan(data), len(data) // PAGE_SIZE):
                yield first + begin, bytes(data[begin * PAGE_SIZE : end * PAGE_SIZE])


def _rank(kind: str) -> int:
    return PAGE_TABLE_KINDS.index(kind) if kind in PAGE_TABLE_KINDS else len(PAGE_TABLE_KINDS)


def _runs(bitmap: bytes, count: int) -> Iterator[tuple[int, int]]:
    """``[begin, end)`` of each run of set bits."""
    begin = None
    for number in range(count + 1):
        is_set = number < count and bitmap[number // 8] >> number % 8 & 1
        if is_set and begin is None:
            begin = number
        elif not is_set and begin is not None:
            yield begin, number
            begin = None
