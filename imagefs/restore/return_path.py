"""The return path of a migration: what a QEMU that receives a guest says to its source.

As in QEMU's migration/migration.c; integers big-endian. A message is u16 type, u16 length, data:

| type | name         | data                                                                                          |
|-----:|--------------|-----------------------------------------------------------------------------------------------|
|    1 | SHUT         | u32 status, 0 for success; the last message                                                   |
|    2 | PONG         | u32, as in the PING                                                                           |
|    3 | REQ_PAGES_ID | u64 offset, u32 length in bytes, block name (length byte, ASCII)                              |
|    4 | REQ_PAGES    | u64 offset, u32 length; of the block that was named last                                      |
|    5 | RECV_BITMAP  | block name; then, outside of its length: u64 size in bytes, the bitmap (page i is bit i % 8   |
|      |              | of byte i // 8), u64 0x0123456789abcdef                                                       |
|    6 | RESUME_ACK   | u32 1                                                                                         |
|    7 | SWITCHOVER_ACK | nothing (since QEMU 8.1)                                                                    |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.errors import RestoreError

LARGEST_BITMAP = 1 << 33
"""Bytes. A guest of 256 TiB."""

_END_OF_BITMAP = 0x0123456789ABCDEF
_SHUT, _PONG, _REQ_PAGES_ID, _REQ_PAGES, _RECV_BITMAP, _RESUME_ACK, _SWITCHOVER_ACK = 1, 2, 3, 4, 5, 6, 7
_HEAD = struct.Struct(">HH")
_RANGE = struct.Struct(">QI")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The guest, or QEMU itself, waits for these bytes of a RAM block."""

    block: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Which pages of a block have come."""

    block: str
    bitmap: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class ResumeAcknowledged:
    pass


@dataclass(frozen=True, slots=True)
class Shut:
    """The destination has ended the migration; ``status`` 0 means that it has all it needs."""

    status: int


Message = PageRequest | ReceivedBitmap | Pong | ResumeAcknowledged | Shut


class ReturnPath:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._block: str | None = None

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages that are complete with ``data``. RestoreError for what is none; then the connection is of no use."""
        self._buffer += data
        while (message := self._next()) is not _INCOMPLETE:
            if message is not None:
                assert not isinstance(message, _Incomplete)
                yield message

    def _next(self) -> Message | _Incomplete | None:
        """One message; None for one that means nothing to us."""
        buffer = self._buffer
        if len(buffer) < _HEAD.size:
            return _INCOMPLETE
        kind, length = _HEAD.unpack_from(buffer)
        end = _HEAD.size + length
        if len(buffer) < end:
            return _INCOMPLETE
        data = bytes(buffer[_HEAD.size : end])
        message: Message | None = None
        if kind in (_SHUT, _PONG, _RESUME_ACK):
            self._check(kind, length == _U32.size, length)
            number: int = _U32.unpack(data)[0]
            message = Shut(number) if kind == _SHUT else Pong(number) if kind == _PONG else ResumeAcknowledged()
        elif kind in (_REQ_PAGES, _REQ_PAGES_ID):
            if kind == _REQ_PAGES_ID:
                self._check(kind, length > _RANGE.size, length)
                self._block = self._read_name(kind, data[_RANGE.size :])
            self._check(kind, length >= _RANGE.size and self._block is not None, length)
            assert self._block is not None
            offset, size = _RANGE.unpack_from(data)
            message = PageRequest(self._block, offset, size)
        elif kind == _RECV_BITMAP:
            self._check(kind, length > 0, length)
            block = self._read_name(kind, data)
            if len(buffer) < end + _U64.size:
                return _INCOMPLETE
            size = _U64.unpack_from(buffer, end)[0]
            self._check(kind, size <= LARGEST_BITMAP, size)
            start = end + _U64.size
            end = start + size + _U64.size
            if len(buffer) < end:
                return _INCOMPLETE
            self._check(kind, _U64.unpack_from(buffer, start + size)[0] == _END_OF_BITMAP, size)
            message = ReceivedBitmap(block, bytes(buffer[start : start + size]))
        else:
            self._check(kind, kind == _SWITCHOVER_ACK, length)
        del buffer[:end]
        return message

    @staticmethod
    def _read_name(kind: int, data: bytes) -> str:
        if len(data) != 1 + data[0]:
            raise RestoreError(f"return path: message {kind} has a block name of {data[0]} in {len(data)} bytes")
        return data[1:].decode("ascii", "replace")

    @staticmethod
    def _check(kind: int, good: bool, size: int) -> None:
        if not good:
            raise RestoreError(f"return path: message {kind} of {size} bytes is not what a QEMU sends")


class _Incomplete:
    pass


_INCOMPLETE = _Incomplete()
