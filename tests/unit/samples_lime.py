"""LiME images, as the kernel module writes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.unit.samples import Length, Sample
from tests.unit.streams import page_of

MAGIC = 0x4C694D45


def lime(ranges: Sequence[tuple[int, bytes]]) -> bytes:
    """Start address and content of each range."""
    return b"".join(struct.pack("<IIQQQ", MAGIC, 1, start, start + len(data) - 1, 0) + data for start, data in ranges)


LOW = page_of(1) + bytes(4096) + page_of(2)[:0xC00]
HIGH = page_of(3) + page_of(4)
RANGES = [(0x1000, LOW), (0x100000, HIGH)]
_SECOND = 32 + len(LOW)


def _between_ranges(file: str, length: int) -> bool:
    return length == _SECOND


SAMPLES = [
    Sample.of_file(
        "lime",
        "lime",
        lime(RANGES),
        (
            Length("start address", 8, 8, "little", refused=(0x4000, 1 << 52)),
            Length("end address", 16, 8, "little", refused=(0, 0xFFF, 1 << 52)),
            Length("start address of the second range", _SECOND + 8, 8, "little", refused=(0, 0x3BFF)),
            Length("end address of the second range", _SECOND + 16, 8, "little", refused=(0, 0xFFFFF, 0x102000)),
        ),
        _between_ranges,
    ),
]
