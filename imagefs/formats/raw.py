"""Flat guest memory without any structure: ``pmemsave``, a RAM file, the body of a core dump.

Nothing marks such a file, so it is never recognised, only told: ``--format raw``. What is no whole page at its end is
kept in the native file and padded with zeros in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.image.capture import ByteSource, BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, flat_geometry


@dataclass(frozen=True, slots=True)
class PaddedSource:
    """A source with zeros behind its end, up to ``size`` bytes."""

    source: ByteSource
    size: int

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        length = max(0, min(length, self.size - offset))
        data = self.source.read_at(offset, length)
        return data if len(data) == length else bytes(data) + bytes(length - len(data))

    def next_data(self, offset: int) -> int:
        at = self.source.next_data(offset)
        return self.size if at >= self.source.size else at


class Raw:
    """The format ``raw``."""

    name = "raw"

    def matches(self, source: Input) -> bool:
        return False

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a raw image is the memory already")
        if source.directory is not None:
            raise UsageError(f"{source.name} is a directory, not a raw image")
        memory: ByteSource = source.whole(workspace)
        size = memory.size
        if size == 0:
            raise UnsupportedInputError(f"{source.name} is empty", field="memory", offset=0)
        native = NativeRecorder(workspace)
        pages, rest = divmod(size, PAGE_SIZE)
        if pages:
            native.builder.pages(0, pages)
        if rest:
            native.builder.literal(memory.read_at(pages * PAGE_SIZE, rest))
            pages += 1
            memory = PaddedSource(memory, pages * PAGE_SIZE)
        return Capture(
            source_format=self.name,
            source_version="",
            geometry=flat_geometry(pages * PAGE_SIZE),
            memory=memory,
            native=native.finish(BytesSource(b""), BytesSource(b"")),
            state=BytesSource(b""),
        )


FORMAT = Raw()
