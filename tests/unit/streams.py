"""An encoder of QEMU migration streams, written from the layout in the modules' tables and independent of the reader.

:func:`build` also says what a reader must make of the stream: memory, and the normalised state.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PAGE = 4096

Kind = Literal["page", "fill", "zlib", "xbzrle"]
"""``fill``: a ZERO record with a fill byte, zero in streams of today; ``xbzrle``: a delta to the copy before."""

DROPPED = (1, 2)
"""Commands that are for a destination with a way back: OPEN_RETURN_PATH, PING."""

DEVICES = (
    ("timer", 0, b"\0\6\0\0\0\1{not a description"),
    ("cpu", 0, bytes(range(256))),
    ("globalstate", 0, b"running"),
)


@dataclass(frozen=True)
class Record:
    """A page record. ``content`` is the page, or its fill byte."""

    kind: Kind
    block: str
    page: int
    content: bytes
    named: bool = False
    """Give the block's name even where CONTINUE would do."""

    @property
    def data(self) -> bytes:
        return self.content * PAGE if self.kind == "fill" else self.content


@dataclass
class Options:
    """Everything about a stream that is not its pages."""

    machine: str | None = "pc-i440fx-7.2"
    """None: no configuration section."""
    blocks: Mapping[str, int] = field(default_factory=lambda: {"pc.ram": 8 * PAGE, "vga.vram": 2 * PAGE})
    main: str = "pc.ram"
    more_main: Sequence[str] = ()
    """Blocks of guest memory beside the main one."""
    capabilities: Sequence[str] = ()
    addresses: Mapping[str, int] = field(default_factory=dict)
    page_bits: int | None = None
    uuid: bytes | None = None
    extra_subsection: bytes = b""
    footers: bool = True
    description: bool = True
    page_size: int = PAGE
    commands: Sequence[tuple[int, bytes]] = ()
    """Before the first section: number and data."""
    late_commands: Sequence[tuple[int, bytes]] = ()
    """Before the last section of RAM."""
    ended: bool = True
    """Whether the last section is SECTION_END, not SECTION_PART as in a background snapshot."""
    ram_version: int = 4
    devices: Sequence[tuple[str, int, bytes]] = DEVICES
    model: bool = True
    """Whether the memory is wanted."""


@dataclass
class Built:
    """A stream and what is in it."""

    data: bytes
    memory: bytes
    state: bytes
    records: list[tuple[int, Record]]
    """Offset of each page record's header."""
    devices_at: int
    eof_at: int
    description: bytes


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def counted(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def subsection(name: str, content: bytes) -> bytes:
    return b"\5" + counted(name) + u32(1) + content


def xbzrle(old: bytes, new: bytes) -> bytes:
    """The runs of bytes that differ, none where nothing does."""

    def length(value: int) -> bytes:
        return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])

    out, at = b"", 0
    while at < PAGE:
        start = next((place for place in range(at, PAGE) if old[place] != new[place]), PAGE)
        if start == PAGE:
            break
        stop = next((place for place in range(start, PAGE) if old[place] == new[place]), PAGE)
        out += length(start - at) + length(stop - start) + new[start:stop]
        at = stop
    return out


def encode_record(record: Record, continued: bool, old: bytes = bytes(PAGE)) -> bytes:
    flag = {"page": 0x08, "fill": 0x02, "zlib": 0x100, "xbzrle": 0x40}[record.kind]
    header = u64(record.page * PAGE | flag | (0x20 if continued else 0))
    if not continued:
        header += counted(record.block)
    if record.kind == "zlib":
        packed = zlib.compress(record.content, 1)
        return header + u32(len(packed)) + packed
    if record.kind == "xbzrle":
        runs = xbzrle(old, record.content)
        return header + b"\1" + u16(len(runs)) + runs
    return header + record.content


def plain_record(record: Record) -> bytes:
    """As it is in the normalised state."""
    if not any(record.data):
        return u64(record.page * PAGE | 0x02) + counted(record.block) + b"\0"
    return u64(record.page * PAGE | 0x08) + counted(record.block) + record.data


def describe(options: Options) -> bytes:
    devices = [{"name": name, "instance_id": instance, "version": 1} for name, instance, _ in options.devices]
    return json.dumps({"page_size": options.page_size, "devices": devices}).encode()


def device_sections(options: Options) -> bytes:
    out = b""
    for number, (name, instance, data) in enumerate(options.devices):
        out += b"\4" + u32(40 + number) + counted(name) + u32(instance) + u32(1) + data
        if options.footers:
            out += b"\x7e" + u32(40 + number)
    return out


def build(sections: Sequence[Sequence[Record]], options: Options | None = None) -> Built:
    """A stream whose first section (SECTION_START) has the records of ``sections[0]``, and so on."""
    options = options or Options()
    out, state = bytearray(), bytearray()

    def both(data: bytes) -> None:
        out.extend(data)
        state.extend(data)

    both(b"QEVM" + u32(3))
    if options.machine is not None:
        both(b"\7" + u32(len(options.machine)) + options.machine.encode())
        if options.page_bits is not None:
            both(subsection("configuration/target-page-bits", u32(options.page_bits)))
        if options.capabilities:
            names = b"".join(map(counted, options.capabilities))
            out += subsection("configuration/capabilities", u32(len(options.capabilities)) + names)
        if options.uuid is not None:
            both(subsection("configuration/uuid", options.uuid))
        out += options.extra_subsection
    out += b"".join(map(encode_command, options.commands))
    state += b"".join(encode_command(command) for command in options.commands if command[0] not in DROPPED)

    shared = "x-ignore-shared" in options.capabilities
    footer = (b"\x7e" + u32(2)) if options.footers else b""
    mains: dict[str, bytearray] = {}
    if options.model:
        mains = {name: bytearray(size) for name, size in options.blocks.items() if name in memory_blocks(options)}
    others = {name: bytearray(size) for name, size in options.blocks.items() if options.model and name not in mains}
    records: list[tuple[int, Record]] = []
    block_before = None
    part = b""
    for number, section in enumerate(sections):
        ends = options.ended and number == len(sections) - 1
        if number == len(sections) - 1 and number:
            out += b"".join(map(encode_command, options.late_commands))
        if number == 0:
            opening = b"\1" + u32(2) + counted("ram") + u32(0) + u32(options.ram_version)
            both(opening + u64(sum(options.blocks.values()) | 0x04))
            for name, size in options.blocks.items():
                both(counted(name) + u64(size))
                if shared:
                    out += u64(options.addresses.get(name, 0))
        else:
            out += (b"\3" if ends else b"\2") + u32(2)
        kept = b""
        for record in section:
            records.append((len(out), record))
            place = slice(record.page * PAGE, (record.page + 1) * PAGE)
            content = (mains | others).get(record.block, bytearray())
            continued = record.block == block_before and not record.named
            out += encode_record(record, continued, bytes(content[place]).ljust(PAGE, b"\0"))
            block_before = record.block
            if place.stop <= len(content):
                content[place] = record.data
            if record.block not in memory_blocks(options):
                kept += plain_record(record)
        out += u64(0x10) + footer
        if number == 0:
            state += kept + u64(0x10) + footer
        else:
            part += kept
    if part:
        state += b"\2" + u32(2) + part + u64(0x10) + footer
    state += b"".join(encode_command(command) for command in options.late_commands if command[0] not in DROPPED)
    state += b"\3" + u32(2) + u64(0x10) + footer
    devices_at = len(out)
    both(device_sections(options))
    eof_at = len(out)
    both(b"\0")
    description = describe(options)
    if options.description:
        both(b"\6" + u32(len(description)) + description)
    return Built(bytes(out), b"".join(mains.values()), bytes(state), records, devices_at, eof_at, description)


def memory_blocks(options: Options) -> set[str]:
    return {options.main, *options.more_main}


def encode_command(command: tuple[int, bytes]) -> bytes:
    number, data = command
    return b"\x08" + u16(number) + u16(len(data)) + data


@dataclass(frozen=True)
class Mapped:
    """A block of a mapped-ram file: its pages that have a bit, and bytes that are there without one."""

    size: int
    pages: Mapping[int, bytes] = field(default_factory=dict)
    stale: Mapping[int, bytes] = field(default_factory=dict)


ALIGNED = 4 * PAGE
"""Of the pages; QEMU has 1 MiB, which readers need not know."""


def build_mapped(blocks: Mapping[str, Mapped], main: Sequence[str], before: bytes = b"", **header: int) -> Built:
    """A mapped-ram file, behind ``before``; ``header`` overrides fields of the first block's header."""
    out, state = bytearray(before), bytearray()
    opening = b"QEVM" + u32(3) + b"\7" + u32(13) + b"pc-i440fx-9.0"
    ram = b"\1" + u32(2) + counted("ram") + u32(0) + u32(4) + u64(sum(block.size for block in blocks.values()) | 4)
    out += opening + subsection("configuration/capabilities", u32(1) + counted("mapped-ram")) + ram
    state += opening + ram
    records = b""
    for number, (name, block) in enumerate(blocks.items()):
        entry = counted(name) + u64(block.size)
        state += entry
        bitmap = bytearray((block.size // PAGE + 63) // 64 * 8)
        for page in block.pages:
            bitmap[page // 8] |= 1 << page % 8
        bitmap_at = len(out) + len(entry) + 28
        pages_at = (bitmap_at + len(bitmap) + ALIGNED - 1) // ALIGNED * ALIGNED
        fields = {"version": 1, "page_size": PAGE, "bitmap_at": bitmap_at, "pages_at": pages_at}
        fields |= header if number == 0 else {}
        out += entry + struct.pack(">IQQQ", *fields.values()) + bitmap
        out += bytes(pages_at - len(out))
        for page in range(block.size // PAGE):
            out += block.pages.get(page) or block.stale.get(page) or bytes(PAGE)
            if name not in main:
                records += plain_record(Record("page", name, page, block.pages.get(page, bytes(PAGE))))
    footer = b"\x7e" + u32(2)
    state += u64(0x10) + footer
    if records:
        state += b"\2" + u32(2) + records + u64(0x10) + footer
    out += u64(0x10) + footer
    for data in (out, state):
        data += b"\3" + u32(2) + u64(0x10) + footer
    devices_at = len(out)
    end = device_sections(Options()) + b"\0"
    description = describe(Options())
    out += end + b"\6" + u32(len(description)) + description
    state += end + b"\6" + u32(len(description)) + description
    memory = b"".join(
        blocks[name].pages.get(page, bytes(PAGE))
        for name in blocks
        if name in main
        for page in range(blocks[name].size // PAGE)
    )
    return Built(bytes(out), memory, bytes(state), [], devices_at, devices_at + len(end) - 1, description)


def page_of(seed: int) -> bytes:
    """Some page that no other seed gives."""
    return struct.pack("<Q", seed + 1) * (PAGE // 8)
