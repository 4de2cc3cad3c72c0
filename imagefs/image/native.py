"""The template of the file that was split: how to put it together again, byte for byte.

A template is a list of fixed-size entries sorted by their offset in the native file, so that a reader finds
any offset by binary search without holding the list. An entry is either a piece of *literal* bytes, or a run of
*records*: a prefix (say, a migration stream's page header) followed by one guest page, ``count`` times, the
page numbers consecutive and the prefix's first eight bytes, a big-endian integer, growing by ``stride``.

| offset | bytes | field          | meaning                                                                  |
|-------:|------:|----------------|--------------------------------------------------------------------------|
|      0 |     8 | native_offset  | where the entry's bytes begin in the native file                         |
|      8 |     8 | literal_offset | where its literal bytes, or its prefix, begin in the literal stream      |
|     16 |     8 | page           | first page number (kind PAGES), otherwise zero                           |
|     24 |     4 | count          | records in the run; 1 for a literal                                      |
|     28 |     4 | literal_length | bytes of the literal, or of the prefix                                   |
|     32 |     4 | stride         | added to the prefix's leading 64-bit big-endian integer for each record  |
|     36 |     4 | kind           | 0 LITERAL, 1 PAGES (prefix + page), 2 BARE (prefix only, no page)        |

All little-endian, 40 bytes. Pages that the source held more than once (a live-migrated guest) are in memory as
their last copy; the earlier copies are in the *superseded* stream, found through the *exceptions* table: 8-byte
little-endian native offsets of the page bytes, ascending; the k-th belongs to the k-th page of *superseded*.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagefs.image.geometry import PAGE_SIZE

if TYPE_CHECKING:
    from imagefs.image.capture import ByteSource

ENTRY = struct.Struct("<QQQIIII")
ENTRY_SIZE = ENTRY.size
EXCEPTION_SIZE = 8

LITERAL, PAGES, BARE = 0, 1, 2

MAX_COUNT = 2**32 - 1
MAX_LITERAL = 2**30
"""Longer literals are cut, so that literal_length never overflows."""
MAX_PREFIX = 1 << 16
"""Bytes of a record's prefix: a page's header takes some hundred at most, and readers hold prefixes in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the template; fields as in the table above, bytes and page numbers."""

    native_offset: int
    literal_offset: int
    page: int
    count: int
    literal_length: int
    stride: int
    kind: int

    @property
    def record_size(self) -> int:
        return self.literal_length + (PAGE_SIZE if self.kind == PAGES else 0)

    @property
    def end(self) -> int:
        """Native offset of the first byte after the entry."""
        return self.native_offset + self.count * self.record_size

    def pack(self) -> bytes:
        return ENTRY.pack(
            self.native_offset,
            self.literal_offset,
            self.page,
            self.count,
            self.literal_length,
            self.stride,
            self.kind,
        )

    @classmethod
    def unpack(cls, data: bytes | memoryview, offset: int = 0) -> Entry:
        """Raises ValueError for fields that no writer produces."""
        entry = cls(*ENTRY.unpack_from(data, offset))
        if entry.kind not in (LITERAL, PAGES, BARE) or entry.count == 0 or entry.record_size == 0:
            raise ValueError(f"native template: bad entry at native offset {entry.native_offset}")
        if entry.kind == LITERAL and (entry.count != 1 or entry.stride):
            raise ValueError(f"native template: a repeated literal at native offset {entry.native_offset}")
        if entry.stride and entry.literal_length < 8:
            raise ValueError(f"native template: stride without a counter at native offset {entry.native_offset}")
        if entry.literal_length > (MAX_LITERAL if entry.kind == LITERAL else MAX_PREFIX):
            what = f"{entry.literal_length} bytes of literal or prefix"
            raise ValueError(f"native template: {what} at native offset {entry.native_offset}")
        return entry

    def check_sources(self, literals: int, memory: int) -> None:
        """ValueError if the entry needs more than there is; the sizes of both streams in bytes."""
        where = f"needed at native offset {self.native_offset}"
        end = self.literal_offset + self.literal_length
        if self.literal_length and end > literals:
            raise ValueError(f"native template: a source ends before byte {end} of the literals, {where}")
        if self.kind == PAGES and (self.page + self.count) * PAGE_SIZE > memory:
            raise ValueError(f"native template: a source ends before page {self.page + self.count} of memory, {where}")


@dataclass(frozen=True)
class NativeTemplate:
    """The four parts of a template, and the size of the native file in bytes."""

    size: int
    entries: ByteSource
    literals: ByteSource
    exceptions: ByteSource
    superseded: ByteSource


def prefix_of_record(prefix: bytes, stride: int, index: int) -> bytes:
    """The prefix of the ``index``-th record of a run."""
    if not stride or not index:
        return prefix
    counter = (int.from_bytes(prefix[:8], "big") + stride * index) % 2**64
    return counter.to_bytes(8, "big") + prefix[8:]


class TemplateBuilder:
    """Collects entries in file order and joins what continues the run before it.

    ``emit_entry`` and ``emit_literal`` receive packed bytes as they become final; nothing else is kept, so the
    memory used does not grow with the file.
    """

    def __init__(self, emit_entry: Callable[[bytes], None], emit_literal: Callable[[bytes], None]) -> None:
        self._emit_entry = emit_entry
        self._emit_literal = emit_literal
        self._literal_size = 0
        self.size = 0
        # The run that may still grow: its first entry's fields, and its prefix.
        self._run: Entry | None = None
        self._prefix = b""

    def literal(self, data: bytes | memoryview) -> None:
        """Bytes that are no page."""
        while len(data):
            run = self._run
            if run is None or run.kind != LITERAL or run.literal_length >= MAX_LITERAL:
                self._start(Entry(self.size, self._literal_size, 0, 1, 0, 0, LITERAL))
                run = self._run
                assert run is not None
            piece = data[: MAX_LITERAL - run.literal_length]
            self._emit_literal(bytes(piece))
            self._literal_size += len(piece)
            self.size += len(piece)
            self._run = Entry(run.native_offset, run.literal_offset, 0, 1, run.literal_length + len(piece), 0, LITERAL)
            data = data[len(piece) :]

    def pages(self, page: int, count: int = 1, prefix: bytes = b"", stride: int = 0) -> int:
        """``count`` records of ``prefix`` + page, from page number ``page`` on.

        Returns the native offset of the first page's bytes: what :meth:`NativeTemplate.exceptions` names when a
        later copy of the page supersedes this one.
        """
        at = self.size + len(prefix)
        self._records(PAGES, page, count, prefix, stride)
        return at

    def bare(self, count: int, prefix: bytes, stride: int) -> None:
        """``count`` records of ``prefix`` alone: page headers whose page is not in the file (zero pages)."""
        self._records(BARE, 0, count, prefix, stride)

    def finish(self) -> None:
        self._flush()

    def _records(self, kind: int, page: int, count: int, prefix: bytes, stride: int) -> None:
        if len(prefix) > MAX_PREFIX:
            raise ValueError(f"a prefix of {len(prefix)} bytes: at most {MAX_PREFIX}, the rest is a literal")
        while count > MAX_COUNT:
            self._records(kind, page, MAX_COUNT, prefix, stride)
            page += MAX_COUNT if kind == PAGES else 0
            prefix = prefix_of_record(prefix, stride, MAX_COUNT)
            count -= MAX_COUNT
        if not count:
            return
        run = self._run
        if (
            run is not None
            and run.kind == kind
            and run.count + count <= MAX_COUNT
            and run.literal_length == len(prefix)
            and (kind == BARE or page == run.page + run.count)
            and self._continues(run, prefix, count, stride)
        ):
            joined = stride or run.stride or self._step(run, prefix)
            self._run = Entry(
                run.native_offset, run.literal_offset, run.page, run.count + count, run.literal_length, joined, kind
            )
        else:
            self._start(Entry(self.size, self._literal_size, page, count, len(prefix), stride, kind))
            self._prefix = prefix
            self._emit_literal(prefix)
            self._literal_size += len(prefix)
        self.size += count * (len(prefix) + (PAGE_SIZE if kind == PAGES else 0))

    def _step(self, run: Entry, prefix: bytes) -> int:
        """What the counter grew by from a run of one record to this next record; 0 without a counter."""
        if len(prefix) < 8:
            return 0
        return (int.from_bytes(prefix[:8], "big") - int.from_bytes(self._prefix[:8], "big")) % 2**64

    def _continues(self, run: Entry, prefix: bytes, count: int, stride: int) -> bool:
        step = run.stride
        if run.count == 1 and not step:
            step = self._step(run, prefix)
        if step >= 2**32 or (count > 1 and stride != step) or (stride and stride != step):
            return False
        return prefix_of_record(self._prefix, step, run.count) == prefix

    def _start(self, entry: Entry) -> None:
        self._flush()
        self._run = entry

    def _flush(self) -> None:
        if self._run is not None:
            self._emit_entry(self._run.pack())
        self._run = None
