"""Packs: objects into which chunks and index blocks are gathered, so that a store holds hundreds of files.

| offset        | bytes | field    | meaning                                                |
|--------------:|------:|----------|--------------------------------------------------------|
|             0 |     8 | magic    | ``IFSPACK1``                                           |
|             8 |     … | payloads | end to end, in the order of the table                  |
|           toc |  44 n | table    | n entries, see below                                   |
| end -      16 |     4 | toc      | where the table begins                                 |
| end -      12 |     4 | n        | entries in the table                                   |
| end -       8 |     8 | magic    | ``1KCAPSFI``                                           |

A table entry: digest 32, offset u32, length u32, pages u32. All integers are little-endian. ``pages`` is the number of
pages of a chunk's content, 0 for an index block. The pack's name is the BLAKE3 digest of all its bytes. Readers of an
image never need the table: the index gives offset and length. It is there for writers, who find in it what a store
already has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import digest

MAGIC, END_MAGIC = b"IFSPACK1", b"1KCAPSFI"
TOC_ENTRY = struct.Struct("<32sIII")
FOOTER = struct.Struct("<II8s")
FOOTER_SIZE = FOOTER.size

TARGET_SIZE = 32 << 20
"""A pack is closed at this many bytes: 64 GiB of mostly used memory make some 700 packs."""
MAX_PACK_SIZE = TARGET_SIZE + (8 << 20)
"""No pack is larger: the target, one payload and the table."""
MAX_ENTRIES = 16384
"""… or at this many payloads, which bounds what a writer remembers of an open pack."""


@dataclass(frozen=True, slots=True)
class TocEntry:
    digest: bytes
    offset: int
    length: int
    pages: int


class PackBuilder:
    """A pack in the making, held in memory (at most TARGET_SIZE plus one payload)."""

    def __init__(self) -> None:
        self._size = len(MAGIC)
        self._pieces = [MAGIC]
        self._toc: list[TocEntry] = []

    @property
    def empty(self) -> bool:
        return not self._toc

    @property
    def full(self) -> bool:
        return self._size >= TARGET_SIZE or len(self._toc) >= MAX_ENTRIES

    def add(self, content_digest: bytes, payload: bytes, pages: int) -> int:
        """Append a payload; returns its offset in the pack."""
        offset = self._size
        self._pieces.append(payload)
        self._size += len(payload)
        self._toc.append(TocEntry(content_digest, offset, len(payload), pages))
        return offset

    def finish(self) -> tuple[bytes, bytes, list[TocEntry]]:
        """The pack's name (32 bytes), its bytes and its table. The builder must not be used afterwards."""
        self._pieces += [TOC_ENTRY.pack(entry.digest, entry.offset, entry.length, entry.pages) for entry in self._toc]
        self._pieces.append(FOOTER.pack(self._size, len(self._toc), END_MAGIC))
        data = b"".join(self._pieces)
        self._pieces.clear()
        return digest(data), data, self._toc


def parse_footer(footer: bytes, size: int, *, key: str, origin: str) -> tuple[int, int] | None:
    """``(offset, length)`` of the table of an object of ``size`` bytes, None if it is no pack."""
    if len(footer) != FOOTER_SIZE:
        return None
    toc, count, magic = FOOTER.unpack(footer)
    if magic != END_MAGIC:
        return None
    if toc < len(MAGIC) or toc + count * TOC_ENTRY.size + FOOTER_SIZE != size:
        raise CorruptObjectError(f"pack table: {count} entries at {toc:#x} do not fit", key=key, origin=origin)
    return toc, count * TOC_ENTRY.size


def parse_toc(table: bytes) -> Iterator[TocEntry]:
    """The entries of a table; its length was checked by :func:`parse_footer`."""
    for fields in TOC_ENTRY.iter_unpack(table):
        yield TocEntry(*fields)
