"""Firecracker snapshots: a state file with right magic, version and CRC, and memory files."""

from __future__ import annotations

import struct

from imagefs.formats.firecracker import crc64
from tests.unit.samples import Length, Sample
from tests.unit.streams import page_of

MAGIC = 0x0710_1984_8664_0000
MAGIC_ARM = 0x0710_1984_AAAA_0000


def vmstate(state: bytes = b"devices and vCPUs" * 9, version: str = "8.0.0", magic: int = MAGIC) -> bytes:
    """As Firecracker 1.7 to 1.14 write it."""
    return _with_crc(struct.pack("<QQ", magic, len(version)) + version.encode() + state)


def old_vmstate(state: bytes = b"devices and vCPUs" * 9, version: int = 23) -> bytes:
    """As Firecracker up to 1.6 writes it."""
    return _with_crc(struct.pack("<QH", MAGIC | 1, version) + state)


def packed_vmstate(state: bytes = b"devices and vCPUs" * 9) -> bytes:
    """Like that of Firecracker 1.15, whose bitcode puts something before the magic."""
    return _with_crc(b"\0" + struct.pack("<Q", MAGIC) + b"\0\x058.0.0" + state)


def region_list(*regions: tuple[int, int]) -> bytes:
    """Address and bytes of each, as bincode has a list of GuestMemoryRegionState (before region types)."""
    return struct.pack("<Q", len(regions)) + b"".join(struct.pack("<QQ", *region) for region in regions)


def _with_crc(data: bytes) -> bytes:
    return data + struct.pack("<Q", crc64(data))


MEMORY = page_of(1) + bytes(4096) + page_of(2) + bytes(2 * 4096) + page_of(3)
DIFF = bytes(4096) + page_of(4) + page_of(5) + bytes(3 * 4096)
STATE = vmstate()


def _whole_pages(file: str, length: int) -> bool:
    """Nothing outside the opaque state says how much memory there is."""
    return file == "mem" and length > 0 and length % 4096 == 0


SAMPLES = [
    Sample(
        "firecracker",
        "firecracker",
        {"vmstate": STATE, "mem": MEMORY},
        "vmstate",
        ("mem",),
        (Length("length of the version", 8, 8, "little", "vmstate", refused=(0, 4, len(STATE))),),
        _whole_pages,
    ),
    Sample("firecracker-directory", "firecracker", {"vmstate": old_vmstate(), "mem": MEMORY}, may_end=_whole_pages),
    Sample(
        "firecracker-diff",
        "firecracker",
        {"vmstate": packed_vmstate(), "mem": MEMORY, "diff": DIFF},
        "vmstate",
        ("mem", "diff"),
        sparse=frozenset({"mem", "diff"}),
    ),
]
