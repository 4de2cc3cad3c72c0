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
| 0x100 | COMPRESS_PAGE | block name, length u32, a zlib stream that inflates to 4096 bytes                |

A block name is a length byte and ASCII. Refused: XBZRLE (0x040), a delta to a page that only the destination has;
HOOK (0x080) and MULTIFD_FLUSH (0x200), with which pages travel outside this stream; everything else.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.qemu_blocks import FLAG_MEM_SIZE, FLAGS, TABLE, Block, read_block_table
from imagefs.formats.qemu_pages import MainMemory, PagesInPlace, SpooledPages
from imagefs.formats.qemu_state import FLAG_EOS, FLAG_PAGE, FLAG_ZERO, StateWriter
from imagefs.formats.qemu_stream import StreamCursor
from imagefs.formats.spool import FileSource
from imagefs.image.capture import ByteSource, BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import TemplateBuilder

FLAG_CONTINUE = 0x20
FLAG_COMPRESS_PAGE = 0x100
_REFUSED = {
    0x01: "FULL records are of a QEMU before 2009",
    0x40: "XBZRLE: the page is a delta to a copy that only the destination had; migrate with the capability off",
    0x80: "HOOK: the pages went over RDMA, not through this stream",
    0x200: "MULTIFD_FLUSH: the pages went through other channels; migrate with the capability multifd off",
}
_MAX_COMPRESSED = 4110
"""zlib's compressBound(4096), as QEMU checks it."""

_READ_AHEAD = 1 << 20
_RECORD = 8 + PAGE_SIZE
_MAX_RUN = 1000
"""Pages written at a time: below IOV_MAX, and 4 MiB is all that a cursor holds."""

_HEADER = struct.Struct(">Q")
_PAGE_RECORD = struct.Struct(f">Q{PAGE_SIZE}x")
_ZERO_RECORD = struct.Struct(">QB")
_U32 = struct.Struct(">I")


class RamReader:
    """Reads the RAM section's parts: main memory's pages to a :class:`MainMemory`, the others' to the state."""

    def __init__(
        self,
        cursor: StreamCursor,
        builder: TemplateBuilder,
        state: StateWriter,
        source: Input,
        workspace: Workspace,
        memory_file: Path | None,
    ) -> None:
        self._cursor = cursor
        self._builder = builder
        self._state = state
        self._source = source
        self._workspace = workspace
        self._memory_file = memory_file
        self._shared: FileSource | None = None  # memory_file, opened
        self._ignore_shared = False
        self._current: Block | None = None
        self._pages: MainMemory | None = None
        self._main: Block | None = None
        self.blocks: dict[str, Block] = {}

    @property
    def main(self) -> Block:
        """The guest's memory; known once the table was read."""
        assert self._main is not None
        return self._main

    def read_first(self, ignore_shared: bool) -> None:
        """The section's first part: the block table, then maybe pages."""
        self._ignore_shared = ignore_shared
        self.blocks, self._main = read_block_table(self._cursor, self._state, ignore_shared)
        self._open_memory_file()
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
            if kind in (FLAG_PAGE, FLAG_ZERO, FLAG_COMPRESS_PAGE):
                self._read_page(header - flags, kind, flags != kind)
            elif header == FLAG_EOS:
                cursor.skip(8)
                return
            else:
                raise self._refuse_flags(header)

    def finish(self) -> tuple[ByteSource, ByteSource, ByteSource]:
        """Memory, exceptions and superseded pages, once the stream was read."""
        if self._shared is not None:
            self._check_others_sent()
            return self._shared, BytesSource(b""), BytesSource(b"")
        if not self.main.sent:
            if self._ignore_shared:
                raise UnsupportedInputError(
                    f"the stream was saved with x-ignore-shared and has no page of block {self.main.name!r}: give the"
                    " guest's RAM file with --memory FILE",
                    field=TABLE,
                )
            raise UnsupportedInputError(
                f"no page of block {self.main.name!r} is in the stream (did they go through multifd channels?)",
                field=TABLE,
            )
        if self._ignore_shared:
            self._check_others_sent()
        assert self._pages is not None
        return self._pages.finish()

    def _open_memory_file(self) -> None:
        if self._memory_file is None:
            return
        if not self._ignore_shared:
            raise UsageError(
                f"--memory {self._memory_file}: the stream was saved without x-ignore-shared and has the guest's pages"
                " itself"
            )
        self._shared = self._workspace.file(self._memory_file)
        if self._shared.size != self.main.size:
            raise UsageError(
                f"--memory {self._memory_file}: it has {self._shared.size:,} bytes, block {self.main.name!r} of the"
                f" stream {self.main.size:,}"
            )

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
        if block is not self._main:
            self._read_other(block, offset, kind, prefix)
            return
        pages = self._pages
        if pages is None:
            pages = self._pages = self._open_main()
        if kind == FLAG_PAGE:
            self._read_main_pages(pages, offset, prefix)
        elif kind == FLAG_ZERO:
            self._read_main_zeros(pages, offset, prefix)
        else:
            pages.put_page(offset // PAGE_SIZE, self._inflate(prefix))

    def _open_main(self) -> MainMemory:
        if self._shared is not None:
            raise UsageError(
                f"--memory {self._memory_file}: the stream has the pages of block {self.main.name!r} itself (its RAM"
                " was not shared)"
            )
        pages = self.main.size // PAGE_SIZE
        if self._source.regular:
            return PagesInPlace(self._workspace, pages, self._workspace.adopt(self._source.as_file()))
        return SpooledPages(self._workspace, pages)

    def _read_main_pages(self, pages: MainMemory, offset: int, prefix: int) -> None:
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
        more = min(more, self.main.size // PAGE_SIZE - offset // PAGE_SIZE - 1)
        cursor.flush()
        page = offset // PAGE_SIZE
        native = self._builder.pages(page, 1, bytes(buffer[start : start + prefix]), PAGE_SIZE)
        if more:
            self._builder.pages(page + 1, more, bytes(buffer[following : following + 8]), PAGE_SIZE)
        pages.put_run(page, 1 + more, native, _RECORD, buffer, start + prefix)
        cursor.consume(prefix + PAGE_SIZE + more * _RECORD)

    def _read_main_zeros(self, pages: MainMemory, offset: int, prefix: int) -> None:
        """A ZERO record, and those right behind it that go on with the next pages of the block."""
        cursor = self._cursor
        cursor.need(prefix + 1, "RAM fill byte")
        buffer, start = cursor.buffer, cursor.start
        page = offset // PAGE_SIZE
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
            more = min(more, self.main.size // PAGE_SIZE - page - 1)
            pages.clear(page, 1 + more)
        cursor.flush()
        self._builder.bare(1, bytes(buffer[start:following]), PAGE_SIZE)
        if more:
            self._builder.bare(more, bytes(buffer[following : following + _ZERO_RECORD.size]), PAGE_SIZE)
        cursor.consume(prefix + 1 + more * _ZERO_RECORD.size)

    def _read_other(self, block: Block, offset: int, kind: int, prefix: int) -> None:
        """A record of a block that is not main memory: into the state, and a literal of the native file."""
        cursor = self._cursor
        if kind == FLAG_COMPRESS_PAGE:
            data = self._inflate(prefix)
        else:
            size = PAGE_SIZE if kind == FLAG_PAGE else 1
            cursor.need(prefix + size, "RAM page" if kind == FLAG_PAGE else "RAM fill byte")
            cursor.skip(prefix)
            data = cursor.take(size, "RAM page") * (PAGE_SIZE // size)
        self._state.page(block.name, offset, data)

    def _inflate(self, prefix: int) -> bytes:
        """The page of a COMPRESS_PAGE record, which is passed as literals.

        Deflating the page again would not have to give the same bytes, so the template keeps them.
        """
        cursor = self._cursor
        field = "length of compressed RAM page"
        cursor.need(prefix + 4, field)
        length: int = _U32.unpack_from(cursor.buffer, cursor.start + prefix)[0]
        if not 0 < length <= _MAX_COMPRESSED:
            raise cursor.error(f"{length:#x} is impossible for {PAGE_SIZE} bytes", field, back=-prefix)
        field = "compressed RAM page"
        cursor.need(prefix + 4 + length, field)
        cursor.skip(prefix + 4)
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(cursor.take(length, field), PAGE_SIZE + 1)
        except zlib.error as error:
            raise cursor.error(f"not a zlib stream ({error})", field, back=length) from error
        if len(data) != PAGE_SIZE or not inflate.eof or inflate.unused_data:
            raise cursor.error(f"does not inflate to exactly {PAGE_SIZE} bytes", field, back=length)
        return data

    def _check_others_sent(self) -> None:
        """With x-ignore-shared, a block without a single page is one whose pages stayed in a file."""
        for block in self.blocks.values():
            if block is not self._main and block.size and not block.sent:
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
