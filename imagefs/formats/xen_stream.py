"""A cursor over a Xen stream: records of libxl and libxc, of which all but the pages go into the state.

Both layers' records look alike (docs/specs/libxl-migration-stream.pandoc and libxc-migration-stream.pandoc of Xen);
integers are little-endian in streams of x86.

| bytes | field   | meaning                                                        |
|------:|---------|----------------------------------------------------------------|
|     4 | type    | bit 31: optional, whoever does not know it may ignore it       |
|     4 | length  | bytes of the body                                              |
|     … | body    |                                                                |
|   0–7 | padding | up to a multiple of 8 bytes from the record's start            |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from imagefs.formats.base import Input
from imagefs.formats.spool import Spool
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.image.native import TemplateBuilder

OPTIONAL = 0x8000_0000
MAX_LENGTH = 128 << 20
"""Bytes of a libxc record's body, as libxc itself has it (REC_LENGTH_MAX)."""
MAX_HELD = 2 << 20
"""Bytes of a body that is looked into, and so held in memory: a thousand vCPUs."""

_HEADER = struct.Struct("<II")
_ALIGNMENT = 8
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """The header of a record that begins at ``offset`` of the stream."""

    kind: int
    length: int
    name: str
    offset: int

    @property
    def optional(self) -> bool:
        return bool(self.kind & OPTIONAL)


class XenCursor(StreamCursor):
    """What it passes is literal in the native file and, but for :meth:`unkept` pieces, part of the state."""

    def __init__(self, source: Input, builder: TemplateBuilder, state: Spool) -> None:
        super().__init__(source.read_into, self._passed)
        self._builder = builder
        self._state = state
        self._keeping = True

    @contextmanager
    def unkept(self) -> Iterator[None]:
        """What is passed inside goes into the native file only."""
        self.flush()
        self._keeping = False
        yield
        self.flush()
        self._keeping = True

    @property
    def kept(self) -> int:
        """Bytes of the state so far."""
        self.flush()
        return self._state.size

    def unpack(self, layout: struct.Struct, field: str) -> tuple[int, ...]:
        self.need(layout.size, field)
        values = layout.unpack_from(self.buffer, self.start)
        self.skip(layout.size)
        return values

    def peek_record(self, names: Mapping[int, str], layer: str) -> Record:
        """The next record's header, not passed."""
        self.need(_HEADER.size, f"{layer} record")
        kind, length = _HEADER.unpack_from(self.buffer, self.start)
        return Record(kind, length, f"{layer} {names.get(kind, f'{kind:#x}')}", self.position)

    def skip_header(self) -> None:
        """Pass the header of the record that was peeked at."""
        self.skip(_HEADER.size)

    def body(self, record: Record) -> bytes:
        """The whole body, held in memory."""
        if record.length > MAX_HELD:
            raise self.bad_length(record, f"at most {MAX_HELD:#x} are understood")
        data = self.take(record.length, record.name)
        self.skip_padding(record)
        return data

    def skip_body(self, record: Record, done: int = 0) -> None:
        """Pass what follows the body's first ``done`` bytes, however much it is."""
        self.skip_long(record.length - done, record.name)
        self.skip_padding(record)

    def skip_long(self, count: int, field: str) -> None:
        while count:
            piece = min(count, _PIECE)
            self.need(piece, field)
            self.skip(piece)
            count -= piece

    def skip_padding(self, record: Record) -> None:
        self.take(-record.length % _ALIGNMENT, f"padding of {record.name}")

    def check_length(self, record: Record, wanted: int) -> None:
        if record.length != wanted:
            raise self.bad_length(record, f"{wanted:#x} are needed")

    def bad_length(self, record: Record, reason: str) -> Exception:
        back = self.position - record.offset - 4
        return self.error(f"{record.length:#x} bytes: {reason}", f"length of {record.name}", back)

    def _passed(self, data: memoryview) -> None:
        self._builder.literal(data)
        if self._keeping:
            self._state.append(data)
