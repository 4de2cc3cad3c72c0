"""Byte sources put together from pages that lie scattered: in the native file, in a spool."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from imagefs.formats.spool import Spool
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import EXCEPTION_SIZE

_SLOT = 8
_SEARCH_SIZE = 64 << 10


class Scattered(Protocol):
    """What pages can be read from where they are: a file, or pieces of one."""

    def read_at(self, offset: int, length: int) -> bytes: ...

    def scatter_at(self, offset: int, pieces: Sequence[bytearray | memoryview]) -> None:
        """Fill the pieces, one after another, with what is at ``offset``: all of it must be there."""


class SupersededPages:
    """The k-th page is the one whose native offset is the k-th exception; ``read`` gets its bytes."""

    def __init__(self, exceptions: ByteSource, read: Callable[[int], bytes]) -> None:
        self._exceptions = exceptions
        self._read = read

    @property
    def size(self) -> int:
        return self._exceptions.size // EXCEPTION_SIZE * PAGE_SIZE

    def read_at(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        first, last = offset // PAGE_SIZE, (stop - 1) // PAGE_SIZE
        exceptions = array("Q", self._exceptions.read_at(first * EXCEPTION_SIZE, (last + 1 - first) * EXCEPTION_SIZE))
        if sys.byteorder == "big":
            exceptions.byteswap()
        pages = b"".join(map(self._read, exceptions))
        return pages[offset - first * PAGE_SIZE : stop - first * PAGE_SIZE]

    def next_data(self, offset: int) -> int:
        return min(offset, self.size)


class JoinedSource:
    """Sources end to end."""

    def __init__(self, parts: Sequence[ByteSource]) -> None:
        self._parts = parts
        self._starts = list(accumulate((part.size for part in parts), initial=0))

    @property
    def size(self) -> int:
        return self._starts[-1]

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        stop = min(offset + length, self.size)
        pieces = []
        for part, start in zip(self._parts, self._starts, strict=False):
            first, last = max(offset - start, 0), min(stop - start, part.size)
            if first < last:
                pieces.append(part.read_at(first, last - first))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def next_data(self, offset: int) -> int:
        for part, start in zip(self._parts, self._starts, strict=False):
            if offset < start + part.size:
                found = part.next_data(max(offset - start, 0))
                if found < part.size:
                    return start + found
        return self.size


class GatheredMemory:
    """Pages out of a file, wherever they are in it, and out of a spool those that the file has not as they are.

    ``newest`` holds a native 64-bit integer for each page: the page's offset in ``source``, or 0 for a page that is
    in ``aside`` (or a hole there). Reading is safe from several threads.
    """

    def __init__(self, newest: Spool, source: Scattered, aside: Spool) -> None:
        self._newest = newest
        self._source = source
        self._aside = aside
        self.size = newest.size // _SLOT * PAGE_SIZE

    def read_at(self, offset: int, length: int) -> memoryview:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return memoryview(b"")
        first, last = offset // PAGE_SIZE, (stop - 1) // PAGE_SIZE
        count = last + 1 - first
        places = array("Q", self._newest.read_at(first * _SLOT, count * _SLOT))
        pages = memoryview(bytearray(count * PAGE_SIZE))
        begin = 0
        while begin < count:
            end = begin + 1
            if not places[begin]:
                while end < count and not places[end]:
                    end += 1
                self._gather_aside(first + begin, pages[begin * PAGE_SIZE : end * PAGE_SIZE])
            else:
                stride = places[end] - places[begin] if end < count else PAGE_SIZE
                if not PAGE_SIZE <= stride <= 2 * PAGE_SIZE:
                    stride = PAGE_SIZE  # a page by itself: the next one may be anywhere
                else:
                    while end < count and places[end] - places[end - 1] == stride:
                        end += 1
                self._gather(places[begin], stride, pages[begin * PAGE_SIZE : end * PAGE_SIZE])
            begin = end
        return pages[offset - first * PAGE_SIZE : stop - first * PAGE_SIZE]

    def next_data(self, offset: int) -> int:
        aside = self._aside.next_data(offset)
        page = offset // PAGE_SIZE
        while page * PAGE_SIZE < aside:
            at = self._newest.next_data(page * _SLOT) // _SLOT * _SLOT
            slots = self._newest.read_at(at, _SEARCH_SIZE)
            empty = len(slots) - len(slots.lstrip(b"\0"))
            page = (at + empty) // _SLOT
            if empty < len(slots) or not slots:
                break
        return min(max(page * PAGE_SIZE, offset), aside, self.size)

    def _gather_aside(self, page: int, into: memoryview) -> None:
        if self._aside.next_data(page * PAGE_SIZE) < page * PAGE_SIZE + len(into):
            into[:] = self._aside.read_at(page * PAGE_SIZE, len(into))

    def _gather(self, native: int, stride: int, into: memoryview) -> None:
        """Pages that are ``stride`` bytes apart: read with what is between them, in one system call."""
        if stride == PAGE_SIZE:
            self._source.scatter_at(native, [into])
            return
        between = bytearray(stride - PAGE_SIZE)
        pieces: list[memoryview | bytearray] = [into[:PAGE_SIZE]]
        for at in range(PAGE_SIZE, len(into), PAGE_SIZE):
            pieces.append(between)
            pieces.append(into[at : at + PAGE_SIZE])
        self._source.scatter_at(native, pieces)
