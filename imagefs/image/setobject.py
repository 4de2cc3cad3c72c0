"""The object of a working set: a stream of pages in the order in which a guest will want them.

| bytes | field    | meaning                                                                                  |
|------:|----------|------------------------------------------------------------------------------------------|
|     8 | magic    | ``IFSWSET1``                                                                             |
|    32 | manifest | digest of the manifest: the image that the set is of                                     |
|     8 | size     | bytes of the object                                                                      |
|     4 | records  | number of records                                                                        |
|     4 | pages    | number of pages that the records carry                                                   |
|     … | records  | each: kind u8, level u8, count u16, table u32, frame u32; then so many bytes of each     |

A record of kind BLOCK is an index block: the table is the number of the first window below it (u64), the frame its
bytes. One of kind PAGES has a table of ``count`` windows, each: window u64, recordings u8, reserved u8, siblings u16, a
bitmap of the pages carried (chunk_pages / 8 bytes, LSB first), and the digests of the pages of the chunk's content that
are not carried; the frame is the carried pages of all windows, end to end. Frames are zstd, integers little-endian.

A chunk's digest is one of its pages' digests, so the carried pages and the digests of their siblings verify the page
against the leaf; and a block is verified by its parent's entry. So nothing in the object needs to be believed, and no
other request is needed for it: all blocks that the metadata object lacks are in it, before the first page below them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import DIGEST_SIZE, MAX_CHUNK_PAGES, Buffer, Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import MAX_BLOCK_SIZE

MAGIC = b"IFSWSET1"
HEADER = struct.Struct("<8s32sQII")
RECORD = struct.Struct("<BBHII")
ENTRY = struct.Struct("<QBBH")
WINDOW = struct.Struct("<Q")
BLOCK, PAGES = 1, 2
MAX_PAGES = 1 << 16
"""Pages of a set that a reader accepts: 256 MiB. Writers stop at a quarter of that."""
MAX_BLOCKS = 512
"""Index blocks of a set: 12 MiB, and 16 GiB of memory without a gap."""
BATCH_PAGES = 64
"""A record is closed at so many pages: 256 KiB compress nearly as well as more, and are verified in a millisecond."""
MAX_BATCH = BATCH_PAGES - 1 + MAX_CHUNK_PAGES
MAX_TABLE = BATCH_PAGES * (ENTRY.size + MAX_CHUNK_PAGES // 8 + DIGEST_SIZE * (MAX_CHUNK_PAGES - 1))
MAX_FRAME = MAX_BATCH * PAGE_SIZE + (1 << 16)
MAX_SIZE = 1 << 29


@dataclass(frozen=True, slots=True)
class Header:
    """What an object begins with."""

    manifest: bytes
    size: int
    records: int
    pages: int


@dataclass(frozen=True, slots=True)
class SetBlock:
    """An index block of some level, as it came: nothing of it is verified."""

    level: int
    window: int
    frame: bytes


@dataclass(frozen=True, slots=True)
class SetWindow:
    """Pages of one window: ``carried`` has bit i set where page i comes, ``siblings`` are digests of the others."""

    window: int
    recordings: int
    carried: int
    siblings: bytes

    @property
    def pages(self) -> int:
        return self.carried.bit_count()


@dataclass(frozen=True, slots=True)
class SetPages:
    """A batch of windows and the frame of their pages, as it came: nothing of it is verified."""

    windows: tuple[SetWindow, ...]
    frame: bytes

    @property
    def pages(self) -> int:
        return sum(window.pages for window in self.windows)


Record = SetBlock | SetPages


def parse_header(data: Buffer, *, key: str, origin: str) -> Header:
    """The first HEADER.size bytes of an object. CorruptObjectError names the field that is wrong."""
    magic, manifest, size, records, pages = HEADER.unpack_from(data)
    for name, good in (
        ("magic", magic == MAGIC),
        ("size", HEADER.size <= size <= MAX_SIZE),
        ("pages", pages <= MAX_PAGES),
        ("records", records <= pages + MAX_BLOCKS),
    ):
        if not good:
            raise CorruptObjectError(f"working set: bad {name} in the header", key=key, origin=origin)
    return Header(manifest, size, records, pages)


class SetParser:
    """Takes an object in pieces of any size, gives its records as they are complete.

    Holds the bytes of one record and one piece at most. Raises CorruptObjectError with the offset and the field.
    """

    def __init__(self, manifest: bytes, chunk_pages: int, *, key: str, origin: str) -> None:
        """``manifest`` is the digest that the set must be of."""
        self.header: Header | None = None
        self.received = 0
        """Bytes that have been fed: where to go on after an interruption."""
        self._manifest = manifest
        self._bitmap = chunk_pages // 8
        self._key, self._origin = key, origin
        self._rest = bytearray()
        self._at = 0
        """Offset in the object of the first byte of the rest."""
        self._records = self._pages = self._blocks = 0

    @property
    def complete(self) -> bool:
        """Whether all records have been given."""
        return self.header is not None and self._records == self.header.records and not self._rest

    def feed(self, piece: Buffer) -> list[Record]:
        """The records that this piece completes."""
        self._rest += piece
        self.received += len(piece)
        found: list[Record] = []
        if self.header is None:
            if len(self._rest) < HEADER.size:
                return found
            self.header = parse_header(self._rest, key=self._key, origin=self._origin)
            if self.header.manifest != self._manifest:
                raise self._bad("manifest", f"it is of another image, {self.header.manifest.hex()}")
            self._drop(HEADER.size)
        if self.received > self.header.size:
            raise self._bad("size", "bytes are left over")
        while (record := self._next(self.header)) is not None:
            found.append(record)
        return found

    def finish(self) -> None:
        """No more bytes come."""
        if not self.complete or self.header is None or self.received != self.header.size:
            raise self._bad("end", "cut short")
        if self._pages != self.header.pages:
            raise self._bad("pages", f"{self._pages} instead of {self.header.pages}")

    def _next(self, header: Header) -> Record | None:
        if len(self._rest) < RECORD.size:
            return None
        kind, level, count, table, frame = RECORD.unpack_from(self._rest)
        if self._records == header.records:
            raise self._bad("records", f"more than {header.records}")
        if table > MAX_TABLE or frame > MAX_FRAME:
            raise self._bad("length", f"{table} and {frame} bytes")
        if len(self._rest) < RECORD.size + table + frame:
            return None
        middle, end = RECORD.size + table, RECORD.size + table + frame
        with memoryview(self._rest) as rest:
            parts = bytes(rest[RECORD.size : middle]), bytes(rest[middle:end])
        record = self._parse(kind, level, count, *parts)
        self._records += 1
        self._drop(end)
        return record

    def _parse(self, kind: int, level: int, count: int, table: bytes, frame: bytes) -> Record:
        if kind == BLOCK:
            self._blocks += 1
            if self._blocks > MAX_BLOCKS or count != 1 or len(table) != WINDOW.size or len(frame) > MAX_BLOCK_SIZE + 64:
                raise self._bad("block", f"number {self._blocks}, {len(frame)} bytes")
            return SetBlock(level, WINDOW.unpack(table)[0], frame)
        if kind != PAGES or level or not 0 < count <= BATCH_PAGES:
            raise self._bad("kind, level or count", (kind, level, count))
        windows = []
        at = 0
        for _ in range(count):
            end = at + ENTRY.size + self._bitmap
            if end > len(table):
                raise self._bad("table", "cut short")
            window, recordings, reserved, siblings = ENTRY.unpack_from(table, at)
            carried = int.from_bytes(table[at + ENTRY.size : end], "little")
            at = end + siblings * DIGEST_SIZE
            if reserved or not recordings or not carried or at > len(table):
                raise self._bad("window", window)
            windows.append(SetWindow(window, recordings, carried, table[end:at]))
        record = SetPages(tuple(windows), frame)
        self._pages += record.pages
        if at != len(table) or record.pages > MAX_BATCH or self._pages > MAX_PAGES:
            raise self._bad("table", f"{len(table)} bytes, {record.pages} pages")
        return record

    def _drop(self, count: int) -> None:
        del self._rest[:count]
        self._at += count

    def _bad(self, name: str, value: object) -> CorruptObjectError:
        reason = f"working set: bad {name} at {self._at:#x}: {value}"
        return CorruptObjectError(reason, key=self._key, origin=self._origin)


class SetBuilder:
    """An object in the making, held in memory: some 64 MiB of pages, compressed."""

    def __init__(self, manifest: bytes, chunk_pages: int, codec: Codec) -> None:
        self._manifest = manifest
        self._bitmap = chunk_pages // 8
        self._codec = codec
        self._records: list[bytes] = []
        self._windows: list[bytes] = []
        self._content = bytearray()
        self.pages = self.blocks = 0

    def add_block(self, level: int, window: int, data: bytes) -> None:
        """An index block, to stand before the first page below it; ``window`` is the first that it covers."""
        self._close_batch()
        self._add(BLOCK, level, 1, WINDOW.pack(window), data)
        self.blocks += 1

    def add_window(self, window: SetWindow, content: Buffer) -> None:
        """Pages of a window; ``content`` is those carried, end to end."""
        entry = ENTRY.pack(window.window, window.recordings, 0, len(window.siblings) // DIGEST_SIZE)
        self._windows.append(entry + window.carried.to_bytes(self._bitmap, "little") + window.siblings)
        self._content += content
        self.pages += window.pages
        if len(self._content) >= BATCH_PAGES * PAGE_SIZE:
            self._close_batch()

    def finish(self) -> bytes:
        """The object's bytes. The builder must not be used afterwards."""
        self._close_batch()
        size = HEADER.size + sum(map(len, self._records))
        return HEADER.pack(MAGIC, self._manifest, size, len(self._records), self.pages) + b"".join(self._records)

    def _close_batch(self) -> None:
        if self._windows:
            self._add(PAGES, 0, len(self._windows), b"".join(self._windows), bytes(self._content))
            self._windows.clear()
            self._content.clear()

    def _add(self, kind: int, level: int, count: int, table: bytes, content: bytes) -> None:
        frame = self._codec.compress(content)
        self._records.append(RECORD.pack(kind, level, count, len(table), len(frame)) + table + frame)
