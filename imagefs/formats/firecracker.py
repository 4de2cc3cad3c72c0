"""A Firecracker snapshot: the state file and the memory file of ``PUT /snapshot/create``, and diffs laid over a base.

The **state file** (`snapshot_path`; Firecracker's ``docs/snapshotting/versioning.md``, ``src/vmm/src/snapshot/mod.rs``
and ``crc.rs``), little-endian:

| bytes | field   | meaning                                                                                       |
|------:|---------|-----------------------------------------------------------------------------------------------|
|     8 | magic   | 0x0710198486640000 on x86-64, 0x07101984AAAA0000 on aarch64; the low 16 bits: 1 up to v1.6 |
|     … | version | of the data: length u64 and ``MAJOR.MINOR.PATCH`` as text; u16 up to v1.6                  |
|     … | state   | opaque                                                                                        |
|     8 | crc     | CRC-64 (Jones' polynomial, as in Redis) of everything before                                  |

Since v1.15 Firecracker packs magic, version and state with bitcode, whose form is its own affair: the magic is
looked for in the first 16 bytes, and the version is not known then. The CRC holds for all of them.

The **memory file** (`mem_file_path`) is guest memory, region after region; it may have holes. The regions are not
written anywhere but in the opaque state. On x86-64 memory has holes: from 3 to 4 GiB and from 256 to 512 GiB
since v1.13, from 3.25 to 4 GiB before; on aarch64 it begins at 2 GiB
(``src/vmm/src/arch/*/layout.rs``). Which one holds is told by the list of regions as bincode writes it: count,
address and size of the first one, each u64. Where it is not found, a note says so.

A **diff** (``"snapshot_type": "Diff"``) has as many bytes, and data only where pages were written since the snapshot
before; the rest are holes. Base and diffs are given in the order in which they were made (``--memory BASE --memory
DIFF…``) with the state file of the last one, and ``memory`` is what Firecracker's ``snapshot-editor edit-memory
rebase`` makes of them. ``native/`` has all files; their holes read as zeros.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from anycrc import CRC

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.directory import SeveralFiles, file_names, head_of, open_file, read_file
from imagefs.formats.firecracker_layers import LayeredMemory
from imagefs.formats.spool import FileSource
from imagefs.image.capture import BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region

X86_64, AARCH64 = 0x0710_1984_8664, 0x0710_1984_AAAA
_ARCHITECTURES = {X86_64: "x86_64", AARCH64: "aarch64"}
_MAGICS = {magic.to_bytes(6, "little"): magic for magic in _ARCHITECTURES}
_MAGIC_WITHIN = 16
MAX_STATE = 10 << 20
"""Bytes; Firecracker itself loads no more than 10 MB."""
_CRC_SIZE = 8
_VERSION = re.compile(rb"\d{1,5}\.\d{1,5}\.\d{1,5}")
_FILES_LOOKED_AT = 64

GIB = 1 << 30
_ABOVE_4G = 4 * GIB
_LOW = (3 * GIB, 13 * GIB // 4)
"""Where the hole below 4 GiB begins: today, and before v1.13."""
_SECOND_HOLE = (256 * GIB, 512 * GIB)
_ARM_START = 2 * GIB


def crc64(data: bytes) -> int:
    """As in the crate ``crc64`` that Firecracker uses."""
    return int(CRC(width=64, poly=0xAD93D23594C935A9, init=0, refin=True, refout=True, xorout=0).calc(data))


@dataclass(frozen=True, slots=True)
class VmState:
    """What can be told of a state file."""

    architecture: str
    version: str
    """Of the data: ``MAJOR.MINOR.PATCH``, or a number; empty where it is not known."""
    bincode: bool
    """Whether its fields can be looked for."""
    data: bytes


class Firecracker:
    """The format ``firecracker``."""

    name = "firecracker"

    def matches(self, source: Input) -> bool:
        if source.directory is not None:
            return len(_state_files(source.directory)) == 1
        return _magic(source.head) is not None

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if source.directory is None:
            state_path = source.path or Path("vmstate")
            data = _read_all(source, workspace)
            paths = list(memory_files)
            if not paths:
                raise UsageError(
                    f"{source.name} is the state only; say where the memory is: --memory FILE, and --memory DIFF for"
                    " each diff snapshot laid over it, in their order"
                )
            sources = [workspace.file(path) for path in paths]
        else:
            state_path = _only_state(source.directory)
            data = read_file(open_file(workspace, state_path), "state file", MAX_STATE)
            paths = list(memory_files) or [_only_memory(source.directory, state_path)]
            sources = [workspace.file(path) if memory_files else open_file(workspace, path) for path in paths]
        state = read_state(data)
        memory = _memory(paths, sources, workspace)
        geometry, notes = _geometry(state, memory.size)
        several = SeveralFiles(workspace)
        names = file_names([state_path, *paths])
        several.add(names[0], BytesSource(data))
        for number, name in enumerate(names[1:]):
            several.add(name, sources[number], memory.runs(number))
        native, files = several.finish()
        return Capture(
            source_format=self.name,
            source_version=state.version,
            geometry=geometry,
            memory=memory,
            native=native,
            native_files=files,
            state=BytesSource(data),
            restore={
                "vmm": "firecracker",
                "architecture": state.architecture,
                "ram_bytes": memory.size,
                **({"notes": notes} if notes else {}),
            },
        )


FORMAT = Firecracker()


def read_state(data: bytes) -> VmState:
    """Check magic, version and CRC. UnsupportedInputError with field and offset."""
    found = _magic(data)
    if found is None:
        raise UnsupportedInputError(
            f"{data[:8].hex()} is none of Firecracker's", field="magic of the state file", offset=0
        )
    at, magic = found
    if len(data) < at + 8 + _CRC_SIZE:
        raise UnsupportedInputError("the state file ends here", field="crc of the state file", offset=len(data))
    stored = int.from_bytes(data[-_CRC_SIZE:], "little")
    computed = crc64(data[:-_CRC_SIZE])
    if stored != computed:
        raise UnsupportedInputError(
            f"{stored:#018x} is not that of the {len(data) - _CRC_SIZE:,} bytes before, {computed:#018x}:"
            " the state file is damaged or cut",
            field="crc of the state file",
            offset=len(data) - _CRC_SIZE,
        )
    version = _version(data) if at == 0 else None
    return VmState(_ARCHITECTURES[magic], version or "", at == 0, data)


def _magic(data: bytes) -> tuple[int, int] | None:
    """Where the magic is, and its upper 48 bits."""
    for at in range(_MAGIC_WITHIN - 8 + 1):
        magic = _MAGICS.get(data[at + 2 : at + 8])
        if magic is not None and data[at : at + 2] in (b"\0\0", b"\1\0"):
            return at, magic
    return None


def _version(data: bytes) -> str:
    if data[:2] == b"\1\0":
        return str(int.from_bytes(data[8:10], "little"))
    length = int.from_bytes(data[8:16], "little")
    text = data[16 : 16 + min(length, 32)]
    if length > len(data) - 16 - _CRC_SIZE or not _VERSION.fullmatch(text):
        raise UnsupportedInputError(
            f"{length} bytes, which are no MAJOR.MINOR.PATCH", field="version of the state file", offset=8
        )
    return text.decode("ascii")


def _read_all(source: Input, workspace: Workspace) -> bytes:
    if _magic(source.head) is None:
        read_state(source.head)
    return read_file(source.whole(workspace), "state file", MAX_STATE)


def _state_files(directory: Path) -> list[Path]:
    with os.scandir(directory) as entries:
        looked_at = [Path(entry.path) for entry in islice(entries, _FILES_LOOKED_AT)]
    return sorted(path for path in looked_at if _magic(head_of(path, _MAGIC_WITHIN)) is not None)


def _only_state(directory: Path) -> Path:
    found = _state_files(directory)
    if len(found) != 1:
        what = " and ".join(path.name for path in found) or "none of its files"
        raise UnsupportedInputError(
            f"{directory}: {what} may be the state file; give it and its memory: imagefs split STATE --memory FILE",
            field="magic of the state file",
            offset=0,
        )
    return found[0]


def _only_memory(directory: Path, state: Path) -> Path:
    with os.scandir(directory) as entries:
        others = [Path(entry.path) for entry in islice(entries, 3) if entry.name != state.name]
    if len(others) != 1:
        raise UsageError(
            f"{directory} has {'several files' if others else 'no file'} beside the state {state.name}; say which is"
            " the memory: --memory FILE"
        )
    return others[0]


def _memory(paths: Sequence[Path], sources: Sequence[FileSource], workspace: Workspace) -> LayeredMemory:
    size = sources[0].size
    if not size or size % PAGE_SIZE:
        raise UnsupportedInputError(
            f"{paths[0]} has {size:,} bytes, which are not whole pages", field="size of the memory file", offset=size
        )
    for path, source in zip(paths[1:], sources[1:], strict=True):
        if source.size != size:
            raise UnsupportedInputError(
                f"{path} has {source.size:,} bytes, the memory below it {size:,}",
                field="size of the diff",
                offset=min(size, source.size),
            )
        if not source.has_holes():
            raise UsageError(
                f"{path} has no holes, so nothing of {paths[0]} would be left: a diff snapshot must be copied with its"
                " holes (cp --sparse=always, rsync -S, tar -S); a full one is given alone"
            )
    return LayeredMemory(sources, workspace)


def _geometry(state: VmState, size: int) -> tuple[Geometry, list[str]]:
    if state.architecture == "aarch64":
        return _lay([(_ARM_START, size)]), []
    if size <= min(_LOW):
        return _lay([(0, size)]), []
    told = [low for low in _LOW if _list_of(_with_holes(low, size)) in state.data] if state.bincode else [_LOW[0]]
    notes = []
    if not state.bincode:
        notes.append("the state does not say where the memory is: taken for x86-64 as of Firecracker 1.15")
    if len(told) != 1:
        return _lay([(0, size)]), ["where the memory is in the guest is not known: addresses count from zero"]
    return _lay(_with_holes(told[0], size)), notes


def _list_of(regions: Sequence[tuple[int, int]]) -> bytes:
    """What the state's list of regions begins with; how the following ones go on depends on the version."""
    return struct.pack("<QQQ", len(regions), *regions[0])


def _with_holes(low: int, size: int) -> list[tuple[int, int]]:
    """Address and bytes of each region."""
    holes = [(low, _ABOVE_4G), *([_SECOND_HOLE] if low == _LOW[0] else [])]
    spans, at = [], 0
    for start, end in holes:
        spans.append((at, min(size, start - at)))
        size -= spans[-1][1]
        at = end
    return [span for span in [*spans, (at, size)] if span[1]]


def _lay(spans: Sequence[tuple[int, int]]) -> Geometry:
    regions, offset = [], 0
    for number, (address, size) in enumerate(spans):
        regions.append(Region(f"ram-{number}", address, size, offset))
        offset += size
    return Geometry(tuple(regions))
