"""QEMU migration streams: what ``migrate exec:`` and ``migrate file:`` write, of stopped and of live guests.

The file is the stream (qemu_sections.py), from its first byte to its last:

| bytes | field    | meaning                                                                       |
|------:|----------|-------------------------------------------------------------------------------|
|     4 | magic    | ``QEVM``                                                                      |
|     4 | version  | 3, big-endian                                                                 |
|     … | sections | configuration, RAM, devices, description                                      |

Pages that the stream has as they are, plain and mapped-ram, are pages of the native file; deflated pages and XBZRLE
deltas are literals of it. What multifd sends (zstd pages, too) goes through channels of its own and is not in the file,
but for mapped-ram, which QEMU does not compress.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.qemu_sections import MAGIC, VERSION, StreamReader
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.formats.stream_pages import keeper
from imagefs.image.capture import Capture


class QemuMigration:
    """The format ``qemu-migration``."""

    name = "qemu-migration"

    def matches(self, source: Input) -> bool:
        return source.head.startswith(MAGIC)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        native = NativeRecorder(workspace)
        cursor = StreamCursor(source.read_into, native.builder.literal)
        guest = StreamReader(cursor, native.builder, workspace, keeper(source, workspace), memory_files).read()
        return guest.capture(self.name, str(VERSION), native.finish(guest.exceptions, guest.superseded))


FORMAT = QemuMigration()
