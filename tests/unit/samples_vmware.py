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


def long_tag(name: str, data: bytes, version: int, padding: int = 0, *indices: int, in_memory: int = 0) -> bytes:
    sizes = [size.to_bytes(4 if version == 0 else 8, "little") for size in (len(data), in_memory or len(data))]
    head = bytes([len(indices) << 6 | 62, len(name)]) + name.encode()
    head += b"".join(struct.pack("<I", index) for index in indices)
    return head + b"".join(sizes) + struct.pack("<H", padding) + bytes(padding) + data


def vmss(
    regions: Sequence[tuple[int, int, int]], version: int = 1, inside: bytes = b"", cr3: Sequence[int] = ()
) -> bytes:
    """``regions``: guest page, page of the memory file and pages of each. ``inside``: memory in the file itself.
    ``cr3``: of each vCPU."""
    groups = [b"cpu", b"memory"]
    at = 12 + 80 * len(groups)
    other = tag("fileversion", 4) + long_tag("thumbnail", b"png" * 100, version, 7)
    for cpu, root in enumerate(cr3):
        for register, value in ((0, 0x80050033), (3, root), (4, 0x6F0)):
            other += tag("CR64", value, cpu, register, size=8)
    other += b"\0\0"
    memory = tag("align_mask", 0xFFFF, size=8) + tag("regionsCount", len(regions))
    for number, (ppn, page, pages) in enumerate(regions):
        memory += tag("regionPPN", ppn, number) + tag("regionPageNum", page, number) + tag("regionSize", pages, number)
    if inside:
        memory += long_tag("Memory", inside, version, 5, 0, 0)
    memory += tag("hotSet", 1, 2, 3) + b"\0\0"
    header = bytes.fromhex(MAGICS[version]) + struct.pack("<II", 8, len(groups))
    table = struct.pack("<64sQQ", groups[0], at, len(other)) + struct.pack("<64sQQ", groups[1], at + len(other), 0)
    return header + table + other + memory


REGIONS = [(0, 0, 2), (0x100000, 2, 1)]
STATE = vmss(REGIONS)
MEMORY = page_of(1) + bytes(4096) + page_of(2)
_TAGS = STATE.index(b"\x04\x0cregionsCount")
_SIZE = STATE.index(b"regionSize") + len("regionSize") + 4


INSIDE = vmss(REGIONS, 2, MEMORY, [0x1000])

SAMPLES = [
    Sample.of_file(
        "vmware-one-file",
        "vmware",
        INSIDE,
        (Length("size of the memory", INSIDE.index(b"Memory") + 6 + 8, 8, "little", refused=(0, 1, len(MEMORY) - 1)),),
    ),
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
