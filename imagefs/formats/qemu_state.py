"""The device state of a QEMU guest as a plain migration stream: what `-incoming` loads when RAM comes from a file.

The form does not depend on how and how fast the guest was saved: configuration without the capabilities subsection;
RAM as SECTION_START with a block table without addresses, one SECTION_PART with the pages of all blocks but main memory
(left out where there are none), and SECTION_END without any; everything else as it was. Page records are plain, each
with its block's name: no zlib, no CONTINUE, zero pages as such.
"""

from __future__ import annotations

import struct

from imagefs.formats.spool import Buffer, Spool
from imagefs.image.geometry import PAGE_SIZE

SECTION_PART, SECTION_END, SECTION_FOOTER = 0x02, 0x03, 0x7E

FLAG_ZERO = 0x02
FLAG_PAGE = 0x08
FLAG_EOS = 0x10

_HEADER = struct.Struct(">QB")
_ZERO_PAGE = bytes(PAGE_SIZE)
_COPY_SIZE = 1 << 20


def page_record(block: str, offset: int, data: Buffer) -> bytes:
    """The record of a page, ``offset`` bytes from its block's start."""
    name = block.encode("ascii")
    if data == _ZERO_PAGE:
        # Since QEMU 8.2 a ZERO record with another fill byte is refused, so only zeros become one.
        return _HEADER.pack(offset | FLAG_ZERO, len(name)) + name + b"\0"
    return _HEADER.pack(offset | FLAG_PAGE, len(name)) + name + data


class StateWriter:
    """Appends to a spool: :meth:`raw` before RAM, :meth:`start_ram` … :meth:`finish_ram`, :meth:`raw` after it."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._section = b""  # the RAM section's id
        self._footer = b""
        self._open = False  # a section is, that records can go into
        self._held = b""
        self._records: Spool | None = None  # pages that came with the block table

    def raw(self, data: Buffer) -> None:
        """Anything that goes into the stream as it is."""
        self.spool.append(data)

    def start_ram(self, section: int, header: bytes) -> None:
        """``header`` is that of SECTION_START up to and including its version; the block table follows."""
        self._section = section.to_bytes(4, "big")
        self.raw(header)
        self._open = True

    def close_start(self, footers: bool) -> None:
        """The first section is complete; whether sections have footers is known from here on."""
        self._footer = bytes([SECTION_FOOTER]) + self._section if footers else b""
        self._close()
        if self._records is not None and self._records.size:
            self._open_part()
            for at in range(0, self._records.size, _COPY_SIZE):
                self.raw(self._records.read_at(at, _COPY_SIZE))

    def records(self, records: Spool) -> None:
        """Page records that are to go behind the first section."""
        self._records = records

    def command(self, data: bytes) -> None:
        """A command between sections of RAM: it waits until RAM is complete."""
        self._held += data

    def page(self, block: str, offset: int, data: bytes) -> None:
        """A page of a block, ``offset`` bytes from the block's start."""
        if not self._open:
            self._open_part()
        self.raw(page_record(block, offset, data))

    def finish_ram(self) -> None:
        if self._open:
            self._close()
        self.raw(self._held + bytes([SECTION_END]) + self._section)
        self._close()

    def _open_part(self) -> None:
        self.raw(bytes([SECTION_PART]) + self._section)
        self._open = True

    def _close(self) -> None:
        self.raw(FLAG_EOS.to_bytes(8, "big") + self._footer)
        self._open = False
