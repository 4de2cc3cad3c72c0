"""Memory, its regions and the control registers in a VMware .vmss or .vmsn file; nothing else of it is read.

VMware does not document the file. These are the facts that forensic tools go by (Volatility 2,
``plugins/addrspaces/vmware.py``, and volatility3, ``framework/layers/vmware.py``); all little-endian:

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
``regionPageNum[i]`` (page of the memory) and ``regionSize[i]`` (pages). A count of zero means that there is no hole.
The memory is in a .vmem, or here: the long data of ``Memory[0][0]``. The group ``cpu`` has ``CR64[n][r]``, u64,
control register r of vCPU n.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.image.capture import ByteSource
from imagefs.image.vcpu import VcpuState

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
MAX_VCPUS = 1024


@dataclass(frozen=True, slots=True)
class StateRegion:
    """All in pages of 4096 bytes; ``offset`` is where in the state file the region's size is."""

    guest_page: int
    file_page: int
    pages: int
    offset: int


@dataclass(frozen=True, slots=True)
class State:
    """What a state file says. ``memory`` is where it is in the file itself, offset and bytes, if it is."""

    regions: list[StateRegion]
    """In the order of their numbers; none where memory has no hole."""
    memory: tuple[int, int] | None
    vcpus: tuple[VcpuState, ...]


@dataclass(frozen=True, slots=True)
class _Tag:
    name: bytes
    indices: tuple[int, ...]
    value: int | None
    """Of data of up to 8 bytes."""
    offset: int
    """Of the data in the file; of its size, where it is a long one."""
    data: tuple[int, int] | None = None
    """Offset and bytes of a long one."""


_Tags = dict[tuple[bytes, tuple[int, ...]], _Tag]


def state_version(head: bytes) -> int | None:
    """From the file's first bytes; None for what is no .vmss or .vmsn."""
    return MAGICS.get(head[:4])


def read_state(source: ByteSource, version: int) -> State:
    """UnsupportedInputError with field and offset."""
    groups = _groups(source)
    if b"memory" not in groups:
        raise _error("none of the groups is named 'memory'", "groups", HEADER.size)
    wanted = (b"region", b"Memory", b"CR64")
    values = {name: _values(source, groups[name], version, wanted) for name in (b"memory", b"cpu") if name in groups}
    memory = values[b"memory"].get((b"Memory", (0, 0)))
    return State(_regions(values[b"memory"]), memory.data if memory else None, _vcpus(values.get(b"cpu", {})))


def _values(source: ByteSource, at: int, version: int, wanted: tuple[bytes, ...]) -> _Tags:
    return {(tag.name, tag.indices): tag for tag in _tags(source, at, version) if tag.name.startswith(wanted)}


def _vcpus(values: _Tags) -> tuple[VcpuState, ...]:
    found: list[VcpuState] = []
    while len(found) < MAX_VCPUS and (b"CR64", (len(found), 3)) in values:
        tags = {register: values.get((b"CR64", (len(found), register))) for register in (0, 3, 4)}
        cr0, cr3, cr4 = (tag.value if tag else None for tag in tags.values())
        found.append(VcpuState(cr0=cr0, cr3=cr3, cr4=cr4))
    return tuple(found)


def _regions(values: _Tags) -> list[StateRegion]:
    counted = values.get((b"regionsCount", ()))
    if counted is None or not counted.value:
        return []
    if counted.value > MAX_REGIONS:
        raise _error(f"{counted.value} are too many", "regionsCount", counted.offset)
    return [_region(values, number, counted.offset) for number in range(counted.value)]


def _region(values: _Tags, number: int, offset: int) -> StateRegion:
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


def _groups(source: ByteSource) -> dict[bytes, int]:
    """Offset of the tags of each group, by its name."""
    _, count = HEADER.unpack(_take(source, 0, HEADER.size, "header"))
    if count > MAX_GROUPS:
        raise _error(f"{count} are too many", "group count", 8)
    found: dict[bytes, int] = {}
    for number in range(count):
        at = HEADER.size + number * GROUP.size
        name, tags_at = GROUP.unpack(_take(source, at, GROUP.size, "group"))
        found.setdefault(name.rstrip(b"\0"), int(tags_at))
    return found


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
        value = data = None
        start = at
        if length in _LONG:
            size = int.from_bytes(_take(source, at, size_bytes, "tag size"), "little")
            padding = int.from_bytes(_take(source, at + 2 * size_bytes, 2, "tag padding"), "little")
            data_at = at + 2 * size_bytes + 2 + padding
            if size > source.size - data_at:
                raise _error(f"{size:,} bytes are not in the file, which has {source.size:,}", "tag size", at)
            in_memory = int.from_bytes(_take(source, at + size_bytes, size_bytes, "tag size"), "little")
            if name == b"Memory" and in_memory != size:
                raise _error(f"the memory is compressed, {size:,} bytes for {in_memory:,}", "Memory", at)
            data = (data_at, size)
            at = data_at + size
        else:
            value = int.from_bytes(_take(source, at, length, "tag data"), "little") if length <= 8 else None
            at += length
        yield _Tag(name, indices, value, start, data)
    raise _error(f"more than {MAX_TAGS:,} tags", "tags", at)


def _take(source: ByteSource, at: int, length: int, field: str) -> bytes:
    data = bytes(source.read_at(at, length)) if at < source.size else b""
    if len(data) != length:
        raise _error(f"the state file ends here, {length} bytes are wanted", field, min(at, source.size))
    return data


def _error(reason: str, field: str, offset: int) -> UnsupportedInputError:
    return UnsupportedInputError(reason, field=field, offset=offset)
