"""The presence bitmap: which pages of ``memory`` are here. One bit a page, in a mapping that others may share."""

from __future__ import annotations

import mmap

from imagefs import native


class Presence:
    """Bits over a writable mapping of ``ceil(pages / 8)`` bytes. Setting is atomic and releases what was written."""

    def __init__(self, bits: mmap.mmap, pages: int) -> None:
        self._bits = bits
        self.pages = pages

    def all(self, first: int, count: int) -> bool:
        return native.bits_all(self._bits, first, count)

    def count(self, first: int = 0, count: int | None = None) -> int:
        return native.bits_count(self._bits, first, self.pages - first if count is None else count)

    def set(self, first: int, count: int) -> None:
        """Only after the pages' bytes are in place: whoever sees a bit may read at once."""
        native.bits_set(self._bits, first, count)

    def clear(self, first: int, count: int) -> None:
        """Not atomic: only for a bitmap that nobody shares."""
        for page in range(first, min(first + count, self.pages)):
            self._bits[page >> 3] &= ~(1 << (page & 7))

    def bytes_at(self, offset: int, length: int) -> bytes:
        return self._bits[offset : offset + length]

    def close(self) -> None:
        self._bits.close()
