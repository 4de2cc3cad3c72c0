"""The regions of memory in a VMware .vmss or .vmsn file; nothing else of it is read.

VMware does not document the file. These are the facts that forensic tools go by (volatility3,
``framework/layers/vmware.py``, and the address space of Volatility 2 for the padding); all little-endian:

| offset | bytes | field       | meaning                                                                   |
|-------:|------:|-------------|---------------------------------------------------------------------------|
|      0 |     4 | magic       | ``d0bed2be`` (version 0), ``d1bad1ba``, ``d2bed2be``, ``d3bed3be`` (1, 2, 3) |
|      4 |     4 |             | not known                                                                 |
|      8 |     4 | group count |                                                                           |
|     12 |  80 n | groups      | each: name 64, offset of its tags u64, u64 not known                      |

A group's tags follow each other up to one with flags and name length zero:

| bytes | field | meaning |
|---:|---|---|
| 1 | flags | bits 6–7: number of indices; bits 0–5: bytes of data, 62 and 63 meaning a long one |
| 1 | name length |  |
| … | name |  |
| 4 n | indices |  |
| … | data | a long one: size u64, size in memory u64 (u32 in version 0), u16 bytes of padding, the padding, the data |

The group ``memory`` has ``regionsCount`` and, for each region i, ``regionPPN[i]`` (guest page frame number),
``regionPageNum[i]`` (page of the .vmem) and ``regionSize[i]`` (pages). A count of zero means that there is no hole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.image.capture import ByteSource

HEADER = struct.Struct("<4s4xI")
GROUP = struct.Struct("<64sQ8x")
MAGICS = {
    bytes.fromhex("d0bed2be"): 0,
    bytes.fromhex("d1bad1ba"): 1,
    bytes.fromhex("d2bed2be"): 2,
    bytes.fromhex("d3bed3be"): 3,
}
MAX_GROUPS = 1024
MAX_TAGS = 1 << 20
MAX_REGIONS = 1024
MAX_PAGES = 1 << 40
"""52 address bits."""
_LONG = (62, 63)
_GROUP_NAME = b"memory"


@dataclass(frozen=True, slots=True)
class StateRegion:
    """All in pages of 4096 bytes; ``offset`` is where in the state file the region's size is."""

    guest_page: int
    file_page: int
    pages: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Tag:
    name: bytes
    indices: tuple[int, ...]
    value: int | None
    """Of data of 1, 2, 4 or 8 bytes."""
    offset: int
    """Of the data in the file."""


def state_version(head: bytes) -> int | None:
    """From the file's first bytes; None for what is no .vmss or .vmsn."""
    return MAGICS.get(head[:4])


def read_regions(source: ByteSource, version: int) -> list[StateRegion]:
    """In the order of their numbers; none where memory has no hole. UnsupportedInputError with field and offset."""
    values: dict[tuple[bytes, tuple[int, ...]], _Tag] = {}
    for tag in _tags(source, _group(source), version):
        if tag.name.startswith(b"region"):
            values[tag.name, tag.indices] = tag
    counted = values.get((b"regionsCount", ()))
    if counted is None or not counted.value:
        return []
    if counted.value > MAX_REGIONS:
        raise _error(f"{counted.value} are too many", "regionsCount", counted.offset)
    return [_region(values, number, counted.offset) for number in range(counted.value)]


def _region(values: dict[tuple[bytes, tuple[int, ...]], _Tag], number: int, offset: int) -> StateRegion:
    found = []
    for name in ("regionPPN", "regionPageNum", "regionSize"):
        tag = values.get((name.encode(), (number,)))
        if tag is None or tag.value is None:
            raise _error(f"there is none for region {number}", name, offset)
        if tag.value >= MAX_PAGES or (name == "regionSize" and not tag.value):
            raise _error(f"{tag.value:#x} pages", name, tag.offset)
        found.append(tag)
    ppn, page, size = found
    assert ppn.value is not None
    assert page.value is not None
    assert size.value is not None
    if ppn.value + size.value > MAX_PAGES:
        raise _error(
            f"the region ends beyond 52 address bits, at page {ppn.value + size.value:#x}", "regionSize", size.offset
        )
    return StateRegion(ppn.value, page.value, size.value, size.offset)


def _group(source: ByteSource) -> int:
    """Offset of the tags of the group ``memory``."""
    _, count = HEADER.unpack(_take(source, 0, HEADER.size, "header"))
    if count > MAX_GROUPS:
        raise _error(f"{count} are too many", "group count", 8)
    for number in range(count):
        at = HEADER.size + number * GROUP.size
        name, tags_at = GROUP.unpack(_take(source, at, GROUP.size, "group"))
        if name.rstrip(b"\0") == _GROUP_NAME:
            return int(tags_at)
    raise _error("none of the groups is named 'memory'", "groups", HEADER.size)


def _tags(source: ByteSource, at: int, version: int) -> Iterator[_Tag]:
    size_bytes = 4 if version == 0 else 8
    for _ in range(MAX_TAGS):
        flags, name_length = _take(source, at, 2, "tag")
        if not flags and not name_length:
            return
        count, length = flags >> 6, flags & 0x3F
        name = _take(source, at + 2, name_length, "tag name")
        at += 2 + name_length
        indices = struct.unpack(f"<{count}I", _take(source, at, 4 * count, "tag indices"))
        at += 4 * count
        value = None
        start = at
        if length in _LONG:
            size = int.from_bytes(_take(source, at, size_bytes, "tag size"), "little")
            padding = int.from_bytes(_take(source, at + 2 * size_bytes, 2, "tag padding"), "little")
            data_at = at + 2 * size_bytes + 2 + padding
            if size > source.size - data_at:
                raise _error(f"{size:,} bytes are not in the file, which has {source.size:,}", "tag size", at)
            at = data_at + size
        else:
            value = int.from_bytes(_take(source, at, length, "tag data"), "little") if length <= 8 else None
            at += length
        yield _Tag(name, indices, value, start)
    raise _error(f"more than {MAX_TAGS:,} tags", "tags", at)


def _take(source: ByteSource, at: int, length: int, field: str) -> bytes:
    data = bytes(source.read_at(at, length)) if at < source.size else b""
    if len(data) != length:
        raise _error(f"the state file ends here, {length} bytes are wanted", field, min(at, source.size))
    return data


def _error(reason: str, field: str, offset: int) -> UnsupportedInputError:
    return UnsupportedInputError(reason, field=field, offset=offset)
