"""LiME, the Linux Memory Extractor: ranges of physical memory, each behind a header.

As specified in https://github.com/504ensicsLabs/LiME (doc/README.md, src/lime.h); all little-endian:

| offset | bytes | field         | meaning                                    |
|-------:|------:|---------------|--------------------------------------------|
|      0 |     4 | magic         | 0x4C694D45                                 |
|      4 |     4 | version       | 1                                          |
|      8 |     8 | start address | physical, of the range's first byte        |
|     16 |     8 | end address   | of its last byte                           |
|     24 |     8 | reserved      | 0; not looked at                           |
|     32 |     … | the range     | end address - start address + 1 bytes      |

The ranges ascend and do not overlap. They are those of ``System RAM`` in /proc/iomem, so one may begin or end within
a page: what is missing of the page is zeros in ``memory``. Nothing says how many ranges there are: a file that ends
behind one is complete. It can be inspected only: nothing is known of the CPUs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.pieces import PieceMemory, page_runs, record_file
from imagefs.formats.regions import MAX_RANGES, place_range
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.geometry import Geometry, Region

HEADER = struct.Struct("<IIQQ8x")
MAGIC = 0x4C694D45
VERSION = 1
MAX_ADDRESS = 1 << 52
"""No machine has more than 52 bits of physical addresses."""


class Lime:
    """The format ``lime``."""

    name = "lime"

    def matches(self, source: Input) -> bool:
        return source.head[:8] == struct.pack("<II", MAGIC, VERSION)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a LiME image has its memory in itself")
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory, not a LiME image")
        check_header(source.head, 0)
        whole = source.whole(workspace)
        memory, regions, spans = PieceMemory(), list[Region](), []
        for address, offset, length in _ranges(whole):
            place = place_range(regions, address, length)
            memory.add(place, whole, offset, length)
            spans.append((offset, length, place))
        geometry = Geometry(tuple(regions))
        memory.pad(geometry.size)
        native = NativeRecorder(workspace)
        record_file(native.builder, whole, page_runs(spans))
        return Capture(
            source_format=self.name,
            source_version=str(VERSION),
            geometry=geometry,
            memory=memory,
            native=native.finish(BytesSource(b""), BytesSource(b"")),
            state=BytesSource(b""),
        )


FORMAT = Lime()


def check_header(data: bytes, offset: int) -> tuple[int, int]:
    """Start and end address of the range whose header is at ``offset`` of the file; ``data`` begins there."""
    if len(data) < HEADER.size:
        raise UnsupportedInputError(
            f"the file ends after {len(data)} of {HEADER.size} bytes", field="range header", offset=offset + len(data)
        )
    magic, version, start, end = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise UnsupportedInputError(f"{magic:#010x} is not {MAGIC:#010x}", field="magic", offset=offset)
    if version != VERSION:
        raise UnsupportedInputError(
            f"{version} is not {VERSION}, the only one understood", field="version", offset=offset + 4
        )
    if start >= MAX_ADDRESS:
        raise UnsupportedInputError(f"{start:#x} is beyond 52 address bits", field="start address", offset=offset + 8)
    if not start <= end < MAX_ADDRESS:
        reason = f"{end:#x} is before the start" if end < start else f"{end:#x} is beyond 52 address bits"
        raise UnsupportedInputError(reason, field="end address", offset=offset + 16)
    return start, end


def _ranges(whole: ByteSource) -> Iterator[tuple[int, int, int]]:
    """Address, offset in the file and bytes of each range."""
    at, count, last = 0, 0, -1
    while at < whole.size:
        start, end = check_header(bytes(whole.read_at(at, HEADER.size)), at)
        length = end - start + 1
        count += 1
        if start <= last:
            raise UnsupportedInputError(
                f"{start:#x} is not behind the range before, which ends at {last:#x}",
                field="start address",
                offset=at + 8,
            )
        if length > whole.size - at - HEADER.size:
            raise UnsupportedInputError(
                f"the range {start:#x} to {end:#x} has {length:,} bytes, the file has {whole.size - at - HEADER.size:,}"
                " more",
                field="end address",
                offset=at + 16,
            )
        if count > MAX_RANGES:
            raise UnsupportedInputError(f"more than {MAX_RANGES} ranges", field="range header", offset=at)
        last = end
        yield start, at + HEADER.size, length
        at += HEADER.size + length
