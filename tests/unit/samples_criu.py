"""CRIU image directories, built from the documented schema with an encoder of their own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.unit.samples import Length, Sample
from tests.unit.streams import page_of

COMMON, PAGEMAP, INVENTORY = 0x54564319, 0x56084025, 0x58313116
HEAP, STACK = 0x5581_0000_0000, 0x7FFE_1234_5000


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields: tuple[int, int]) -> bytes:
    """A message of integers: number and value of each."""
    return b"".join(varint(number << 3) + varint(value) for number, value in fields)


@dataclass(frozen=True)
class Entry:
    """Of a pagemap. ``flags`` None: older, with ``in_parent``; ``large``: newest, with ``nr_pages``."""

    address: int
    pages: int
    flags: int | None = None
    in_parent: bool | None = None
    large: bool = False

    def encode(self) -> bytes:
        fields = [(1, self.address), (2, 0 if self.large else self.pages)]
        fields += [(3, self.in_parent)] if self.in_parent is not None else []
        fields += [(4, self.flags)] if self.flags is not None else []
        fields += [(5, self.pages)] if self.large else []
        return message(*fields)


def pagemap(pages_id: int, entries: Sequence[Entry], common: bool = True) -> bytes:
    magic = struct.pack("<II", COMMON, PAGEMAP)
    messages = [message((1, pages_id)), *(entry.encode() for entry in entries)]
    return (magic if common else magic[4:]) + b"".join(struct.pack("<I", len(each)) + each for each in messages)


def inventory() -> bytes:
    """Its message is not looked at."""
    payload = message((1, 2), (5, 17))
    return struct.pack("<II", INVENTORY, len(payload)) + payload


_FIRST = {
    "inventory.img": inventory(),
    "pagemap-17.img": pagemap(1, [Entry(HEAP, 2, flags=6), Entry(HEAP + 2 * 4096, 1), Entry(STACK, 1, flags=4)]),
    "pages-1.img": page_of(1) + bytes(4096) + page_of(2) + page_of(3),
    "pagemap-shmem-5.img": pagemap(2, [Entry(0, 1)], common=False),
    "pages-2.img": page_of(4),
    "core-17.img": struct.pack("<III", COMMON, 0x55053847, 4) + b"core",
}
"""Two runs of one process, and a page of shared memory."""

_ENTRIES = [
    Entry(HEAP, 1, in_parent=True),
    Entry(HEAP + 4096, 1, flags=4, large=True),
    Entry(HEAP + 2 * 4096, 1, flags=1),
    Entry(HEAP + 9 * 4096, 5, flags=2),
    Entry(STACK, 1, in_parent=True),
]
_SECOND = {
    "inventory.img": inventory(),
    "pagemap-17.img": pagemap(3, _ENTRIES),
    "pages-3.img": page_of(6),
    **{f"parent/{name}": data for name, data in _FIRST.items()},
}
"""Most pages are in the parent's images, some are still at the host of the dump."""

_OPAQUE = ("inventory.img", "core-17.img")


_ENDS = {len(pagemap(3, _ENTRIES[:count])) for count in (2, 3, 4)}


def _may_end(file: str, length: int) -> bool:
    """Nothing but pages is understood; and a pagemap may end behind any entry if no pages are left in its file then."""
    return file.removeprefix("parent/") in _OPAQUE or (file == "pagemap-17.img" and length in _ENDS)


_SIZE = 8 + 4 + 2
"""Where the size of the first entry of pagemap-17.img is."""

SAMPLES = [
    Sample(
        "criu",
        "criu",
        _FIRST,
        lengths=(
            Length("size of the head", 8, 4, "little", "pagemap-17.img", refused=(0, 1, 4097)),
            Length("size of an entry", _SIZE, 4, "little", "pagemap-17.img", refused=(0, 1, 4097)),
        ),
        may_end=lambda file, length: file in _OPAQUE,
    ),
    Sample("criu-parent", "criu", _SECOND, may_end=_may_end),
]
