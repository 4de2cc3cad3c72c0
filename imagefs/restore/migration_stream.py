"""The messages of a postcopy migration from source to destination, made out of an image's ``state``.

As QEMU's migration/savevm.c and ram.c write and read them; all integers big-endian. ``state`` is one plain form (see
``docs/format.md``): header, configuration, section RAM with the pages of all blocks but main memory, device sections.
A source sends, in this order:

| message                       | of which                                                                             |
|-------------------------------|--------------------------------------------------------------------------------------|
| header, configuration         | as in ``state``                                                                      |
| OPEN_RETURN_PATH, PING 1      | commands                                                                             |
| ADVISE                        | u64 sum of the RAM blocks' page sizes, u64 page size of the guest                    |
| SECTION_START, SECTION_PART   | block table, and the pages of the other blocks, as in ``state``                      |
| RAM_DISCARD                   | u8 0, block name, u8 0, u64 start, u64 length: none of main memory is there          |
| PACKAGED                      | u32 length, and in it: LISTEN, the device sections, PING 2, RUN                      |
| SECTION_PART, again and again | page records, in any order, each page once                                           |
| SECTION_END, EOF              | after the last page                                                                  |

A command is u8 0x08, u16 number, u16 length, data. One RAM_DISCARD has to come before LISTEN: without any QEMU stays in
a state where it loads pages as if nobody could be waiting for them, and then everybody waits for everybody.

Connected again after a break, the source sends RECV_BITMAP (block name), gets the bitmap of what has come, sends
RESUME, and goes on with page records.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from imagefs.errors import RestoreError
from imagefs.image.geometry import PAGE_SIZE

OPEN_RETURN_PATH, PING, ADVISE, LISTEN, RUN, RAM_DISCARD, PACKAGED, RESUME, RECV_BITMAP = 1, 2, 3, 4, 5, 6, 7, 9, 10
LARGEST_PACKAGE = 1 << 24
"""Bytes that QEMU takes as one package (MAX_VM_CMD_PACKAGED_SIZE before QEMU 9.2)."""

_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _COMMAND, _FOOTER = 0, 1, 2, 3, 4, 5, 7, 8, 0x7E
_ZERO, _MEM_SIZE, _PAGE, _EOS = 0x02, 0x04, 0x08, 0x10
_FLAGS = PAGE_SIZE - 1
_HEADER_BYTES = 8
_ZERO_PAGE = bytes(PAGE_SIZE)
_RECORD = struct.Struct(">QB")
_DESCRIPTION = re.compile(rb"(?=\x00\x06(.{4})\{)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class StateParts:
    """A ``state``, taken apart; each part as it stands there."""

    opening: bytes
    """Header and configuration."""
    start: bytes
    """Section RAM's first part, with the block table, and the pages of the other blocks."""
    commands: bytes
    """What else stood beside section RAM."""
    devices: bytes
    section: int
    """Id of section RAM."""
    footers: bool
    """Whether sections have footers."""
    blocks: dict[str, int]
    """Bytes of each RAM block."""


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def error(self, what: str, at: int | None = None) -> RestoreError:
        return RestoreError(f"the image's state: {what} at offset {self.at if at is None else at:#x}")

    def take(self, count: int, what: str) -> bytes:
        if self.at + count > len(self.data):
            raise self.error(f"it ends inside {what}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big")

    def name(self, what: str) -> str:
        return self.take(self.number(1, what), what).decode("ascii", "replace")

    def peek(self, what: str) -> int:
        kind = self.number(1, what)
        self.at -= 1
        return kind


def take_apart(state: bytes) -> StateParts:
    """RestoreError, with the offset, for what is not the plain form of a QEMU state."""
    cursor = _Cursor(state)
    if cursor.take(_HEADER_BYTES, "header") != b"QEVM\0\0\0\3":
        raise cursor.error("not a QEMU migration stream of version 3", 0)
    if cursor.peek("section type") == _CONFIGURATION:
        _skip_configuration(cursor)
    opening = state[: cursor.at]
    start, commands, blocks, section, footers = b"", b"", dict[str, int](), -1, True
    while (kind := cursor.peek("section type")) not in (_FULL, _EOF):
        at = cursor.at
        cursor.at += 1
        if kind == _COMMAND:
            cursor.number(2, "command")
            cursor.take(cursor.number(2, "length of command"), "command")
            commands += state[at : cursor.at]
            continue
        number = cursor.number(4, "section id")
        if kind == _START and section < 0:
            section = number
            if cursor.name("section name") != "ram":
                raise cursor.error("a section that begins before RAM's", at)
            cursor.take(8, "section version")
            blocks = _read_table(cursor)
        elif kind not in (_PART, _END) or number != section:
            raise cursor.error(f"section {number:#x} of type {kind:#x} is not understood", at)
        _skip_records(cursor, blocks)
        if kind == _START:
            footers = cursor.peek("section footer") == _FOOTER
        if footers:
            cursor.take(5, "section footer")
        if kind != _END:
            start += state[at : cursor.at]
    if section < 0:
        raise cursor.error("it has no section RAM")
    end = _end_of_devices(state, cursor.at, footers)
    return StateParts(opening, start, commands, state[cursor.at : end], section, footers, blocks)


def _skip_configuration(cursor: _Cursor) -> None:
    cursor.take(1, "configuration")
    cursor.take(cursor.number(4, "length of machine type"), "machine type")
    while cursor.peek("section type") == _SUBSECTION:
        at = cursor.at
        cursor.take(1, "subsection")
        name = cursor.name("subsection")
        cursor.take(4, "subsection")
        size = {"configuration/uuid": 16, "configuration/target-page-bits": 4}.get(name)
        if size is None:
            raise cursor.error(f"subsection {name!r} is not understood", at)
        cursor.take(size, name)


def _read_table(cursor: _Cursor) -> dict[str, int]:
    header = cursor.number(8, "RAM block table")
    if header & _FLAGS != _MEM_SIZE:
        raise cursor.error("section RAM does not begin with the block table", cursor.at - 8)
    blocks: dict[str, int] = {}
    left = header & ~_FLAGS
    while left > 0:
        name = cursor.name("RAM block name")
        blocks[name] = cursor.number(8, "RAM block size")
        left -= blocks[name]
    return blocks


def _skip_records(cursor: _Cursor, blocks: dict[str, int]) -> None:
    while (header := cursor.number(8, "RAM record")) != _EOS:
        kind = header & _FLAGS
        if kind not in (_PAGE, _ZERO):
            raise cursor.error(f"RAM record {header:#x} is not understood", cursor.at - 8)
        if cursor.name("RAM block name") not in blocks:
            raise cursor.error("RAM record of a block that is not in the table")
        cursor.take(PAGE_SIZE if kind == _PAGE else 1, "RAM page")


def _end_of_devices(state: bytes, start: int, footers: bool) -> int:
    """Where EOF stands: before the description, which reaches to the end; or as the last byte, where there is none."""
    for found in _DESCRIPTION.finditer(state, start):
        at = found.start()
        if at + 6 + int.from_bytes(found[1], "big") == len(state):
            try:
                json.loads(state[at + 6 :])
            except (ValueError, RecursionError):
                continue
            return at
    if state[-1] != _EOF or (footers and state[-6] != _FOOTER):
        raise RestoreError("the image's state: it does not end as a QEMU migration stream does")
    return len(state) - 1


def _command(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">BHH", _COMMAND, number, len(data)) + data


def _name(block: str) -> bytes:
    return bytes([len(block)]) + block.encode("ascii")


def begin(parts: StateParts, block: str) -> bytes:
    """All that comes before the first page of ``block``, main memory. RestoreError where QEMU could not take it."""
    size = parts.blocks.get(block)
    if size is None:
        raise RestoreError(f"the image's state has no RAM block {block!r}, only {', '.join(map(repr, parts.blocks))}")
    package = _command(LISTEN) + parts.devices + _command(PING, (2).to_bytes(4, "big")) + _command(RUN)
    if len(package) > LARGEST_PACKAGE:
        raise RestoreError(f"the device state has {len(package):,} bytes, QEMU takes {LARGEST_PACKAGE:,} for postcopy")
    return b"".join(
        (
            parts.opening,
            _command(OPEN_RETURN_PATH),
            _command(PING, (1).to_bytes(4, "big")),
            _command(ADVISE, struct.pack(">QQ", PAGE_SIZE, PAGE_SIZE)),
            parts.start,
            parts.commands,
            _command(RAM_DISCARD, b"\0" + _name(block) + b"\0" + struct.pack(">QQ", 0, size)),
            _command(PACKAGED, len(package).to_bytes(4, "big")),
            package,
        )
    )


def ask_for_bitmap(block: str) -> bytes:
    """After a break: what of ``block`` has come?"""
    return _command(RECV_BITMAP, _name(block))


def resume() -> bytes:
    """After the bitmap: go on."""
    return _command(RESUME)


class PageWriter:
    """Makes the messages with pages of one block."""

    def __init__(self, block: str, section: int, footers: bool) -> None:
        self._name = _name(block)[1:]
        self._part = bytes([_PART]) + section.to_bytes(4, "big")
        footer = bytes([_FOOTER]) + section.to_bytes(4, "big") if footers else b""
        self._close = _EOS.to_bytes(8, "big") + footer
        self.end = bytes([_END]) + section.to_bytes(4, "big") + self._close + bytes([_EOF])
        """What comes after the last page."""

    def pages(self, pages: Sequence[tuple[int, bytes | memoryview]]) -> bytes:
        """One section with (page number, 4096 bytes) each. Zero pages travel as such."""
        length = len(self._name)
        pieces = [self._part]
        for number, data in pages:
            zero = data == _ZERO_PAGE
            pieces.append(_RECORD.pack(number * PAGE_SIZE | (_ZERO if zero else _PAGE), length))
            pieces.append(self._name)
            pieces.append(b"\0" if zero else bytes(data))
        pieces.append(self._close)
        return b"".join(pieces)
