"""ELF cores of whole machines: QEMU's dump-guest-memory, ``virsh dump --memory-only``, /proc/vmcore.

As in the System V ABI (gabi, chapters 4 and 5) and QEMU's docs of dump-guest-memory; little-endian, of 64 or 32 bits.

| part            | what is taken from it                                                                             |
|-----------------|---------------------------------------------------------------------------------------------------|
| ELF header      | ``e_type`` 4 (ET_CORE), ``e_machine``, ``e_phoff``, ``e_phentsize``, ``e_phnum``, ``e_shoff``     |
| section 0       | ``sh_info`` is the number of program headers where ``e_phnum`` is 0xffff                          |
| program headers | PT_LOAD 1: ``p_filesz`` bytes at ``p_offset`` are memory at ``p_paddr``; PT_NOTE 4: notes         |
| notes           | the vCPUs' registers, and ``VMCOREINFO`` as ``config/vmcoreinfo``: see elf_notes.py               |

What lies between the segments, and what belongs to none, is kept in the native file. Where segments have the same
physical memory, as with ``paging=on`` and in /proc/vmcore, the first in address order counts. Memory that is not in the
file (``p_memsz`` beyond ``p_filesz``) is no memory of the image. Cores cannot be resumed, only inspected: the state of
the devices is not in them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.elf_notes import Notes, parse_notes
from imagefs.formats.pieces import PageRun, PieceMemory, page_runs, record_file
from imagefs.formats.regions import MAX_RANGES, place_range
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region

MAGIC = b"\x7fELF"
ET_CORE = 4
PT_LOAD, PT_NOTE = 1, 4
MANY = 0xFFFF
"""``e_phnum`` where there are too many for it."""

MAX_HEADERS = 1 << 18
MAX_NOTES = 16 << 20
MAX_ADDRESS = 1 << 52

_IDENT = struct.Struct("<4sBBB9x")
_LITTLE_ENDIAN = 1
_TYPE_AND_MACHINE = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class _Class:
    """Where the fields are in headers of 64 or 32 bits."""

    header: struct.Struct
    """phoff, shoff, phentsize, phnum; ``header_at`` bytes into the file."""
    program: struct.Struct
    order: tuple[str, ...]
    """The fields of a program header."""
    section_info: int
    """Offset of sh_info in a section header."""


_HEADER_AT = 24
_FIELDS_64 = ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align")
_FIELDS_32 = ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align")
_CLASSES = {
    1: _Class(struct.Struct("<4xII6xHH"), struct.Struct("<8I"), _FIELDS_32, 28),
    2: _Class(struct.Struct("<8xQQ6xHH"), struct.Struct("<II6Q"), _FIELDS_64, 44),
}
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    address: int
    offset: int
    size: int


class ElfCore:
    """The format ``elf-core``."""

    name = "elf-core"

    def matches(self, source: Input) -> bool:
        head = source.head
        return head[:4] == MAGIC and head[16:18] == struct.pack("<H", ET_CORE)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a core has its memory in itself")
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory, not a core")
        whole = source.whole(workspace)
        kind, machine = _check_ident(whole)
        segments = list(_segments(whole, kind))
        notes = _notes(whole, machine, segments)
        memory, regions, runs = PieceMemory(), list[Region](), list[PageRun]()
        for segment in _apart(segments):
            if len(regions) >= MAX_RANGES:
                raise UnsupportedInputError(f"memory in more than {MAX_RANGES} pieces", field="program headers")
            place = place_range(regions, segment.address, segment.size)
            memory.add(place, whole, segment.offset, segment.size)
            runs += page_runs([(segment.offset, segment.size, place)])
        geometry = Geometry(tuple(regions))
        memory.pad(geometry.size)
        native = NativeRecorder(workspace)
        record_file(native.builder, whole, _in_file_order(runs))
        return Capture(
            source_format=self.name,
            source_version="",
            geometry=geometry,
            memory=memory,
            native=native.finish(BytesSource(b""), BytesSource(b"")),
            state=BytesSource(b""),
            config={"vmcoreinfo": notes.vmcoreinfo} if notes.vmcoreinfo else {},
            vcpus=notes.vcpus,
        )


FORMAT = ElfCore()


def _check_ident(whole: ByteSource) -> tuple[_Class, int]:
    """The class, and ``e_machine``."""
    data = _read(whole, 0, _IDENT.size + _TYPE_AND_MACHINE.size, "ELF header")
    magic, width, order, _ = _IDENT.unpack_from(data)
    if magic != MAGIC:
        raise UnsupportedInputError(f"{magic.hex()} is not {MAGIC.hex()} (ELF)", field="magic", offset=0)
    if width not in _CLASSES:
        raise UnsupportedInputError(f"{width} is neither 32 (1) nor 64 bits (2)", field="ELF class", offset=4)
    if order != _LITTLE_ENDIAN:
        raise UnsupportedInputError(f"{order}: only little-endian machines are supported", field="ELF data", offset=5)
    kind, machine = _TYPE_AND_MACHINE.unpack_from(data, _IDENT.size)
    if kind != ET_CORE:
        raise UnsupportedInputError(f"{kind} is not {ET_CORE}: no core", field="e_type", offset=16)
    return _CLASSES[width], machine


def _segments(whole: ByteSource, kind: _Class) -> Iterator[_Segment]:
    """Of the types that are looked at, in the order of their headers."""
    phoff, shoff, entry_size, count = kind.header.unpack(_read(whole, _HEADER_AT, kind.header.size, "ELF header"))
    if entry_size != kind.program.size:
        reason = f"{entry_size} bytes a program header, {kind.program.size} are expected"
        raise UnsupportedInputError(reason, field="e_phentsize", offset=_HEADER_AT)
    counted_at = _HEADER_AT
    if count == MANY:
        counted_at = shoff + kind.section_info
        (count,) = _U32.unpack(_read(whole, counted_at, _U32.size, "sh_info of section 0"))
    if count > MAX_HEADERS:
        raise UnsupportedInputError(f"{count} are over {MAX_HEADERS}", field="program headers", offset=counted_at)
    table = _read(whole, phoff, count * entry_size, "program headers")
    taken = range(phoff, phoff + len(table))
    loads = False
    zero = True
    for number, values in enumerate(kind.program.iter_unpack(table)):
        fields = dict(zip(kind.order, values, strict=True))
        segment = _Segment(fields["type"], fields["paddr"], fields["offset"], fields["filesz"])
        if segment.kind not in (PT_LOAD, PT_NOTE) or not segment.size:
            continue
        _check(segment, whole.size, taken, number, phoff + number * entry_size)
        if segment.kind == PT_LOAD:
            zero &= segment.address == 0 and (loads or fields["vaddr"] != 0)
            loads = True
        yield segment
    if not loads:
        reason = "no segment has memory (of Xen's dump-core, whose pages are in sections? Save the guest with xl save)"
        raise UnsupportedInputError(reason, field="program headers", offset=phoff)
    if zero:
        reason = "all physical addresses are zero: the core of a process, not of a machine"
        raise UnsupportedInputError(reason, field="p_paddr", offset=phoff)


def _check(segment: _Segment, size: int, taken: range, number: int, at: int) -> None:
    reason = ""
    if segment.offset + segment.size > size:
        reason = f"{segment.size:#x} bytes at {segment.offset:#x} are beyond the end of the file at {size:#x}"
    elif segment.offset < taken.stop and taken.start < segment.offset + segment.size:
        reason = f"{segment.size:#x} bytes at {segment.offset:#x} lie over the program headers"
    elif segment.kind == PT_NOTE and segment.size > MAX_NOTES:
        reason = f"{segment.size:#x} bytes of notes, over {MAX_NOTES:#x}"
    elif segment.kind == PT_LOAD and segment.address + segment.size > MAX_ADDRESS:
        reason = f"physical address {segment.address:#x} is beyond 52 bits"
    if reason:
        raise UnsupportedInputError(reason, field=f"program header {number}", offset=at)


def _notes(whole: ByteSource, machine: int, segments: list[_Segment]) -> Notes:
    for segment in segments:
        if segment.kind == PT_NOTE:
            return parse_notes(_read(whole, segment.offset, segment.size, "notes"), machine, segment.offset)
    return Notes()


def _apart(segments: list[_Segment]) -> Iterator[_Segment]:
    """Memory in the order of addresses, each byte of it once."""
    end = 0
    for segment in sorted((each for each in segments if each.kind == PT_LOAD), key=attrgetter("address")):
        known = max(0, end - segment.address)
        if known < segment.size:
            yield _Segment(PT_LOAD, segment.address + known, segment.offset + known, segment.size - known)
            end = segment.address + segment.size


def _in_file_order(runs: list[PageRun]) -> Iterator[PageRun]:
    """Without those that begin in another: of two addresses for the same bytes of the file, one is enough."""
    end = 0
    for run in sorted(runs, key=attrgetter("offset")):
        if run.offset >= end:
            yield run
            end = run.offset + run.count * PAGE_SIZE


def _read(whole: ByteSource, offset: int, length: int, field: str) -> bytes:
    data = bytes(whole.read_at(offset, length)) if offset < whole.size else b""
    if len(data) < length:
        reason = f"the file ends after {len(data)} of its {length} bytes"
        raise UnsupportedInputError(reason, field=field, offset=offset)
    return data
