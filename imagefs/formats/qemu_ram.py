"""The RAM section of a QEMU migration stream: block table and page records (QEMU's migration/ram.c, version 4).

Each part of the section is a sequence of records up to EOS. A record begins with 64 bits, big-endian like all
integers of the stream: an offset inside a block in whole pages, its low 12 bits flags.

| flag  | name          | what follows the header                                                          |
|-------|---------------|----------------------------------------------------------------------------------|
| 0x002 | ZERO          | block name, fill byte (not zero only in streams of ancient QEMU)                 |
| 0x004 | MEM_SIZE      | the block table, see qemu_blocks.py                                              |
| 0x008 | PAGE          | block name, 4096 bytes                                                           |
| 0x010 | EOS           | nothing                                                                          |
| 0x020 | CONTINUE      | with ZERO, PAGE, COMPRESS_PAGE: the block is that of the record before, no name  |
| 0x040 | XBZRLE        | block name, a delta to the page's copy before: see qemu_payload.py               |
| 0x100 | COMPRESS_PAGE | block name, a deflated page: see qemu_payload.py                                 |

A block name is a length byte and ASCII. Pages of guest memory go to a :class:`MainMemory`, those of all other blocks
(video memory, ROMs, ACPI tables) to the state. Refused: HOOK (0x080) and MULTIFD_FLUSH (0x200), with which pages travel
outside this stream; everything else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Workspace
from imagefs.formats.gather import JoinedSource
from imagefs.formats.qemu_blocks import FLAG_MEM_SIZE, FLAGS, TABLE, Block, BlockTable, read_block_table
from imagefs.formats.qemu_mapped_ram import MappedRamReader
from imagefs.formats.qemu_payload import delta_page, inflated_page
from imagefs.formats.qemu_state import FLAG_EOS, FLAG_PAGE, FLAG_ZERO, StateWriter
from imagefs.formats.spool import Spool
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.formats.stream_pages import MainMemory
from imagefs.image.capture import ByteSource, BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import TemplateBuilder

FLAG_CONTINUE = 0x20
FLAG_XBZRLE = 0x40
FLAG_COMPRESS_PAGE = 0x100
_PAGE_FLAGS = (FLAG_PAGE, FLAG_ZERO, FLAG_XBZRLE, FLAG_COMPRESS_PAGE)
_REFUSED = {
    0x01: "FULL records are of a QEMU before 2009",
    0x80: "HOOK: the pages went over RDMA, not through this stream",
    0x200: "MULTIFD_FLUSH: the pages went through other channels; migrate with the capability multifd off",
}
_READ_AHEAD = 1 << 20
_RECORD = 8 + PAGE_SIZE
_MAX_RUN = 1000
"""Pages written at a time: below IOV_MAX, and 4 MiB is all that a cursor holds."""

_HEADER = struct.Struct(">Q")
_PAGE_RECORD = struct.Struct(f">Q{PAGE_SIZE}x")
_ZERO_RECORD = struct.Struct(">QB")
_SLOT = struct.Struct("<Q")
_ZERO_PAGE = bytes(PAGE_SIZE)


class RamReader:
    """Reads the RAM section's parts: guest memory's pages to what ``keep`` makes for so many pages, and into the
    template; the others' to the state."""

    def __init__(
        self,
        cursor: StreamCursor,
        builder: TemplateBuilder,
        state: StateWriter,
        workspace: Workspace,
        keep: Callable[[int], MainMemory],
        memory_files: Sequence[Path],
    ) -> None:
        self._cursor = cursor
        self._builder = builder
        self._state = state
        self._workspace = workspace
        self._keep = keep
        self._memory_files = memory_files
        self._ignore_shared = False
        self._current: Block | None = None
        self._pages: MainMemory | None = None
        self._other_copies: Spool | None = None  # see _read_other
        self.blocks = BlockTable()

    def read_first(self, ignore_shared: bool, mapped: bool) -> None:
        """The section's first part: the block table, then maybe pages."""
        self._ignore_shared = ignore_shared
        if mapped:
            reader = MappedRamReader(self._cursor, self._builder, self._state, self._workspace, self._keep)
            self.blocks, self._pages = reader.read(ignore_shared)
        else:
            self.blocks = read_block_table(self._cursor, self._state, ignore_shared)
        if self._memory_files and not self._ignore_shared:
            raise UsageError(
                f"--memory {self._memory_files[0]}: the stream was saved without x-ignore-shared and has the guest's"
                " pages itself"
            )
        self.read_records()

    def read_records(self) -> None:
        """Records up to and including EOS."""
        cursor = self._cursor
        while True:
            if cursor.available < _RECORD * 16:
                cursor.reach(_READ_AHEAD)
            cursor.need(8, "RAM record")
            header: int = _HEADER.unpack_from(cursor.buffer, cursor.start)[0]
            flags = header & FLAGS
            kind = flags & ~FLAG_CONTINUE
            if kind in _PAGE_FLAGS:
                self._read_page(header - flags, kind, flags != kind)
            elif header == FLAG_EOS:
                cursor.skip(8)
                return
            else:
                raise self._refuse_flags(header)

    def finish(self) -> tuple[ByteSource, ByteSource, ByteSource]:
        """Memory, exceptions and superseded pages, once the stream was read."""
        if self._ignore_shared:
            self._check_others_sent()
        missing = [block for block in self.blocks.guest_memory if block.size and not block.sent]
        if self._memory_files:
            return self._shared(missing), BytesSource(b""), BytesSource(b"")
        if missing:
            names = " and ".join(repr(block.name) for block in missing)
            if self._ignore_shared:
                raise UnsupportedInputError(
                    f"the stream was saved with x-ignore-shared and has no page of block {names}: give the guest's RAM"
                    " file with --memory FILE" + (" for each block" if len(missing) > 1 else ""),
                    field=TABLE,
                )
            raise UnsupportedInputError(
                f"no page of block {names} is in the stream (did they go through multifd channels?)", field=TABLE
            )
        assert self._pages is not None
        return self._pages.finish(self.blocks.memory_pages)

    def _shared(self, missing: Sequence[Block]) -> ByteSource:
        """Guest memory out of the files that were named, in the order of the guest's addresses."""
        blocks = self.blocks.guest_memory
        if len(missing) < len(blocks):
            sent = next(block for block in blocks if block not in missing)
            raise UsageError(
                f"--memory {self._memory_files[0]}: the stream has the pages of block {sent.name!r} itself (its RAM"
                " was not shared)"
            )
        if len(self._memory_files) != len(blocks):
            names = ", ".join(repr(block.name) for block in blocks)
            raise UsageError(f"--memory {self._memory_files[-1]}: the stream has one RAM file for each of {names}")
        files = {}
        for block, path in zip(sorted(blocks, key=lambda block: block.address), self._memory_files, strict=True):
            files[block.name] = file = self._workspace.file(path)
            if file.size != block.size:
                raise UsageError(
                    f"--memory {path}: it has {file.size:,} bytes, block {block.name!r} of the stream {block.size:,}"
                )
        parts = [files[block.name] for block in blocks]
        return parts[0] if len(parts) == 1 else JoinedSource(parts)

    def _read_page(self, offset: int, kind: int, continued: bool) -> None:
        cursor = self._cursor
        if continued:
            block = self._current
            prefix = 8
            if block is None:
                raise cursor.error("CONTINUE, but there is no record before it", "RAM record flags")
        else:
            cursor.need(9, "RAM block name")
            length = cursor.buffer[cursor.start + 8]
            prefix = 9 + length
            cursor.need(prefix, "RAM block name")
            name = bytes(cursor.buffer[cursor.start + 9 : cursor.start + prefix])
            block = self.blocks.get(name.decode("ascii", "replace"))
            if block is None:
                raise cursor.error(f"{name!r} is not in the block table", "RAM block name", back=-9)
            self._current = block
        if offset >= block.size:
            raise cursor.error(
                f"offset {offset:#x} is beyond block {block.name!r} of {block.size:#x} bytes", "RAM page offset"
            )
        block.sent = True
        if not block.guest_memory:
            self._read_other(block, offset, kind, prefix)
            return
        pages = self._pages
        if pages is None:
            pages = self._pages = self._keep(self.blocks.memory_pages)
        if kind == FLAG_PAGE:
            self._read_main_pages(pages, block, offset, prefix)
        elif kind == FLAG_ZERO:
            self._read_main_zeros(pages, block, offset, prefix)
        else:
            page = block.first + offset // PAGE_SIZE
            if kind == FLAG_XBZRLE:
                pages.put_page(page, self._delta(prefix, pages.current(page)))
            else:
                pages.put_page(page, inflated_page(cursor, prefix))

    def _read_main_pages(self, pages: MainMemory, block: Block, offset: int, prefix: int) -> None:
        """A PAGE record, and those right behind it that go on with the next pages of the block."""
        cursor = self._cursor
        cursor.need(prefix + PAGE_SIZE, "RAM page")
        buffer, start = cursor.buffer, cursor.start
        following = start + prefix + PAGE_SIZE
        room = min((cursor.available - prefix - PAGE_SIZE) // _RECORD, _MAX_RUN - 1)
        expected = offset | FLAG_PAGE | FLAG_CONTINUE
        more = 0
        for (header,) in _PAGE_RECORD.iter_unpack(buffer[following : following + room * _RECORD]):
            expected += PAGE_SIZE
            if header != expected:
                break
            more += 1
        more = min(more, (block.size - offset) // PAGE_SIZE - 1)
        cursor.flush()
        page = block.first + offset // PAGE_SIZE
        native = self._builder.pages(page, 1, bytes(buffer[start : start + prefix]), PAGE_SIZE)
        if more:
            self._builder.pages(page + 1, more, bytes(buffer[following : following + 8]), PAGE_SIZE)
        pages.put_run(page, 1 + more, native, _RECORD, buffer, start + prefix)
        cursor.consume(prefix + PAGE_SIZE + more * _RECORD)

    def _read_main_zeros(self, pages: MainMemory, block: Block, offset: int, prefix: int) -> None:
        """A ZERO record, and those right behind it that go on with the next pages of the block."""
        cursor = self._cursor
        cursor.need(prefix + 1, "RAM fill byte")
        buffer, start = cursor.buffer, cursor.start
        page = block.first + offset // PAGE_SIZE
        following = start + prefix + 1
        fill = buffer[following - 1]
        more = 0
        if fill:
            pages.put_page(page, bytes([fill]) * PAGE_SIZE)
        else:
            room = (cursor.available - prefix - 1) // _ZERO_RECORD.size
            expected = offset | FLAG_ZERO | FLAG_CONTINUE
            for header, value in _ZERO_RECORD.iter_unpack(buffer[following : following + room * _ZERO_RECORD.size]):
                expected += PAGE_SIZE
                if header != expected or value:
                    break
                more += 1
            more = min(more, (block.size - offset) // PAGE_SIZE - 1)
            pages.clear(page, 1 + more)
        cursor.flush()
        self._builder.bare(1, bytes(buffer[start:following]), PAGE_SIZE)
        if more:
            self._builder.bare(more, bytes(buffer[following : following + _ZERO_RECORD.size]), PAGE_SIZE)
        cursor.consume(prefix + 1 + more * _ZERO_RECORD.size)

    def _read_other(self, block: Block, offset: int, kind: int, prefix: int) -> None:
        """A record of a block that is not guest memory: into the state, and a literal of the native file."""
        cursor = self._cursor
        copies = self._other_copies
        if copies is None:
            # For each page where its newest copy is in the state, or 1 for zeros; 0 is for one that did not come yet.
            copies = self._other_copies = self._workspace.spool()
            copies.resize(self.blocks.other_pages * _SLOT.size)
        slot = (block.first + offset // PAGE_SIZE) * _SLOT.size
        if kind == FLAG_COMPRESS_PAGE:
            data = inflated_page(cursor, prefix)
        elif kind == FLAG_XBZRLE:
            (at,) = _SLOT.unpack(copies.read_at(slot, _SLOT.size))
            data = self._delta(
                prefix, self._state.spool.read_at(at, PAGE_SIZE) if at > 1 else _ZERO_PAGE if at else None
            )
        else:
            size = PAGE_SIZE if kind == FLAG_PAGE else 1
            cursor.need(prefix + size, "RAM page" if kind == FLAG_PAGE else "RAM fill byte")
            cursor.skip(prefix)
            data = cursor.take(size, "RAM page") * (PAGE_SIZE // size)
        self._state.page(block.name, offset, data)
        copies.write_at(slot, _SLOT.pack(1 if data == _ZERO_PAGE else self._state.spool.size - PAGE_SIZE))

    def _delta(self, prefix: int, old: bytes | None) -> bytes:
        if old is None:
            raise self._cursor.error(
                "XBZRLE, a delta to a page that the stream has not brought before", "RAM record flags"
            )
        return delta_page(self._cursor, prefix, old)

    def _check_others_sent(self) -> None:
        """With x-ignore-shared, a block without a single page is one whose pages stayed in a file."""
        for block in self.blocks.values():
            if not block.guest_memory and block.size and not block.sent:
                raise UnsupportedInputError(
                    f"block {block.name!r} was in shared memory too (x-ignore-shared): its pages are not in the stream",
                    field=TABLE,
                )

    def _refuse_flags(self, header: int) -> UnsupportedInputError:
        flags = header & FLAGS
        for flag, reason in _REFUSED.items():
            if flags & ~FLAG_CONTINUE == flag:
                return self._cursor.error(reason, "RAM record flags")
        if flags == FLAG_MEM_SIZE:
            return self._cursor.error("a second block table", "RAM record flags")
        return self._cursor.error(f"{flags:#05x} is no known combination (record {header:#x})", "RAM record flags")
