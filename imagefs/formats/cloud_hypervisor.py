"""A Cloud Hypervisor snapshot: the directory that ``ch-remote snapshot file://DIRECTORY`` fills.

| file            | contents                                                                                     |
|-----------------|----------------------------------------------------------------------------------------------|
| `config.json`   | the VM's configuration                                                                       |
| `state.json`    | the state of all components, a tree; see below                                               |
| `memory-ranges` | the guest's RAM: the ranges that `state.json` lists, end to end, without anything between them |

Sources: Cloud Hypervisor's ``docs/snapshot_restore.md``, ``vm-migration/src/lib.rs`` (Snapshot, SnapshotData),
``vm-migration/src/protocol.rs`` (MemoryRange) and ``vmm/src/memory_manager.rs`` (MemoryManagerSnapshotData). A node of
`state.json` is ``{"snapshots": {id: node, …}, "snapshot_data": …}``; below the root's ``snapshots`` the node
``memory-manager`` has the ranges in its ``snapshot_data``:

| versions  | `snapshot_data`                                                 | in it                            |
|-----------|-----------------------------------------------------------------|----------------------------------|
| v39 on    | ``{"state": "…"}``                                              | JSON, as a string                |
| v29 – v38 | ``[2, 0, …]``                                                   | bytes, little-endian, as numbers |
| – v28     | ``{"memory-manager-section": {"id": …, "snapshot": [2, 0, …]}}`` | the same                         |

The JSON has ``"memory_ranges": {"data": [{"gpa": guest-physical address, "length": bytes}, …]}``. The bytes begin
with the number of ranges and, for each, address and length, all u64 (as the crate ``versionize`` writes them; v20 is
the oldest that was looked at). Memory that is in a
file of its own (shared with a backing file) is not in the list, and not in the snapshot. ``native/`` of a mount is
the directory again, for ``--restore source_url=file://MOUNT/native``.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.directory import SeveralFiles, open_file, read_file, regular_files
from imagefs.formats.pieces import PageRun
from imagefs.image.capture import BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region

CONFIG, STATE, MEMORY = "config.json", "state.json", "memory-ranges"
MAX_STATE = 16 << 20
"""Bytes of each JSON file; a snapshot's state has some hundred kilobytes."""
MAX_RANGES = 4096
MAX_ADDRESS = 1 << 52
_MANAGER = "memory-manager"
_RANGE = struct.Struct("<QQ")


class CloudHypervisor:
    """The format ``cloud-hypervisor``."""

    name = "cloud-hypervisor"

    def matches(self, source: Input) -> bool:
        directory = source.directory
        return directory is not None and all(os.path.isfile(directory / name) for name in (CONFIG, STATE, MEMORY))

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: the memory is in the snapshot's file {MEMORY}")
        if source.directory is None:
            raise UsageError(f"{source.name}: a Cloud Hypervisor snapshot is a directory")
        paths = regular_files(source.directory)
        for name in (CONFIG, STATE, MEMORY):
            if Path(name) not in paths:
                raise UnsupportedInputError(f"{source.name} has no such file", field=name, offset=0)
        files = {path: open_file(workspace, source.directory / path) for path in paths}
        config = read_file(files[Path(CONFIG)], CONFIG, MAX_STATE)
        _json(config, CONFIG)
        state = read_file(files[Path(STATE)], STATE, MAX_STATE)
        memory = files[Path(MEMORY)]
        geometry = _read_state(state)
        if geometry.size != memory.size:
            raise UnsupportedInputError(
                f"it has {memory.size:,} bytes, the ranges in {STATE} have {geometry.size:,}",
                field=MEMORY,
                offset=min(memory.size, geometry.size),
            )
        several = SeveralFiles(workspace)
        for path, file in files.items():
            pages = [PageRun(0, 0, geometry.pages)] if path == Path(MEMORY) else []
            several.add(str(path), file, pages)
        native, native_files = several.finish()
        return Capture(
            source_format=self.name,
            source_version="",
            geometry=geometry,
            memory=memory,
            native=native,
            native_files=native_files,
            state=BytesSource(state),
            config={CONFIG: config},
            restore={"vmm": "cloud-hypervisor"},
        )


FORMAT = CloudHypervisor()


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise UnsupportedInputError(f"no JSON: {error.msg}", field=name, offset=error.pos) from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedInputError("no JSON that can be read", field=name, offset=0) from error


def _read_state(state: bytes) -> Geometry:
    try:
        return _geometry(_memory_ranges(_json(state, STATE)))
    except UnsupportedInputError as error:
        if error.offset is not None:
            raise
        # JSON has no offsets once it is read; this is where the part begins that is wrong.
        at = max(state.find(_MANAGER.encode()), 0)
        raise UnsupportedInputError(error.reason, field=error.field, offset=at) from error


def _memory_ranges(root: Any) -> Any:
    """What the memory manager says of its ranges: a list of ``{"gpa": …, "length": …}`` if all is well."""
    where = STATE
    node = root
    for name in ("snapshots", _MANAGER, "snapshot_data"):
        where = f"{where}: {name}"
        if not isinstance(node, dict) or name not in node:
            raise _error("there is none", where)
        node = node[name]
    if isinstance(node, dict) and f"{_MANAGER}-section" in node:
        node = node[f"{_MANAGER}-section"]
        node = node.get("snapshot") if isinstance(node, dict) else None
    if isinstance(node, list):
        return _unpacked(node, where)
    text = node.get("state") if isinstance(node, dict) else None
    if not isinstance(text, str):
        raise _error("neither text nor a list of bytes", where)
    try:
        node = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error("no JSON in it", where) from error
    for name in ("memory_ranges", "data"):
        where = f"{where}: {name}"
        if not isinstance(node, dict) or name not in node:
            raise _error("there is none", where)
        node = node[name]
    return node


def _unpacked(numbers: list[Any], where: str) -> list[dict[str, int]]:
    """Out of bytes; what follows the ranges is left alone."""
    try:
        data = bytes(numbers)
    except (TypeError, ValueError) as error:
        raise _error("not a list of bytes", where) from error
    count = int.from_bytes(data[:8], "little")
    if len(data) < 8 or count > (len(data) - 8) // _RANGE.size:
        raise _error(f"{count} ranges in {len(data)} bytes", where)
    return [dict(zip(("gpa", "length"), pair, strict=True)) for pair in _RANGE.iter_unpack(data[8 : 8 + 16 * count])]


def _geometry(ranges: Any) -> Geometry:
    where = f"{STATE}: memory_ranges"
    if not isinstance(ranges, list) or not ranges:
        raise _error("no ranges: the memory is in a file of its own, not in the snapshot", where)
    if len(ranges) > MAX_RANGES:
        raise _error(f"{len(ranges):,} are too many", where)
    regions, offset = [], 0
    for number, each in enumerate(ranges):
        address, length = (each.get("gpa"), each.get("length")) if isinstance(each, dict) else (None, None)
        for name, value in (("gpa", address), ("length", length)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ADDRESS:
                raise _error("no number of up to 52 bits", f"{where}: {number}: {name}")
            if value % PAGE_SIZE:
                raise _error(f"{value:#x} is not made of whole pages", f"{where}: {number}: {name}")
        assert isinstance(address, int)
        assert isinstance(length, int)
        if not length or address + length > MAX_ADDRESS:
            raise _error(f"{length:#x} bytes from {address:#x} on", f"{where}: {number}: length")
        regions.append(Region(f"ram-{number}", address, length, offset))
        offset += length
    try:
        return Geometry(tuple(regions))
    except ValueError as error:
        raise _error(str(error), where) from error


def _error(reason: str, field: str) -> UnsupportedInputError:
    return UnsupportedInputError(reason, field=field)
