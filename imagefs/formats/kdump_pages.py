"""Bitmap and pages of a kdump-compressed dump: see kdump.py for the layout."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

import zstandard

from imagefs.errors import UnsupportedInputError
from imagefs.formats.spool import Spool
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE, Geometry

BLOCK = PAGE_SIZE

_ZLIB, _ZSTD = 0x1, 0x20
_REFUSED = {0x2: "lzo", 0x4: "snappy"}
_METHODS = _ZLIB | 0x2 | 0x4 | _ZSTD
_DESCRIPTOR = struct.Struct("<QII8x")
_MAX_COMPRESSED = 2 * PAGE_SIZE
_ZEROS = bytes(PAGE_SIZE)

_BITMAP_PIECE = 1 << 16
_ONES = re.compile("1+")
_BATCH = 512
_WINDOW = 1 << 20


class Frames:
    """The page frames that are in the dump, from its second bitmap."""

    def __init__(self, dump: ByteSource, offset: int, size: int, end: int) -> None:
        self._dump = dump
        self._offset = offset
        self._size = size
        self._end = end
        if offset + size > dump.size:
            reason = f"the file ends after {max(0, dump.size - offset)} of its {size} bytes"
            raise UnsupportedInputError(reason, field="second bitmap", offset=offset)

    def runs(self) -> Iterator[tuple[int, int]]:
        """``(first frame, count)``, ascending, neighbours joined."""
        first, count = 0, 0
        for at in range(0, min(self._size, (self._end + 7) // 8), _BITMAP_PIECE):
            data = bytes(self._dump.read_at(self._offset + at, min(_BITMAP_PIECE, self._size - at)))
            bits = bin(int.from_bytes(data, "little"))[:1:-1][: self._end - at * 8]
            for match in _ONES.finditer(bits):
                pfn, length = at * 8 + match.start(), len(match[0])
                if pfn == first + count:
                    count += length
                    continue
                if count:
                    yield first, count
                first, count = pfn, length
        if count:
            yield first, count


def read_pages(dump: ByteSource, offset: int, frames: Frames, geometry: Geometry, memory: Spool) -> None:
    """Decompress all pages into their places; the descriptors are at ``offset``."""
    reader = _PageReader(dump, offset)
    for pfn, count in frames.runs():
        page = geometry.page_of_pfn(pfn)
        assert page is not None
        for first in range(0, count, _BATCH):
            batch = min(_BATCH, count - first)
            reader.read(page + first, batch, memory)


class _PageReader:
    def __init__(self, dump: ByteSource, offset: int) -> None:
        self._dump = dump
        self._descriptor_at = offset
        self._window_at = 0
        self._window = b""
        self._zeros_at = -1  # zero pages share their bytes
        self._zstd = zstandard.ZstdDecompressor()

    def read(self, page: int, count: int, memory: Spool) -> None:
        at = self._descriptor_at
        table = bytes(self._dump.read_at(at, count * _DESCRIPTOR.size))
        if len(table) < count * _DESCRIPTOR.size:
            raise UnsupportedInputError("the file ends before its end", field="page descriptors", offset=at)
        pieces: list[bytes] = []
        for place, size, flags in _DESCRIPTOR.iter_unpack(table):
            data = _ZEROS if place == self._zeros_at else self._page(place, size, flags, at)
            if data == _ZEROS:
                self._zeros_at = place
                self._write(memory, page, pieces)
                page += len(pieces) + 1
                pieces = []
            else:
                pieces.append(data)
            at += _DESCRIPTOR.size
        self._write(memory, page, pieces)
        self._descriptor_at = at

    @staticmethod
    def _write(memory: Spool, page: int, pieces: list[bytes]) -> None:
        if pieces:
            memory.write_all_at(page * PAGE_SIZE, pieces)

    def _page(self, place: int, size: int, flags: int, at: int) -> bytes:
        """``at`` is where the page's descriptor is."""
        method = flags & _METHODS
        if method in _REFUSED:
            reason = (
                f"the page is compressed with {_REFUSED[method]}, which is not supported: dump again as kdump-zlib or"
                " elf, or convert the dump with makedumpfile -c"
            )
            raise UnsupportedInputError(reason, field="page descriptor", offset=at)
        if not 0 < size <= _MAX_COMPRESSED or (not method and size != PAGE_SIZE):
            raise UnsupportedInputError(f"a page of {size:#x} bytes", field="page descriptor", offset=at)
        packed = self._bytes(place, size)
        if len(packed) < size:
            reason = f"{size:#x} bytes at {place:#x}, beyond the end of the file"
            raise UnsupportedInputError(reason, field="page descriptor", offset=at)
        try:
            data = self._unpack(packed, method)
        except (zlib.error, zstandard.ZstdError) as error:
            raise UnsupportedInputError(f"cannot be decompressed ({error})", field="page", offset=place) from error
        if len(data) != PAGE_SIZE:
            raise UnsupportedInputError(f"not exactly {PAGE_SIZE} bytes", field="page", offset=place)
        return data

    def _unpack(self, packed: bytes, method: int) -> bytes:
        if method == _ZLIB:
            inflate = zlib.decompressobj()
            data = inflate.decompress(packed, PAGE_SIZE + 1)
            return data if inflate.eof else b""
        if method == _ZSTD:
            return self._zstd.decompress(packed, max_output_size=PAGE_SIZE)
        return packed if not method else b""

    def _bytes(self, place: int, size: int) -> bytes:
        """Pages lie one after the other, so that they are read many at a time."""
        begin = place - self._window_at
        if not 0 <= begin <= len(self._window) - size:
            self._window_at = place
            self._window = bytes(self._dump.read_at(place, _WINDOW)) if place < self._dump.size else b""
            begin = 0
        return self._window[begin : begin + size]
