"""Memory out of ranges of files, and files out of that memory: for formats whose pages lie in files as they are."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import MAX_PREFIX, TemplateBuilder

_BUFFER_SIZE = 1 << 20
_PIECE_SIZE = 64 << 10
_ZEROS = bytes(max(MAX_PREFIX, _PIECE_SIZE))


class PieceMemory:
    """Ranges of other sources one after the other, zeros between them: a ByteSource of ``size`` bytes.

    Some 30 bytes a range are kept. Reading is safe from several threads if it is in the sources.
    """

    def __init__(self) -> None:
        self.size = 0
        self._starts, self._lengths, self._places = array("Q"), array("Q"), array("Q")
        self._numbers = array("I")
        self._sources: list[ByteSource] = []
        self._known: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<PieceMemory of {self.size} bytes in {len(self._starts)} pieces>"

    def add(self, offset: int, source: ByteSource, place: int, length: int) -> None:
        """``length`` bytes at ``place`` of ``source`` are at ``offset`` of this memory, behind all that was added."""
        number = self._known.setdefault(id(source), len(self._sources))
        if number == len(self._sources):
            self._sources.append(source)
        assert offset >= (self._starts[-1] + self._lengths[-1] if self._starts else 0)
        if (
            self._starts
            and self._numbers[-1] == number
            and self._starts[-1] + self._lengths[-1] == offset
            and self._places[-1] + self._lengths[-1] == place
        ):
            self._lengths[-1] += length
        else:
            self._starts.append(offset)
            self._lengths.append(length)
            self._places.append(place)
            self._numbers.append(number)
        self.size = offset + length

    def pad(self, size: int) -> None:
        """Zeros up to ``size``."""
        self.size = max(self.size, size)

    def read_at(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        out: list[bytes | memoryview] = []
        at = offset
        for index in range(max(bisect_right(self._starts, offset) - 1, 0), len(self._starts)):
            start, end = self._starts[index], self._starts[index] + self._lengths[index]
            if start >= stop:
                break
            if end <= at:
                continue
            if at < start:
                out.append(bytes(start - at))
                at = start
            count = min(end, stop) - at
            out.append(self._sources[self._numbers[index]].read_at(self._places[index] + at - start, count))
            at += count
        if at < stop:
            out.append(bytes(stop - at))
        return bytes(out[0]) if len(out) == 1 else b"".join(out)

    def next_data(self, offset: int) -> int:
        for index in range(max(bisect_right(self._starts, offset) - 1, 0), len(self._starts)):
            start, place = self._starts[index], self._places[index]
            first = max(offset - start, 0)
            if first < self._lengths[index]:
                found = self._sources[self._numbers[index]].next_data(place + first) - place
                if found < self._lengths[index]:
                    return start + max(found, first)
        return self.size


@dataclass(frozen=True, slots=True)
class PageRun:
    """``count`` whole pages at ``offset`` bytes of a file that are in memory from page number ``page`` on."""

    offset: int
    page: int
    count: int


def record_file(native: TemplateBuilder, source: ByteSource, runs: Iterable[PageRun] = ()) -> None:
    """The whole file into the native template: ``runs``, ascending and apart, as pages of memory, the rest as it is."""
    at = 0
    for run in runs:
        record_literals(native, source, at, run.offset)
        native.pages(run.page, run.count)
        at = run.offset + run.count * PAGE_SIZE
    record_literals(native, source, at, source.size)


def record_literals(native: TemplateBuilder, source: ByteSource, start: int, stop: int) -> None:
    """Bytes ``[start, stop)`` of a file as they are. Holes and zeros take next to nothing: records without a page
    repeat one prefix."""
    while start < stop:
        data_at = min(source.next_data(start), stop)
        _zeros(native, data_at - start)
        start = data_at
        data = memoryview(source.read_at(start, min(_BUFFER_SIZE, stop - start)))
        for at in range(0, len(data), _PIECE_SIZE):
            piece = data[at : at + _PIECE_SIZE]
            if piece == _ZEROS[: len(piece)]:
                _zeros(native, len(piece))
            else:
                native.literal(piece)
        start += len(data)


def _zeros(native: TemplateBuilder, length: int) -> None:
    for size in (MAX_PREFIX, PAGE_SIZE):
        native.bare(length // size, _ZEROS[:size], 0)
        length %= size
    native.literal(_ZEROS[:length])


def page_runs(spans: Iterable[tuple[int, int, int]]) -> Iterator[PageRun]:
    """Of ``(offset in the file, length, offset in memory)``, in bytes, the whole pages of memory."""
    for offset, length, place in spans:
        skip = -place % PAGE_SIZE
        count = (length - skip) // PAGE_SIZE
        if count > 0:
            yield PageRun(offset + skip, (place + skip) // PAGE_SIZE, count)
