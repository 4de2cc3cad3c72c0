"""The pages of a Xen stream: PAGE_DATA records of libxc (docs/specs/libxc-migration-stream.pandoc of Xen).

| bytes    | field    | meaning                                                                              |
|---------:|----------|--------------------------------------------------------------------------------------|
|        4 | count    | entries, at least 1                                                                  |
|        4 | reserved |                                                                                      |
|  8 count | entries  | bits 51–0: guest page frame number; bits 63–60: type, see below; the others are zero |
| 4096 × … | pages    | contents of the entries that have any, in their order                                |

| type     | name            | contents | meaning                                                                   |
|---------:|-----------------|----------|---------------------------------------------------------------------------|
|      0x0 | NOTAB           | yes      | a page; in HVM and PVH streams every page                                 |
|  0x1–0x4 | L1TAB … L4TAB   | yes      | page table of a PV guest. Its entries have been turned into the guest's   |
|          |                 |          | frame numbers                                                             |
|  0x9–0xc | … pinned        | yes      | the same                                                                  |
|      0xd | BROKEN          | no       | its memory has failed: none of the guest's                                |
|      0xe | XALLOC          | no       | the guest has it, its content is not in the stream: zeros                 |
|      0xf | XTAB            | no       | not the guest's (any more)                                                |

A live-migrated guest's stream has pages several times: the last copy counts. What the guest gave back while it was
being saved keeps its place in memory, and its last content, as it does when Xen restores it.

Frame numbers are as sparse as the guest's memory, so regions are known at the end only. Until then page numbers are
frame numbers, in sparse files.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from imagefs.errors import UnsupportedInputError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.pieces import PieceMemory
from imagefs.formats.regions import regions_of
from imagefs.formats.spool import Spool
from imagefs.formats.stream_pages import keeper
from imagefs.formats.xen_stream import Record, XenCursor
from imagefs.image.capture import ByteSource, PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.native import TemplateBuilder
from imagefs.image.pagetables import MAX_FRAMES

MAX_PFN = 1 << 31
"""8 TiB of guest-physical memory, above what Xen gives a guest; sparse files of it fit into every filesystem."""

_MAX_COUNT = 1 << 17
"""Entries of a record; libxc writes 1024."""
_MAX_RUN = 512
"""Pages written at a time, 2 MiB of the 4 that a cursor holds."""

_HEADER = struct.Struct("<II")
_ENTRY_SIZE = 8
_PFN = (1 << 52) - 1
_TYPE_OF_TOP_BYTE = bytes(byte >> 4 for byte in range(256))
_BROKEN, _XALLOC, _XTAB = 0xD, 0xE, 0xF
_WITHOUT_DATA = (_BROKEN, _XALLOC, _XTAB)
_TABLE_TYPES = (1, 2, 3, 4, 9, 10, 11, 12)
_KNOWN = bytes((0, *_TABLE_TYPES, *_WITHOUT_DATA))


class PageReader:
    """Reads PAGE_DATA records; then gives memory, its geometry, and what the stream says about page tables."""

    def __init__(self, cursor: XenCursor, builder: TemplateBuilder, source: Input, workspace: Workspace) -> None:
        self._cursor = cursor
        self._builder = builder
        self._types = _FrameTypes(workspace.spool())
        self._memory = keeper(source, workspace)(MAX_PFN)

    def read(self, record: Record, limit: int) -> None:
        """A record whose header was passed; frame numbers are below ``limit``."""
        cursor = self._cursor
        if record.length < _HEADER.size + _ENTRY_SIZE:
            raise cursor.bad_length(record, "too short for an entry")
        field = f"count of {record.name}"
        count, _ = cursor.unpack(_HEADER, field)
        most = min((record.length - _HEADER.size) // _ENTRY_SIZE, _MAX_COUNT)
        if not 0 < count <= most:
            reason = f"{count} entries: the record of {record.length:#x} bytes must have 1 to {most}"
            raise cursor.error(reason, field, _HEADER.size)
        at = cursor.position
        entries = array("Q", cursor.take(count * _ENTRY_SIZE, f"entries of {record.name}"))
        if sys.byteorder == "big":
            entries.byteswap()
        types = entries.tobytes()[7 if sys.byteorder == "little" else 0 :: _ENTRY_SIZE].translate(_TYPE_OF_TOP_BYTE)
        cursor.check_length(
            record, _HEADER.size + count * _ENTRY_SIZE + (count - sum(map(types.count, _WITHOUT_DATA))) * PAGE_SIZE
        )
        for index, pfn, run in _runs(entries, types):
            _check(pfn, run, limit, at + index * _ENTRY_SIZE)
            if run[0] < _BROKEN:
                self._types.put(pfn, run)
                self._read_run(pfn, len(run))
            elif run[0] == _XALLOC:
                self._types.put(pfn, run)
            else:
                self._types.take_back(pfn, len(run))

    def finish(self) -> Pages:
        """Raises UnsupportedInputError where no record had a page."""
        self._types.finish()
        regions = tuple(regions_of(lambda: self._types.runs(_ANY)))
        if not regions:
            raise UnsupportedInputError("the stream has no page of the guest's memory", field="libxc PAGE_DATA")
        geometry = Geometry(regions)
        last = regions[-1]
        frames, exceptions, superseded = self._memory.finish((last.guest_address + last.size) // PAGE_SIZE)
        memory = PieceMemory()
        for region in regions:
            memory.add(region.offset, frames, region.guest_address, region.size)
        return Pages(geometry, memory, exceptions, superseded, self._page_tables(geometry))

    def _read_run(self, pfn: int, count: int) -> None:
        """Pages with consecutive frame numbers."""
        cursor = self._cursor
        while count:
            cursor.need(PAGE_SIZE, "page of PAGE_DATA")
            cursor.reach(min(count, _MAX_RUN) * PAGE_SIZE)
            piece = min(count, cursor.available // PAGE_SIZE, _MAX_RUN)
            cursor.flush()
            native = self._builder.pages(pfn, piece)
            self._memory.put_run(pfn, piece, native, PAGE_SIZE, cursor.buffer, cursor.start)
            cursor.consume(piece * PAGE_SIZE)
            pfn += piece
            count -= piece

    def _page_tables(self, geometry: Geometry) -> tuple[PageKind, ...]:
        """The typed frames, the root's level first where there are more than MAX_FRAMES."""
        found = []
        left = MAX_FRAMES
        for kind, types in _TABLES.items() if self._types.tables else ():
            for pfn, count in self._types.runs(types):
                page = geometry.page_of_pfn(pfn)
                assert page is not None
                if not left:
                    break
                found.append(PageKind(page, min(count, left), kind))
                left -= found[-1].count
        return tuple(sorted(found, key=lambda kind: kind.first))


@dataclass(frozen=True)
class Pages:
    """The guest's memory, once the stream was read."""

    geometry: Geometry
    memory: ByteSource
    exceptions: ByteSource
    superseded: ByteSource
    page_tables: tuple[PageKind, ...]


def _runs(entries: array[int], types: bytes) -> Iterator[tuple[int, int, bytes]]:
    """``(index, first frame, types)`` of frames that follow each other; those without contents are of one type."""
    count = len(entries)
    ones, ramp = _lanes(count)
    if int.from_bytes(entries.tobytes(), sys.byteorder) == entries[0] * ones + ramp:  # most of an HVM guest's
        yield 0, entries[0] & _PFN, types
        return
    begin = 0
    for index in range(1, count + 1):
        if index < count and entries[index] & _PFN == (entries[index - 1] & _PFN) + 1:
            kind, before = types[index], types[index - 1]
            if kind == before or (kind < _BROKEN and before < _BROKEN):
                continue
        yield begin, entries[begin] & _PFN, types[begin:index]
        begin = index


@lru_cache(4)
def _lanes(count: int) -> tuple[int, int]:
    """Ones, and 0, 1, 2, …, as integers of ``count`` lanes of 64 bits: comparing these at once is ten times as fast."""
    lanes = array("Q", [1]) * count, array("Q", range(count))
    ones, ramp = (int.from_bytes(each.tobytes(), sys.byteorder) for each in lanes)
    return ones, ramp


def _check(pfn: int, types: bytes, limit: int, at: int) -> None:
    """The run's entries begin at ``at`` of the stream."""
    known = len(types) - len(types.lstrip(_KNOWN))
    fitting = max(0, limit - pfn)
    if fitting < len(types):
        reason = f"frame {pfn + fitting:#x} is not below {limit:#x}, the end of the guest's memory"
    elif known < len(types):
        reason = f"frame {pfn + known:#x} is of type {types[known]:#x}, which is not understood"
    else:
        return
    raise UnsupportedInputError(reason, field="entry of libxc PAGE_DATA", offset=at + min(known, fitting) * _ENTRY_SIZE)


_WINDOW = 1 << 16
_GIVEN_BACK = 0x20
"""A frame that had contents, and then was XTAB or BROKEN."""
_TAKE_BACK = bytes([0, *[_GIVEN_BACK] * 255])
_STORED = bytes(range(1, 256)) + b"\xff"

_ANY = rb"[^\0]+"
_TABLES = {"pml4": rb"[\x05\x0d]+", "pdpt": rb"[\x04\x0c]+", "pd": rb"[\x03\x0b]+", "pt": rb"[\x02\x0a]+"}


class _FrameTypes:
    """A byte for each frame: 0 where the guest has none, otherwise the type of its last record, plus one."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._spool.resize(MAX_PFN)
        self._number = -1
        self._window = bytearray()
        self.tables = False
        """Whether any frame was a page table."""

    def put(self, pfn: int, types: bytes) -> None:
        self.tables |= any(map(types.count, _TABLE_TYPES))
        stored = types.translate(_STORED)
        done = 0
        for start, stop in self._places(pfn, len(types)):
            self._window[start:stop] = stored[done : done + stop - start]
            done += stop - start

    def take_back(self, pfn: int, count: int) -> None:
        for start, stop in self._places(pfn, count):
            self._window[start:stop] = self._window[start:stop].translate(_TAKE_BACK)

    def finish(self) -> None:
        self._store()

    def runs(self, pattern: bytes) -> Iterator[tuple[int, int]]:
        """``(first frame, count)`` of frames whose bytes match, neighbours joined."""
        search = re.compile(pattern)
        first, count = 0, 0
        at = self._spool.next_data(0)
        while at < self._spool.size:
            at -= at % _WINDOW
            types = self._spool.read_at(at, _WINDOW).rstrip(b"\0")
            begin = len(types) - len(types.lstrip(b"\0"))
            for match in search.finditer(types, begin):
                if at + match.start() == first + count:
                    count += len(match[0])
                    continue
                if count:
                    yield first, count
                first, count = at + match.start(), len(match[0])
            at = self._spool.next_data(at + _WINDOW)
        if count:
            yield first, count

    def _places(self, pfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Pieces of the window, which holds them until the next one."""
        while count:
            number, start = divmod(pfn, _WINDOW)
            if number != self._number:
                self._store()
                self._window = bytearray(self._spool.read_at(number * _WINDOW, _WINDOW))
                self._number = number
            stop = min(start + count, _WINDOW)
            yield start, stop
            pfn += stop - start
            count -= stop - start

    def _store(self) -> None:
        if self._number >= 0 and any(self._window):
            self._spool.write_at(self._number * _WINDOW, self._window)
