"""What follows the RAM section of a QEMU migration stream: device sections, end of file, description.

A device section is SECTION_FULL, id u32, name (length byte, ASCII), instance u32, version u32, the device's own data,
a footer. Nothing says how long the data are but the description at the very end, so the sections are kept as they
are, and only the end is checked, to tell a whole stream from a truncated one:

| bytes | field         | meaning                                                                       |
|------:|---------------|-------------------------------------------------------------------------------|
|     1 | EOF           | 0x00                                                                          |
|     1 | VMDESCRIPTION | 0x06                                                                          |
|     4 | length        | of the JSON that reaches to the end of the stream                             |
|     … | JSON          | ``{"page_size": 4096, "devices": [{"name": …, "instance_id": …, …}, …], …}``  |

The last three are missing with ``-machine suppress-vmdesc=on``; then the stream must end with the footer (0x7e, id u32)
of one of its sections and EOF.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.formats.qemu_state import SECTION_FOOTER
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE

SECTION_FULL = 0x04

MAX_DESCRIPTION = 32 << 20
"""Bytes of JSON; 100 KiB are usual."""

_DESCRIPTION = re.compile(rb"(?=\x00\x06([\x00-\xff]{4})\{)")
_HEADER_SIZE = 6
_U32 = struct.Struct(">I")
_SEARCH_SIZE = 1 << 20
_FIELD = "device state"


@dataclass(frozen=True, slots=True)
class Description:
    """The stream's own description: its JSON text, and the number of CPUs in it."""

    text: bytes
    cpus: int


def check_devices(state: ByteSource, start: int, offset: int) -> Description | None:
    """Whether the device sections from ``start`` of ``state`` on are whole; their description, if there is one.

    ``offset`` is where they begin in the source. Raises UnsupportedInputError for what is truncated or is no end of a
    migration stream.
    """
    cut_at: int | None = None
    ends_early: int | None = None
    for at, length in _find_descriptions(state, start):
        end = at + _HEADER_SIZE + length
        if end > state.size:
            cut_at = at
            continue
        description = _read_description(state, at + _HEADER_SIZE, length)
        if description is None:
            continue
        if end == state.size:
            return description
        ends_early = end
    shift = offset - start
    if ends_early is not None:
        raise UnsupportedInputError(
            f"{state.size - ends_early:,} bytes follow the end of the stream",
            field="vmdescription",
            offset=ends_early + shift,
        )
    if _ends_with_footer(state, start):
        return None
    if cut_at is not None:
        raise UnsupportedInputError(
            f"the stream ends before its description is whole, after {state.size + shift:#x} bytes",
            field="vmdescription",
            offset=cut_at + shift,
        )
    raise UnsupportedInputError("the stream ends inside the device sections", field=_FIELD, offset=state.size + shift)


def _find_descriptions(state: ByteSource, start: int) -> list[tuple[int, int]]:
    """Offset and length of everything that could be a description's header."""
    found = []
    overlap = _HEADER_SIZE
    for at in range(start, state.size, _SEARCH_SIZE):
        data = state.read_at(at, _SEARCH_SIZE + overlap)
        found += [(at + match.start(), _U32.unpack(match[1])[0]) for match in _DESCRIPTION.finditer(data)]
        if len(found) > 10_000:
            raise UnsupportedInputError("too many look-alikes of a description", field=_FIELD)
    return found


def _read_description(state: ByteSource, at: int, length: int) -> Description | None:
    """None where these bytes are something else by accident."""
    if length > MAX_DESCRIPTION:
        return None
    text = bytes(state.read_at(at, length))
    try:
        document = json.loads(text)
        page_size = document["page_size"]
        names = [device["name"] for device in document["devices"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if page_size != PAGE_SIZE:
        raise UnsupportedInputError(
            f"the guest's pages have {page_size} bytes; only {PAGE_SIZE} are supported", field="vmdescription"
        )
    return Description(text, names.count("cpu"))


def _ends_with_footer(state: ByteSource, start: int) -> bool:
    end = bytes(state.read_at(max(start, state.size - 6), 6))
    if len(end) != 6 or end[0] != SECTION_FOOTER or end[5] != 0:
        return False
    opening = bytes([SECTION_FULL]) + end[1:5]
    for at in range(start, state.size, _SEARCH_SIZE):
        if opening in bytes(state.read_at(at, _SEARCH_SIZE + len(opening))):
            return True
    return False
