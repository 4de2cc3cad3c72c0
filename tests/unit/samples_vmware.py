"""VMware guests: a state file with nothing in it but the regions of memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests.unit.samples import Length, Sample
from tests.unit.streams import page_of

MAGICS = {0: "d0bed2be", 1: "d1bad1ba", 2: "d2bed2be", 3: "d3bed3be"}


def tag(name: str, value: int, *indices: int, size: int = 4) -> bytes:
    head = bytes([len(indices) << 6 | size, len(name)]) + name.encode()
    return head + b"".join(struct.pack("<I", index) for index in indices) + value.to_bytes(size, "little")


def long_tag(name: str, data: bytes, version: int, padding: int = 0) -> bytes:
    size = len(data).to_bytes(4 if version == 0 else 8, "little")
    return bytes([62, len(name)]) + name.encode() + size * 2 + struct.pack("<H", padding) + bytes(padding) + data


def vmss(regions: Sequence[tuple[int, int, int]], version: int = 1) -> bytes:
    """Guest page, page of the memory file and pages of each region."""
    groups = [b"Checkpoint", b"memory"]
    at = 12 + 80 * len(groups)
    other = tag("fileversion", 4) + long_tag("thumbnail", b"png" * 100, version, 7) + b"\0\0"
    memory = tag("align_mask", 0xFFFF, size=8) + tag("regionsCount", len(regions))
    for number, (ppn, page, pages) in enumerate(regions):
        memory += tag("regionPPN", ppn, number) + tag("regionPageNum", page, number) + tag("regionSize", pages, number)
    memory += tag("hotSet", 1, 2, 3) + b"\0\0"
    header = bytes.fromhex(MAGICS[version]) + struct.pack("<II", 8, len(groups))
    table = struct.pack("<64sQQ", groups[0], at, len(other)) + struct.pack("<64sQQ", groups[1], at + len(other), 0)
    return header + table + other + memory


REGIONS = [(0, 0, 2), (0x100000, 2, 1)]
STATE = vmss(REGIONS)
MEMORY = page_of(1) + bytes(4096) + page_of(2)
_TAGS = STATE.index(b"\x04\x0cregionsCount")
_SIZE = STATE.index(b"regionSize") + len("regionSize") + 4


SAMPLES = [
    Sample(
        "vmware",
        "vmware",
        {"guest.vmss": STATE, "guest.vmem": MEMORY},
        "guest.vmss",
        (),
        (
            Length("group count", 8, 4, "little", refused=(0, 1)),
            Length("tags of the group", 12 + 80 + 64, 8, "little", refused=(len(STATE),)),
            Length("regionsCount", _TAGS + 14, 4, "little", refused=(3, 1025)),
            Length("regionSize", _SIZE, 4, "little", refused=(0, 3)),
        ),
    ),
]
