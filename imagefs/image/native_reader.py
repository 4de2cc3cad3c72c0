"""Reading the native file through its template: which bytes come from where.

The pure parts (:func:`pieces`, :func:`split_superseded`, the bisections) decide, and touch no source; the mount
drives them asynchronously, :class:`NativeReader` synchronously for `verify` and for tests.

To read ``[offset, offset + length)`` of the native file: find the entry that holds ``offset`` by bisection over the
entries' native offsets; find the exceptions of the range likewise; cut the range into :func:`pieces` of this entry and
of those after it; cut each :class:`MemoryPiece` by the exceptions inside it; get each piece's bytes from its source,
those of memory by :func:`memory_span` at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import (
    ENTRY_SIZE,
    EXCEPTION_SIZE,
    LITERAL,
    PAGES,
    Entry,
    NativeTemplate,
    prefix_of_record,
)


@dataclass(frozen=True, slots=True)
class LiteralPiece:
    """``length`` bytes at ``offset`` of the literal stream."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PrefixPiece:
    """``length`` bytes from byte ``start`` of the prefix of an entry's ``index``-th record."""

    entry: Entry
    index: int
    start: int
    length: int

    def cut(self, prefix: bytes) -> bytes:
        """The piece's bytes, from the entry's prefix as it is in the literal stream."""
        return prefix_of_record(prefix, self.entry.stride, self.index)[self.start : self.start + self.length]


@dataclass(frozen=True, slots=True)
class MemoryPiece:
    """``length`` bytes at ``offset`` of memory, unless the template's exceptions say otherwise.

    ``native_offset`` is where the first of these bytes is in the native file. Pages of one piece follow each other
    there without anything between them.
    """

    offset: int
    length: int
    native_offset: int

    @property
    def first_page_at(self) -> int:
        """Native offset at which the page begins that holds the first byte: an exception names it so."""
        return self.native_offset - self.offset % PAGE_SIZE


@dataclass(frozen=True, slots=True)
class SupersededPiece:
    """``length`` bytes from byte ``start`` of the ``slot``-th page of the superseded stream."""

    slot: int
    start: int
    length: int

    @property
    def offset(self) -> int:
        """Where the bytes begin in the superseded stream."""
        return self.slot * PAGE_SIZE + self.start


Piece = LiteralPiece | PrefixPiece | MemoryPiece | SupersededPiece


def pieces(entry: Entry, start: int, stop: int) -> Iterator[LiteralPiece | PrefixPiece | MemoryPiece]:
    """What the bytes ``[start, stop)`` of the native file are, as far as ``entry`` holds them, in order."""
    start = max(start, entry.native_offset) - entry.native_offset
    stop = min(stop, entry.end) - entry.native_offset
    if start >= stop:
        return
    if entry.kind == LITERAL:
        yield LiteralPiece(entry.literal_offset + start, stop - start)
        return
    if entry.kind == PAGES and not entry.literal_length:
        yield MemoryPiece(entry.page * PAGE_SIZE + start, stop - start, entry.native_offset + start)
        return
    record = entry.record_size
    for index in range(start // record, (stop - 1) // record + 1):
        at = index * record
        first, last = max(start - at, 0), min(stop - at, record)
        prefix = entry.literal_length
        if first < prefix:
            yield PrefixPiece(entry, index, first, min(last, prefix) - first)
            first = prefix
        if first < last:
            offset = (entry.page + index) * PAGE_SIZE + first - prefix
            yield MemoryPiece(offset, last - first, entry.native_offset + at + first)


def memory_span(entry: Entry, start: int, stop: int) -> tuple[int, int]:
    """Offset and length of the part of memory that the :class:`MemoryPiece` of this range lie in, without gaps."""
    start = max(start, entry.native_offset) - entry.native_offset
    stop = min(stop, entry.end) - entry.native_offset
    if entry.kind != PAGES or start >= stop:
        return 0, 0
    record, prefix = entry.record_size, entry.literal_length
    first, last = start // record, (stop - 1) // record
    begin = (entry.page + first) * PAGE_SIZE + max(start - first * record - prefix, 0)
    end = (entry.page + last) * PAGE_SIZE + max(stop - last * record - prefix, 0)
    return (begin, end - begin) if begin < end else (0, 0)


def split_superseded(
    piece: MemoryPiece, exceptions: Sequence[int], first_slot: int
) -> Iterator[MemoryPiece | SupersededPiece]:
    """Cut a piece by the pages in it that memory has a later copy of.

    ``exceptions`` are ascending, the first of them being number ``first_slot`` of the table: at least all that are in
    ``[piece.first_page_at, end of the piece)``.
    """
    start, stop = piece.native_offset, piece.native_offset + piece.length
    shift = piece.offset - piece.native_offset
    for index in range(bisect_left(exceptions, piece.first_page_at), bisect_left(exceptions, stop)):
        slot, page_at = first_slot + index, exceptions[index]
        begin, end = max(page_at, start), min(page_at + PAGE_SIZE, stop)
        if start < begin:
            yield MemoryPiece(start + shift, begin - start, start)
        yield SupersededPiece(slot, begin - page_at, end - begin)
        start = end
    if start < stop:
        yield MemoryPiece(start + shift, stop - start, start)


def bisect(count: int, key_at: Callable[[int], int], value: int) -> int:
    """How many of ``count`` ascending keys are less than or equal to ``value``; asks for some log2(count) keys."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if key_at(middle) <= value:
            low = middle + 1
        else:
            high = middle
    return low


async def abisect(count: int, key_at: Callable[[int], Awaitable[int]], value: int) -> int:
    """:func:`bisect` for keys that must be waited for."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if await key_at(middle) <= value:
            low = middle + 1
        else:
            high = middle
    return low


def unpack_exceptions(data: bytes | memoryview) -> list[int]:
    """Exceptions out of their table's bytes."""
    return [int.from_bytes(data[at : at + EXCEPTION_SIZE], "little") for at in range(0, len(data), EXCEPTION_SIZE)]


class NativeReader:
    """The native file as a ByteSource, put together from a template and the memory. Raises ValueError for a template
    that no writer produces."""

    _ENTRIES_AT_ONCE = 256

    def __init__(self, template: NativeTemplate, memory: ByteSource) -> None:
        if template.entries.size % ENTRY_SIZE or template.exceptions.size % EXCEPTION_SIZE:
            raise ValueError("native template: its tables are not made of whole entries")
        self._template = template
        self._memory = memory
        self._entry_count = template.entries.size // ENTRY_SIZE
        self._exception_count = template.exceptions.size // EXCEPTION_SIZE

    @property
    def size(self) -> int:
        return self._template.size

    def read_at(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        out: list[bytes | memoryview] = []
        at = offset
        exceptions, first_slot = self._exceptions_between(offset - PAGE_SIZE + 1, stop)
        for entry in self._entries_from(offset):
            if entry.native_offset > at:
                raise ValueError(f"native template: nothing says what is at native offset {at}")
            out += self._read_entry(entry, at, stop, exceptions, first_slot)
            at = entry.end
            if at >= stop:
                break
        else:
            raise ValueError(f"native template: its entries end at {at}, the file at {self.size}")
        return b"".join(out)

    def next_data(self, offset: int) -> int:
        return min(offset, self.size)

    def _entries_from(self, offset: int) -> Iterator[Entry]:
        number = max(0, bisect(self._entry_count, lambda index: self._entry(index).native_offset, offset) - 1)
        while number < self._entry_count:
            data = self._template.entries.read_at(number * ENTRY_SIZE, self._ENTRIES_AT_ONCE * ENTRY_SIZE)
            for at in range(0, len(data), ENTRY_SIZE):
                entry = Entry.unpack(data, at)
                entry.check_sources(self._template.literals.size, self._memory.size)
                yield entry
            number += self._ENTRIES_AT_ONCE

    def _entry(self, index: int) -> Entry:
        return Entry.unpack(self._template.entries.read_at(index * ENTRY_SIZE, ENTRY_SIZE))

    def _exception(self, index: int) -> int:
        return unpack_exceptions(self._template.exceptions.read_at(index * EXCEPTION_SIZE, EXCEPTION_SIZE))[0]

    def _exceptions_between(self, start: int, stop: int) -> tuple[list[int], int]:
        """Those with native offsets in ``[start, stop)``, and the number of the first of them."""
        if not self._exception_count:
            return [], 0
        first = bisect(self._exception_count, self._exception, start - 1)
        last = bisect(self._exception_count, self._exception, stop - 1)
        table = self._template.exceptions.read_at(first * EXCEPTION_SIZE, (last - first) * EXCEPTION_SIZE)
        return unpack_exceptions(table), first

    def _read_entry(
        self, entry: Entry, start: int, stop: int, exceptions: Sequence[int], first_slot: int
    ) -> Iterator[bytes | memoryview]:
        template = self._template
        span_at, span_size = memory_span(entry, start, stop)
        span = memoryview(self._read(self._memory, span_at, span_size))
        prefix = b""
        for piece in pieces(entry, start, stop):
            if isinstance(piece, MemoryPiece):
                for part in split_superseded(piece, exceptions, first_slot):
                    if isinstance(part, SupersededPiece):
                        yield self._read(template.superseded, part.offset, part.length)
                    else:
                        yield span[part.offset - span_at : part.offset - span_at + part.length]
            elif isinstance(piece, PrefixPiece):
                prefix = prefix or bytes(self._read(template.literals, entry.literal_offset, entry.literal_length))
                yield piece.cut(prefix)
            else:
                yield self._read(template.literals, piece.offset, piece.length)

    def _read(self, source: ByteSource, offset: int, length: int) -> bytes | memoryview:
        data = source.read_at(offset, length) if length else b""
        if len(data) != length:
            raise ValueError(f"native template: a source ends before {offset + length}, where it is still needed")
        return data
