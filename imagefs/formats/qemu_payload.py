"""Page records of a QEMU migration stream whose page is not there as it is: deflated, or a delta to an earlier copy.

Behind the header and the block's name of a record (qemu_ram.py), integers big-endian:

| flag  | name          | contents                                                                         |
|-------|---------------|----------------------------------------------------------------------------------|
| 0x100 | COMPRESS_PAGE | length u32, a zlib stream that inflates to 4096 bytes                            |
| 0x040 | XBZRLE        | encoding u8 = 1, length u16, runs (QEMU's docs/devel/migration, migration/xbzrle.c) |

XBZRLE runs alternate: so many bytes that are as they were, so many that are new, and these. A length is ULEB128 of at
most two bytes; only the very first may be zero. What no run reaches is as it was.
"""

from __future__ import annotations

import struct
import zlib

from imagefs.formats.stream_cursor import StreamCursor
from imagefs.image.geometry import PAGE_SIZE

_MAX_COMPRESSED = 4110
"""zlib's compressBound(4096), as QEMU checks it."""
_ENCODING_XBZRLE = 1

_U32 = struct.Struct(">I")
_DELTA_HEADER = struct.Struct(">BH")


def inflated_page(cursor: StreamCursor, prefix: int) -> bytes:
    """The page of a COMPRESS_PAGE record whose contents begin ``prefix`` bytes ahead; the record is passed as literals.

    Deflating the page again would not have to give the same bytes, so the template keeps them.
    """
    field = "length of compressed RAM page"
    cursor.need(prefix + _U32.size, field)
    length: int = _U32.unpack_from(cursor.buffer, cursor.start + prefix)[0]
    if not 0 < length <= _MAX_COMPRESSED:
        raise cursor.error(f"{length:#x} is impossible for {PAGE_SIZE} bytes", field, back=-prefix)
    field = "compressed RAM page"
    cursor.need(prefix + _U32.size + length, field)
    cursor.skip(prefix + _U32.size)
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(cursor.take(length, field), PAGE_SIZE + 1)
    except zlib.error as error:
        raise cursor.error(f"not a zlib stream ({error})", field, back=length) from error
    if len(data) != PAGE_SIZE or not inflate.eof or inflate.unused_data:
        raise cursor.error(f"does not inflate to exactly {PAGE_SIZE} bytes", field, back=length)
    return data


def delta_page(cursor: StreamCursor, prefix: int, old: bytes) -> bytes:
    """The page of an XBZRLE record, ``old`` being the copy before it; the record is passed as literals."""
    field = "header of RAM page delta"
    cursor.need(prefix + _DELTA_HEADER.size, field)
    encoding, length = _DELTA_HEADER.unpack_from(cursor.buffer, cursor.start + prefix)
    if encoding != _ENCODING_XBZRLE or not 0 < length <= PAGE_SIZE:
        raise cursor.error(f"encoding {encoding} with {length} bytes is not understood", field, back=-prefix)
    field = "RAM page delta"
    cursor.need(prefix + _DELTA_HEADER.size + length, field)
    cursor.skip(prefix + _DELTA_HEADER.size)
    delta = cursor.take(length, field)
    try:
        return _applied(old, delta)
    except ValueError as error:
        raise cursor.error(str(error), field, back=length) from error


def _applied(old: bytes, delta: bytes) -> bytes:
    page = bytearray(old)
    position = at = 0
    while position < len(delta):
        same, position_after = _run_length(delta, position)
        if not same and position:
            raise ValueError("a run of no bytes")
        fresh, position = _run_length(delta, position_after)
        at += same
        if not fresh or at + fresh > PAGE_SIZE or position + fresh > len(delta):
            raise ValueError(f"a run of {fresh} bytes at {at:#x} of the page")
        page[at : at + fresh] = delta[position : position + fresh]
        at += fresh
        position += fresh
    return bytes(page)


def _run_length(delta: bytes, position: int) -> tuple[int, int]:
    """The length, and where what follows it begins."""
    piece = delta[position : position + 2]
    if piece and piece[0] < 0x80:
        return piece[0], position + 1
    if len(piece) < 2 or piece[1] >= 0x80:
        raise ValueError("a run's length is cut short or too long")
    return piece[0] & 0x7F | piece[1] << 7, position + 2
