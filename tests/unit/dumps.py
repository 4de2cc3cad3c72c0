"""Encoders of ELF cores and kdump-compressed dumps, written from their descriptions and independent of the readers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

PAGE = 4096
EM_386, EM_X86_64, EM_AARCH64 = 3, 62, 183


def page_of(seed: int) -> bytes:
    return struct.pack("<Q", seed + 1) * (PAGE // 8)


def pages_of(first: int, count: int) -> bytes:
    return b"".join(map(page_of, range(first, first + count)))


@dataclass(frozen=True)
class Load:
    """A PT_LOAD; ``at`` another one's number to have the same place in the file."""

    address: int
    data: bytes
    virtual: int = 0
    at: int | None = None
    more: int = 0
    """Bytes of memory that are not in the file."""


def note(name: bytes, kind: int, body: bytes) -> bytes:
    name += b"\0"
    header = struct.pack("<III", len(name), len(body), kind)
    return header + name + bytes(-len(name) % 4) + body + bytes(-len(body) % 4)


def qemu_note(
    cr3: int, *, cr0: int = 0x80050033, cr4: int = 0x6F0, cs_flags: int = 0xAF9B00, version: int = 1
) -> bytes:
    body = struct.pack("<II", version, 440)
    registers = [0] * 18
    registers[6], registers[16] = 0xFFFFC90000013EC8, 0xFFFFFFFF81C01ABC
    body += struct.pack("<18Q", *registers)
    for number in range(10):
        base = {8: 0xFFFFFE0000001000, 9: 0xFFFFFE0000000000}.get(number, 0)
        body += struct.pack("<IIIIQ", 0x10 if number == 0 else 0, 0xFFFFFFFF, cs_flags if number == 0 else 0, 0, base)
    body += struct.pack("<5Q", cr0, 0, 0, cr3, 0x6F0) + bytes(8)
    return note(b"QEMU", 0, body)


def prstatus_note(rip: int = 0xFFFFFFFF81C01ABC) -> bytes:
    body = bytearray(336)
    struct.pack_into("<QQQQ", body, 240, rip, 0x10, 0x246, 0xFFFFC90000013EC8)
    return note(b"CORE", 1, bytes(body))


def elf_core(
    loads: Sequence[Load],
    notes: bytes = b"",
    *,
    bits: int = 64,
    machine: int = EM_X86_64,
    order: int = 1,
    kind: int = 4,
    many: bool = False,
    gap: bytes = b"",
) -> bytes:
    """Notes, then the segments with ``gap`` before each. ``many``: the number of headers is in a section."""
    header_size, program_size, section_size = (64, 56, 64) if bits == 64 else (52, 32, 40)
    count = len(loads) + bool(notes)
    phoff = header_size + (section_size if many else 0)
    at = phoff + count * program_size
    ident = struct.pack("<4sBBB9x", b"\x7fELF", bits // 32, order, 1)
    fields = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    shoff = header_size if many else 0
    number = 0xFFFF if many else count
    header = struct.pack(
        fields, kind, machine, 1, 0, phoff, shoff, 0, header_size, program_size, number, section_size, int(many), 0
    )
    table, body = [], bytearray()
    if notes:
        table.append(_program(bits, 4, at, 0, 0, len(notes), len(notes)))
        body += notes
    places: list[int] = []
    for load in loads:
        if load.at is None:
            body += gap
            places.append(at + len(body))
            body += load.data
        else:
            places.append(places[load.at])
        size = len(load.data)
        table.append(_program(bits, 1, places[-1], load.virtual, load.address, size, size + load.more))
    section = bytearray(section_size if many else 0)
    if many:
        struct.pack_into("<I", section, 44 if bits == 64 else 28, count)
    return ident + header + bytes(section) + b"".join(table) + bytes(body)


def _program(bits: int, kind: int, offset: int, virtual: int, physical: int, in_file: int, in_memory: int) -> bytes:
    if bits == 64:
        return struct.pack("<IIQQQQQQ", kind, 0, offset, virtual, physical, in_file, in_memory, 0)
    return struct.pack("<IIIIIIII", kind, offset, virtual, physical, in_file, in_memory, 0, 0)


@dataclass(frozen=True)
class Page:
    """A page of a dump: its frame, and how it is kept there."""

    pfn: int
    data: bytes
    flags: int = 1
    packed: bytes | None = None
    size: int | None = None


def kdump(
    pages: Sequence[Page],
    *,
    notes: bytes = b"",
    vmcoreinfo: bytes = b"",
    version: int = 6,
    status: int = 1,
    block: int = PAGE,
    split: int = 0,
    end: int | None = None,
    machine: bytes = b"x86_64",
) -> bytes:
    """Zero pages share their bytes, as QEMU and makedumpfile have it."""
    last = end if end is not None else max(page.pfn for page in pages) + 1
    bitmap_blocks = 2 * -(-(max(page.pfn for page in pages) + 1) // (8 * PAGE))
    bitmap = bytearray(bitmap_blocks // 2 * PAGE)
    for page in pages:
        bitmap[page.pfn // 8] |= 1 << page.pfn % 8
    names = b"Linux".ljust(4 * 65, b"\0") + machine.ljust(2 * 65, b"\0")
    header = struct.pack(
        "<8sI390s22xIIIIIIIIII", b"KDUMP   ", version, names, status, block, 1, bitmap_blocks,
        last if version < 6 else 0, 0, 0, 0, 0, 1,
    )  # fmt: skip
    extra_at = PAGE + 104
    sub = struct.pack("<QIIQQQQQQQQQQQ", 0, 1, split, 0, 0, extra_at, len(vmcoreinfo), extra_at + len(vmcoreinfo),
                      len(notes), 0, 0, 0, 0, last)  # fmt: skip
    blob = sub + vmcoreinfo + notes
    front = header.ljust(PAGE, b"\0") + blob.ljust(PAGE, b"\0") + bytes(bitmap) * 2
    at = len(front) + 24 * len(pages)
    table, body, zero_at = [], b"", -1
    for page in pages:
        packed = page.packed
        if packed is None:
            packed = zlib.compress(page.data) if page.flags == 1 else page.data
        place = at + len(body)
        if not any(page.data):
            if zero_at >= 0:
                place, packed = zero_at, b""
            zero_at = place
        stored = len(packed) if packed else len(zlib.compress(bytes(PAGE)))
        table.append(struct.pack("<QIIQ", place, page.size if page.size is not None else stored, page.flags, 0))
        body += packed
    assert len(blob) <= PAGE
    return front + b"".join(table) + body


def flatten(dump: bytes, piece: int = 5000) -> bytes:
    """In pieces, the last ones first."""
    pieces = [(at, dump[at : at + piece]) for at in range(0, len(dump), piece)]
    out = struct.pack(">16sQQ", b"makedumpfile", 1, 1).ljust(PAGE, b"\0")
    for at, data in reversed(pieces):
        out += struct.pack(">qq", at, len(data)) + data
    return out + struct.pack(">qq", -1, -1)
