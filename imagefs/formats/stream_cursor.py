"""A cursor over a stream: fields by name, each checked before it is used.

Every byte that it passes goes into the native template exactly once: as a literal, unless the caller takes it with
:meth:`StreamCursor.consume` because it describes these bytes otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from imagefs.errors import UnsupportedInputError

BUFFER_SIZE = 4 << 20
"""The most that :meth:`StreamCursor.need` can ask for at once."""

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class StreamCursor:
    """Reads big-endian fields. All methods that name a ``field`` raise UnsupportedInputError with the field and
    the offset at which it begins where the stream ends too early.

    ``read_into`` fills the beginning of a buffer and returns the number of bytes, 0 at the end of the stream;
    ``literal`` is called with what is passed, in order, in views that are valid during the call only.
    """

    def __init__(self, read_into: Callable[[memoryview], int], literal: Callable[[memoryview], None]) -> None:
        self._read_into = read_into
        self._literal = literal
        self.buffer = memoryview(bytearray(BUFFER_SIZE))
        """What :meth:`available` speaks of; moves with every call that reads."""
        self.start = 0
        """Where in ``buffer`` the cursor stands."""
        self._end = 0
        self._mark = 0  # buffer[mark:start] has been passed and not yet been given to literal
        self._base = 0  # offset in the stream of buffer[0]
        self._ended = False

    def __repr__(self) -> str:
        return f"<StreamCursor at {self.position:#x}>"

    @property
    def position(self) -> int:
        """Offset in the stream of the next byte."""
        return self._base + self.start

    @property
    def available(self) -> int:
        """Bytes that are in ``buffer`` from ``start`` on."""
        return self._end - self.start

    def reach(self, count: int) -> bool:
        """Read until ``count`` bytes (at most BUFFER_SIZE) are available; False if the stream ends before that."""
        while self.available < count:
            if self._ended:
                return False
            if self.start:
                self.flush()
                rest = self.available
                self.buffer[:rest] = self.buffer[self.start : self._end]
                self._base += self.start
                self.start, self._mark, self._end = 0, 0, rest
            got = self._read_into(self.buffer[self._end :])
            self._ended = not got
            self._end += got
        return True

    def flush(self) -> None:
        """Hand out as literal what has been passed so far."""
        if self._mark < self.start:
            self._literal(self.buffer[self._mark : self.start])
            self._mark = self.start

    def need(self, count: int, field: str) -> None:
        if self.available < count and not self.reach(count):
            raise self.error(f"the stream ends after {self.available} of its {count} bytes", field)

    def error(self, reason: str, field: str, back: int = 0) -> UnsupportedInputError:
        """An error about a field that begins ``back`` bytes before the cursor."""
        return UnsupportedInputError(reason, field=field, offset=self.position - back)

    def skip(self, count: int) -> None:
        """Pass bytes that are available."""
        self.start += count

    def consume(self, count: int) -> None:
        """Pass bytes that are available without making them literals."""
        self.flush()
        self.start += count
        self._mark = self.start

    def peek_u8(self, field: str) -> int:
        self.need(1, field)
        return self.buffer[self.start]

    def u8(self, field: str) -> int:
        value = self.peek_u8(field)
        self.start += 1
        return value

    def u16(self, field: str) -> int:
        return self._integer(_U16, field)

    def u32(self, field: str) -> int:
        return self._integer(_U32, field)

    def u64(self, field: str) -> int:
        return self._integer(_U64, field)

    def take(self, count: int, field: str) -> bytes:
        self.need(count, field)
        data = bytes(self.buffer[self.start : self.start + count])
        self.start += count
        return data

    def string(self, field: str) -> str:
        """A length byte and so many characters."""
        length = self.u8(f"length of {field}")
        return self.text(length, field)

    def text(self, length: int, field: str) -> str:
        data = self.take(length, field)
        if not data.isascii() or not data.decode("ascii").isprintable():
            raise self.error("not printable ASCII", field, back=length)
        return data.decode("ascii")

    def _integer(self, layout: struct.Struct, field: str) -> int:
        self.need(layout.size, field)
        value: int = layout.unpack_from(self.buffer, self.start)[0]
        self.start += layout.size
        return value
