"""An encoder of Xen streams, written from Xen's specifications and independent of the reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence

PAGE = 4096

NOTAB, L1TAB, L2TAB, L3TAB, L4TAB, PINNED, BROKEN, XALLOC, XTAB = 0, 1, 2, 3, 4, 8, 13, 14, 15

JSON = b'{"c_info": {"type": "pvh", "name": "vm"}}\n\0'
KHZ = 2_300_002
TIME_SCALE = bytes.fromhex("cac69bdeff")
"""Multiplier and shift that Xen 4.17 gave a guest with a TSC of KHZ."""

Entry = tuple[int, int, bytes]
"""Frame number, type, contents (empty where the type has none)."""


def page_of(seed: int) -> bytes:
    return struct.pack("<Q", seed + 1) * (PAGE // 8)


def record(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def page_data(entries: Sequence[Entry]) -> bytes:
    body = struct.pack("<II", len(entries), 0)
    body += b"".join(struct.pack("<Q", kind << 60 | pfn) for pfn, kind, _ in entries)
    return record(1, body + b"".join(data for _, _, data in entries))


def pages(first: int, count: int, kind: int = NOTAB, seed: int = 0) -> list[Entry]:
    return [(pfn, kind, page_of(seed * 1000 + pfn) if kind < BROKEN else b"") for pfn in range(first, first + count)]


def hvm_vcpu(cr3: int | None, rip: int = 0xFFFFFFFF81A43C83, efer: int = 0xD01, code: int = 0xA9B) -> bytes:
    """``struct hvm_hw_cpu``; without ``cr3`` paging is off."""
    data = bytearray(1032)
    struct.pack_into("<Q", data, 568, 0xFFFFC90000093E40)
    struct.pack_into("<Q", data, 640, rip)
    struct.pack_into("<QQQQ", data, 656, 0x50033 if cr3 is None else 0x80050033, 0, cr3 or 0, 0x6F0)
    struct.pack_into("<I", data, 736, 0x10)
    struct.pack_into("<QQ", data, 872, 0xFFFFFE0000000000, 0xFFFFFE0000001000)
    struct.pack_into("<I", data, 888, code)
    struct.pack_into("<Q", data, 992, efer)
    return bytes(data)


def context_entry(kind: int, instance: int, body: bytes) -> bytes:
    return struct.pack("<HHI", kind, instance, len(body)) + body


def hvm_context(vcpus: Sequence[bytes], *, emulated: bool = False) -> bytes:
    entries = [context_entry(1, 0, bytes(24))]
    entries += [context_entry(2, number, data) for number, data in enumerate(vcpus)]
    if emulated:
        entries += [context_entry(3, 0, bytes(8)), context_entry(3, 1, bytes(8)), context_entry(4, 0, bytes(400))]
    return record(9, b"".join(entries) + context_entry(0, 0, b""))


def hvm_params(params: Sequence[tuple[int, int]]) -> bytes:
    return record(10, struct.pack("<II", len(params), 0) + b"".join(struct.pack("<QQ", *each) for each in params))


def tsc_info(khz: int = KHZ) -> bytes:
    return record(8, struct.pack("<IIQII", 0, khz, 46778870113, 1, 0))


def pv_vcpu(number: int, width: int, root: int) -> bytes:
    """``root`` is the frame number of the top page table."""
    if width == 8:
        data = bytearray(5168)
        struct.pack_into("<Q", data, 520 + 128, 0xFFFFFFFF8100146A)
        struct.pack_into("<H", data, 520 + 136, 0xE033)
        struct.pack_into("<Q", data, 520 + 152, 0xFFFFFFFF82203E90)
        struct.pack_into("<QQQQQ", data, 4984, 0x80050033, root + 1 << 12 | 1, 0, root << 12, 0x2620)
    else:
        data = bytearray(2800)
        struct.pack_into("<I", data, 516 + 32, 0xC1001227)
        struct.pack_into("<H", data, 516 + 36, 0xE019)
        struct.pack_into("<I", data, 516 + 44, 0xC15C7F78)
        folded = (root << 12 | root >> 20) & 0xFFFFFFFF
        struct.pack_into("<IIIII", data, 2716, 0x8005003B, 0, 0, folded, 0x640)
    return record(4, struct.pack("<II", number, 0) + bytes(data))


def pv_info(width: int, levels: int) -> bytes:
    return record(2, bytes([width, levels, 0, 0, 0, 0, 0, 0]))


def p2m_frames(last: int, width: int) -> bytes:
    count = last // (PAGE // width) + 1
    return record(3, struct.pack("<II", 0, last) + struct.pack(f"<{count}Q", *range(100, 100 + count)))


STATIC_DATA = record(0x11, bytes(1224)) + record(0x12, bytes(36)) + record(0x10)
SHARED_INFO = record(7, page_of(7))


def libxc(records: bytes, *, domain: int, version: int = 3, options: int = 0, shift: int = 12) -> bytes:
    header = struct.pack(">8s4sIHHI", b"\xff" * 8, b"XENF", version, options, 0, 0)
    return header + struct.pack("<IHHII", domain, shift, 0, 4, 17) + records + record(0)


def libxl(stream: bytes, after: bytes = b"", *, version: int = 2, options: int = 0) -> bytes:
    return struct.pack(">8sII", b"LibxlFmt", version, options) + record(1) + stream + after + record(0)


def xl(stream: bytes, config: bytes = JSON, *, flags: int = 3, extra: bytes = b"", order: int = 0x01020304) -> bytes:
    optional = struct.pack("<I", len(config)) + config + extra
    return (
        struct.pack("<32sIIII", b"Xen saved domain, xl format\n \0 \r", order, flags, 0, len(optional))
        + optional
        + stream
    )


def libvirt(stream: bytes, xml: bytes = b"<domain type='xen'/>\n\0", *, version: int = 2) -> bytes:
    return struct.pack("<16sII40x", b"libvirt-xml\n \0 \r", version, len(xml)) + xml + stream


def hvm_stream(data: bytes, *, vcpus: int = 1, emulated: bool = False, cr3: int | None = None) -> bytes:
    """A libxc stream with these PAGE_DATA records."""
    context = hvm_context([hvm_vcpu(cr3)] * vcpus, emulated=emulated)
    params = hvm_params([(1, 0xFEFFC), (5, 0xFEFFD), (17, 0xFEFFF), (12, 0xFEFFE000), (99, 2**64 - 1)])
    return libxc(STATIC_DATA + data + tsc_info() + context + params, domain=2)


def pv_stream(data: bytes, *, last: int, width: int = 8, root: int = 0, vcpus: int = 1, version: int = 3) -> bytes:
    levels = 4 if width == 8 else 3
    static = STATIC_DATA if version == 3 else b""
    cpus = b"".join(
        pv_vcpu(number, width, root)
        + record(5, bytes(8) + bytes(136))
        + record(6, bytes(8) + bytes(300))
        + record(12, bytes(8) + bytes(20))
        for number in range(vcpus)
    )
    records = pv_info(width, levels) + static + p2m_frames(last, width) + data + tsc_info() + SHARED_INFO + cpus
    return libxc(records, domain=1, version=version)
