"""A stream whose bytes are in pieces of a file, and the native template of that file.

The stream is read as if it were a file of its own, its pages in place; its template, in offsets of the stream, is then
laid over the file, piece by piece in the file's order. Records that a piece's end cuts become literals.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from imagefs.formats.pieces import record_literals
from imagefs.formats.spool import FileSource, Spool
from imagefs.image.capture import ByteSource
from imagefs.image.native import ENTRY_SIZE, LITERAL, PAGES, Entry, NativeTemplate, TemplateBuilder, prefix_of_record
from imagefs.image.native_reader import bisect

_COPY_SIZE = 1 << 20


class EmbeddedStream:
    """The pieces end to end: a ByteSource, and what pages can be gathered from. Reading is safe from several threads.

    Some 24 bytes a piece are kept.
    """

    def __init__(self, file: FileSource | Spool) -> None:
        self.file = file
        self.size = 0
        self._starts, self._places, self._lengths = array("Q"), array("Q"), array("Q")
        self._position = 0

    def __repr__(self) -> str:
        return f"<EmbeddedStream of {self.size} bytes in {len(self._starts)} pieces>"

    def add(self, place: int, length: int) -> None:
        """The stream goes on with ``length`` bytes at ``place`` of the file."""
        if self._starts and self._places[-1] + self._lengths[-1] == place:
            self._lengths[-1] += length
        else:
            self._starts.append(self.size)
            self._places.append(place)
            self._lengths.append(length)
        self.size += length

    def in_file_order(self) -> Iterator[tuple[int, int, int]]:
        """``(place in the file, offset in the stream, length)``. Raises ValueError where pieces overlap."""
        end = 0
        for index in sorted(range(len(self._starts)), key=self._places.__getitem__):
            if self._places[index] < end:
                raise ValueError(f"two pieces of the stream are at {self._places[index]:#x}")
            end = self._places[index] + self._lengths[index]
            yield self._places[index], self._starts[index], self._lengths[index]

    def read_into(self, buffer: memoryview) -> int:
        """The stream from its start to its end, as a cursor wants it."""
        data = self.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        spans = list(self._spans(offset, length))
        parts = [self.file.read_at(place, count) for place, count in spans]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def scatter_at(self, offset: int, pieces: Sequence[bytearray | memoryview]) -> None:
        spans = list(self._spans(offset, sum(map(len, pieces))))
        if len(spans) == 1 and isinstance(self.file, FileSource):
            self.file.scatter_at(spans[0][0], pieces)
            return
        for piece in pieces:
            piece[:] = self.read_at(offset, len(piece))
            offset += len(piece)

    def next_data(self, offset: int) -> int:
        return min(offset, self.size)

    def _spans(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Where in the file these bytes are."""
        stop = min(offset + length, self.size)
        index = bisect_right(self._starts, offset) - 1
        while offset < stop:
            skip = offset - self._starts[index]
            count = min(self._lengths[index] - skip, stop - offset)
            yield self._places[index] + skip, count
            offset += count
            index += 1


def lay_over(native: TemplateBuilder, stream: EmbeddedStream, inner: NativeTemplate) -> None:
    """The whole file into ``native``: where the stream is as its template ``inner`` says, the rest as it is.

    Superseded copies are looked up by their offset, which changes here, so a stream that has any is kept as it is.
    Raises ValueError where the stream's pieces overlap.
    """
    at = 0
    for place, start, length in stream.in_file_order():
        record_literals(native, stream.file, at, place)
        if inner.exceptions.size:
            record_literals(native, stream.file, place, place + length)
        else:
            for entry in _entries(inner, start):
                if entry.native_offset >= start + length:
                    break
                _lay(native, stream, inner.literals, entry, start, start + length)
        at = place + length
    record_literals(native, stream.file, at, stream.file.size)


def _entries(template: NativeTemplate, offset: int) -> Iterator[Entry]:
    """From the one that holds ``offset`` on."""

    def entry(index: int) -> Entry:
        return Entry.unpack(template.entries.read_at(index * ENTRY_SIZE, ENTRY_SIZE))

    count = template.entries.size // ENTRY_SIZE
    for index in range(max(bisect(count, lambda index: entry(index).native_offset, offset) - 1, 0), count):
        yield entry(index)


def _lay(
    native: TemplateBuilder, stream: EmbeddedStream, literals: ByteSource, entry: Entry, start: int, stop: int
) -> None:
    """What of the entry is in ``[start, stop)`` of the stream."""
    start, stop = max(start, entry.native_offset), min(stop, entry.end)
    if entry.kind == LITERAL:
        _copy(native, stream, start, stop)
        return
    size = entry.record_size
    first = -(-(start - entry.native_offset) // size)
    last = (stop - entry.native_offset) // size
    if first >= last:
        _copy(native, stream, start, stop)
        return
    begin, end = entry.native_offset + first * size, entry.native_offset + last * size
    _copy(native, stream, start, begin)
    prefix = bytes(literals.read_at(entry.literal_offset, entry.literal_length))
    prefix = prefix_of_record(prefix, entry.stride, first)
    if entry.kind == PAGES:
        native.pages(entry.page + first, last - first, prefix, entry.stride)
    else:
        native.bare(last - first, prefix, entry.stride)
    _copy(native, stream, end, stop)


def _copy(native: TemplateBuilder, stream: EmbeddedStream, start: int, stop: int) -> None:
    for at in range(start, stop, _COPY_SIZE):
        native.literal(stream.read_at(at, min(_COPY_SIZE, stop - at)))
