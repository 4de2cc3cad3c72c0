"""The RAM section of a QEMU mapped-ram file (QEMU 9.0 on): pages at fixed offsets, and a bitmap of those that count.

In the block table of the section (qemu_blocks.py), big-endian but for the bitmap, each block goes on with what
QEMU's docs/devel/migration/mapped-ram.rst and migration/ram.c (MappedRamHeader) describe:

| bytes | field         | meaning                                                                            |
|------:|---------------|------------------------------------------------------------------------------------|
|     4 | version       | 1                                                                                  |
|     8 | page size     | 4096                                                                               |
|     8 | bitmap offset | in the file: of one bit a page, little-endian, whole words of 8 bytes              |
|     8 | pages offset  | in the file, a multiple of 1 MiB: of the block's pages, as many bytes as the block |

The next block's entry follows behind the pages. A page without its bit is zero, whatever bytes of it are in the file: a
page that became zero later only loses its bit. With multifd the file has the same form. Offsets count from the start of
the file also where the stream begins in its middle (libvirt's sparse save images).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from imagefs.formats.base import Workspace
from imagefs.formats.qemu_blocks import Block, BlockTable, read_block_table
from imagefs.formats.qemu_state import StateWriter, page_record
from imagefs.formats.spool import Spool
from imagefs.formats.stream_cursor import BUFFER_SIZE, StreamCursor
from imagefs.formats.stream_pages import MainMemory
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import TemplateBuilder

_VERSION = 1
_PIECE_PAGES = 512
"""Pages that are looked at together: 2 MiB, 64 bytes of the bitmap."""
_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_PIECE = bytes(_PIECE_PAGES * PAGE_SIZE)
_RUNS = re.compile(rb"\x00+|\x01+")
_BITS = tuple(bytes(value >> bit & 1 for bit in range(8)) for value in range(256))


class MappedRamReader:
    """Reads the blocks of the section's first part; parameters as :class:`~imagefs.formats.qemu_ram.RamReader`."""

    def __init__(
        self,
        cursor: StreamCursor,
        builder: TemplateBuilder,
        state: StateWriter,
        workspace: Workspace,
        keep: Callable[[int], MainMemory],
    ) -> None:
        self._cursor = cursor
        self._builder = builder
        self._state = state
        self._workspace = workspace
        self._keep = keep
        self._pages: MainMemory | None = None
        self._others = workspace.spool()  # records of other blocks' pages: in the state they follow the table's section

    def read(self, addresses: bool) -> tuple[BlockTable, MainMemory | None]:
        """The table, and the pages of guest memory that were in the file."""
        table = read_block_table(self._cursor, self._state, addresses, self._read_block)
        self._state.records(self._others)
        return table, self._pages

    def _read_block(self, block: Block, most_pages: int) -> None:
        cursor = self._cursor
        version = cursor.u32("mapped-ram version")
        if version != _VERSION:
            raise cursor.error(f"{version} is not {_VERSION}", "mapped-ram version", back=4)
        page_size = cursor.u64("mapped-ram page size")
        if page_size != PAGE_SIZE:
            raise cursor.error(f"{page_size:#x}: only {PAGE_SIZE} is supported", "mapped-ram page size", back=8)
        bitmap_at = cursor.u64("mapped-ram bitmap offset")
        pages_at = cursor.u64("mapped-ram pages offset")
        bitmap_size = (block.size // PAGE_SIZE + 63) // 64 * 8
        if bitmap_at < cursor.position:
            raise cursor.error(f"{bitmap_at:#x} is not behind it", "mapped-ram bitmap offset", back=16)
        if pages_at < bitmap_at + bitmap_size:
            raise cursor.error(f"{pages_at:#x} is not behind the bitmap", "mapped-ram pages offset", back=8)
        block.sent = True
        self._skip_to(bitmap_at, "mapped-ram bitmap")
        bitmap = self._read_bitmap(bitmap_size)
        self._skip_to(pages_at, "mapped-ram pages")
        if block.guest_memory:
            if self._pages is None:
                self._pages = self._keep(most_pages)
            self._read_memory(self._pages, block, bitmap)
        else:
            self._read_other(block, bitmap)
        bitmap.close()

    def _skip_to(self, position: int, field: str) -> None:
        """What is between the parts is a literal; zeros as one record that repeats."""
        cursor = self._cursor
        while cursor.position < position:
            count = min(position - cursor.position, len(_ZERO_PIECE))
            if count > PAGE_SIZE:
                count -= count % PAGE_SIZE
            cursor.need(count, field)
            self._pass(count)

    def _read_bitmap(self, size: int) -> Spool:
        bitmap = self._workspace.spool()
        while bitmap.size < size:
            count = min(size - bitmap.size, BUFFER_SIZE // 2)
            bitmap.append(self._cursor.take(count, "mapped-ram bitmap"))
        return bitmap

    def _read_memory(self, pages: MainMemory, block: Block, bitmap: Spool) -> None:
        cursor = self._cursor
        for first, runs in self._pieces(block, bitmap):
            at = 0
            for count, there in runs:
                page = block.first + first + at
                start = cursor.start
                size = count * PAGE_SIZE
                if there:
                    cursor.consume(size)
                    native = self._builder.pages(page, count)
                    pages.put_run(page, count, native, PAGE_SIZE, cursor.buffer, start)
                elif bytes(cursor.buffer[start : start + size]) == _ZERO_PIECE[:size]:
                    # Equal to the pages in memory, which are zero for want of their bits.
                    cursor.consume(size)
                    self._builder.pages(page, count)
                else:
                    for stale in range(page, page + count):
                        if bytes(cursor.buffer[cursor.start : cursor.start + PAGE_SIZE]) == _ZERO_PAGE:
                            cursor.consume(PAGE_SIZE)
                            self._builder.pages(stale)
                        else:
                            cursor.skip(PAGE_SIZE)
                            cursor.flush()
                at += count

    def _read_other(self, block: Block, bitmap: Spool) -> None:
        cursor = self._cursor
        for first, runs in self._pieces(block, bitmap):
            page = first
            for count, there in runs:
                start = cursor.start
                for number in range(page, page + count):
                    at = start + (number - page) * PAGE_SIZE
                    data = bytes(cursor.buffer[at : at + PAGE_SIZE]) if there else _ZERO_PAGE
                    self._others.append(page_record(block.name, number * PAGE_SIZE, data))
                self._pass(count * PAGE_SIZE)
                page += count

    def _pass(self, size: int) -> None:
        """Literals that are available; zeros, if they are whole pages, as one record that repeats."""
        cursor = self._cursor
        if size % PAGE_SIZE == 0 and bytes(cursor.buffer[cursor.start : cursor.start + size]) == _ZERO_PIECE[:size]:
            cursor.consume(size)
            self._builder.bare(size // PAGE_SIZE, _ZERO_PAGE, 0)
        else:
            cursor.skip(size)
            cursor.flush()

    def _pieces(self, block: Block, bitmap: Spool) -> Iterator[tuple[int, list[tuple[int, bool]]]]:
        """First page, and lengths of runs with and without the bit; their bytes are available at the cursor."""
        total = block.size // PAGE_SIZE
        for first in range(0, total, _PIECE_PAGES):
            count = min(_PIECE_PAGES, total - first)
            self._cursor.need(count * PAGE_SIZE, "mapped-ram pages")
            bits = b"".join(map(_BITS.__getitem__, bitmap.read_at(first // 8, _PIECE_PAGES // 8)))[:count]
            yield first, [(len(run[0]), run[0][0] == 1) for run in _RUNS.finditer(bits)]
