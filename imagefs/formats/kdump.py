"""kdump-compressed dumps: makedumpfile's, and QEMU's dump-guest-memory in the format ``kdump-zlib``.

As in makedumpfile's IMPLEMENTATION and QEMU's dump/dump.c and include/sysemu/dump.h; little-endian, of 64 bits. Blocks
have 4096 bytes.

| block       | part       | fields, by offset                                                                        |
|-------------|------------|------------------------------------------------------------------------------------------|
| 0           | header     | 0 ``KDUMP`` and three blanks; 8 version u32; 12 utsname: 6 × 65 bytes, the fifth the     |
|             |            | machine; 424 status, 428 block size, 432 blocks of sub-header, 436 blocks of bitmaps,    |
|             |            | 440 end of frames, u32 each                                                              |
| 1           | sub-header | 12 split u32; offset and size of vmcoreinfo (32, 40) and of the notes (48, 56), u64      |
|             |            | each; 96 end of frames u64, since version 6                                              |
| after it    | bitmaps    | of the frames that there are, and of those that are in the dump; lowest bit first        |
| after them  | pages      | of each frame in the dump: offset u64, size u32, flags u32, 8 bytes of kernel's flags    |

Flags say how a page is compressed: 0 not, 1 zlib, 2 lzo, 4 snappy, 0x20 zstd.

*Flattened*, as a dump is that goes into a pipe, it begins with 4096 bytes (big-endian): ``makedumpfile`` and zeros up
to 16 bytes, type u64 = 1, version u64 = 1. Then follow pieces in any order: offset i64, size i64, and so many bytes,
until both are -1. Offsets in messages are then those in the dump, not in the flattened file.

Memory is decompressed; the native file keeps the compressed pages as they came, since compressing them again would not
have to give the same bytes. Frames that makedumpfile left out are no memory of the image. Inspect only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.elf_notes import EM_X86_64, Notes, parse_notes
from imagefs.formats.kdump_pages import BLOCK, Frames, read_pages
from imagefs.formats.pieces import record_file
from imagefs.formats.regions import regions_of
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.geometry import Geometry

MAGIC = b"KDUMP   "
FLATTENED = b"makedumpfile".ljust(16, b"\0")
MAX_PFN = 1 << 31
"""8 TiB."""
MAX_SIZE = 1 << 43
MAX_NOTES = 16 << 20

_FLAT_HEADER = struct.Struct(">16sQQ")
_FLAT_PIECE = struct.Struct(">qq")
_FLAT_SIZE = 4096
_PIECE = 1 << 20

_HEADER = struct.Struct("<8sI390s22xIIIII")
_SUBHEADER = struct.Struct("<12xI16xQQQQ32xQ")
_MACHINE_AT, _NAME_SIZE = 4 * 65, 65
_INCOMPLETE = 0x8


class Kdump:
    """The format ``kdump``."""

    name = "kdump"

    def matches(self, source: Input) -> bool:
        return source.head.startswith((MAGIC, FLATTENED))

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a dump has its memory in itself")
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory, not a dump")
        whole = source.whole(workspace)
        flattened = source.head.startswith(FLATTENED)
        dump = _unflatten(whole, workspace) if flattened else whole
        header = _read_header(dump)
        frames = Frames(dump, header.bitmap_at, header.bitmap_size, header.end)
        geometry = Geometry(tuple(regions_of(frames.runs)))
        if not geometry.regions:
            raise UnsupportedInputError("no page is in the dump", field="second bitmap", offset=header.bitmap_at)
        memory = workspace.spool()
        memory.resize(geometry.size)
        read_pages(dump, header.pages_at, frames, geometry, memory)
        native = NativeRecorder(workspace)
        record_file(native.builder, whole)
        return Capture(
            source_format=self.name,
            source_version=f"{header.version}{' flattened' if flattened else ''}",
            geometry=geometry,
            memory=memory,
            native=native.finish(BytesSource(b""), BytesSource(b"")),
            state=BytesSource(b""),
            config={"vmcoreinfo": header.vmcoreinfo} if header.vmcoreinfo else {},
            vcpus=header.notes.vcpus,
        )


FORMAT = Kdump()


@dataclass(frozen=True)
class _Header:
    version: int
    end: int
    bitmap_at: int
    """Of the second bitmap, in bytes."""
    bitmap_size: int
    pages_at: int
    vmcoreinfo: bytes
    notes: Notes


def _unflatten(whole: ByteSource, workspace: Workspace) -> ByteSource:
    """The dump as it would be in a file."""
    _, kind, version = _FLAT_HEADER.unpack(read(whole, 0, _FLAT_HEADER.size, "flat header"))
    if (kind, version) != (1, 1):
        raise UnsupportedInputError(
            f"type {kind}, version {version}: 1 and 1 are known", field="flat header", offset=16
        )
    dump = workspace.spool()
    for at, offset, size in _flat_pieces(whole):
        for done in range(0, size, _PIECE):
            dump.write_at(offset + done, whole.read_at(at + done, min(_PIECE, size - done)))
    return dump


def _flat_pieces(whole: ByteSource) -> Iterator[tuple[int, int, int]]:
    """Where each piece is, where it goes, and its bytes."""
    at = _FLAT_SIZE
    while True:
        offset, size = _FLAT_PIECE.unpack(read(whole, at, _FLAT_PIECE.size, "flat piece"))
        if offset == size == -1:
            break
        if offset < 0 or size < 0 or offset + size > MAX_SIZE:
            raise UnsupportedInputError(f"{size:#x} bytes for {offset:#x}", field="flat piece", offset=at)
        at += _FLAT_PIECE.size
        if size > whole.size - at:
            reason = f"the file ends after {whole.size - at} of its {size} bytes"
            raise UnsupportedInputError(reason, field="flat piece", offset=at)
        yield at, offset, size
        at += size


def _read_header(dump: ByteSource) -> _Header:
    data = read(dump, 0, _HEADER.size, "header")
    magic, version, names, status, block, sub_blocks, bitmap_blocks, end = _HEADER.unpack(data)
    if magic != MAGIC:
        raise UnsupportedInputError(f"{magic.hex()} is not {MAGIC.hex()} (KDUMP)", field="magic", offset=0)
    if block != BLOCK:
        reason = f"{block} is not {BLOCK}: a dump of a 32-bit guest, or with other pages, is not supported"
        raise UnsupportedInputError(reason, field="block size", offset=428)
    if status & _INCOMPLETE:
        raise UnsupportedInputError("the dump says that it is incomplete", field="status", offset=424)
    split, info_at, info_size, notes_at, notes_size, long_end = _SUBHEADER.unpack(
        read(dump, BLOCK, _SUBHEADER.size, "sub-header")
    )
    if split:
        reason = "a part of a split dump: put them together with makedumpfile --reassemble"
        raise UnsupportedInputError(reason, field="split", offset=BLOCK + 12)
    if version >= 6:
        end = long_end
    size = bitmap_blocks // 2 * BLOCK
    if not 0 < end <= min(MAX_PFN, size * 8):
        reason = f"{end:#x} frames, {min(MAX_PFN, size * 8):#x} at most are in a bitmap of {size:#x} bytes"
        raise UnsupportedInputError(reason, field="end of frames", offset=BLOCK + 96 if version >= 6 else 440)
    bitmaps_at = (1 + sub_blocks) * BLOCK
    for field, at, count in (("vmcoreinfo", info_at, info_size), ("notes", notes_at, notes_size)):
        if count > MAX_NOTES:
            raise UnsupportedInputError(f"{count:#x} bytes, over {MAX_NOTES:#x}", field=f"size of {field}", offset=at)
    machine = names[_MACHINE_AT : _MACHINE_AT + _NAME_SIZE].rstrip(b"\0")
    notes = read(dump, notes_at, notes_size, "notes")
    return _Header(
        version,
        end,
        bitmaps_at + size,
        size,
        bitmaps_at + bitmap_blocks * BLOCK,
        read(dump, info_at, info_size, "vmcoreinfo"),
        parse_notes(notes, EM_X86_64 if machine == b"x86_64" else 0, notes_at),
    )


def read(source: ByteSource, offset: int, length: int, field: str) -> bytes:
    data = bytes(source.read_at(offset, length)) if length and offset < source.size else b""
    if len(data) < length:
        reason = f"the file ends after {len(data)} of its {length} bytes"
        raise UnsupportedInputError(reason, field=field, offset=offset)
    return data
