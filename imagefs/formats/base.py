"""What a format is, and what it works with: its input, and a workspace for what it must keep."""

from __future__ import annotations

import io
import os
import select
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self, TypeVar, cast

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.spool import FileSource, Spool
from imagefs.image.capture import ByteSource, Capture
from imagefs.image.native import ENTRY_SIZE, PAGES, Entry, NativeTemplate, TemplateBuilder

HEAD_SIZE = 64 << 10
"""Bytes from which a format must be recognised."""

_BUFFER_SIZE = 4 << 20
_PIECE_SIZE = 64 << 10
_ZERO_PIECE = bytes(_PIECE_SIZE)
_RENUMBERED = 4096
"""Entries of a template in memory at a time."""


class Closable(Protocol):
    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=Closable)


class Workspace:
    """Owns every spool and file that a capture reads from; closes them all when it is left."""

    def __init__(self, spool_dir: Path) -> None:
        self._spool_dir = spool_dir
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def spool(self) -> Spool:
        spool = Spool(self._spool_dir)
        self._stack.callback(spool.close)
        return spool

    def file(self, path: Path) -> FileSource:
        source = FileSource.open(path)
        self._stack.callback(source.close)
        return source

    def adopt(self, source: Owned) -> Owned:
        self._stack.callback(source.close)
        return source


class Input:
    """The file that is split, read once from its start to its end; ``head`` is what it begins with.

    The caller keeps ownership of a stream; a path is opened and closed here. What is split may also be a
    ``directory``: then there is nothing to read here, and ``head`` is empty.
    """

    def __init__(
        self, stream: BinaryIO, name: str, regular: bool, directory: Path | None = None, path: Path | None = None
    ) -> None:
        self.name = name
        self.directory = directory
        self.path = path
        """As the caller gave it; None for a stream."""
        self.regular = regular
        """Whether it is a regular file at its offset zero, so that it need not be spooled."""
        self._snapshot: str | None = None
        self._stream = cast(io.RawIOBase, stream)  # typing's BinaryIO knows no readinto
        self._given = 0
        head = bytearray(HEAD_SIZE)
        got = 0
        while got < HEAD_SIZE and (count := self._read(memoryview(head)[got:])):
            got += count
        self.head = bytes(head[:got])

    @classmethod
    def of_path(cls, path: Path, stack: ExitStack) -> Input:
        """Raises UsageError where the file or directory cannot be opened."""
        try:
            is_directory = path.is_dir()
            if is_directory:
                os.scandir(path).close()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        if is_directory:
            return cls(io.BytesIO(), str(path), regular=False, directory=path, path=path)
        try:
            stream = stack.enter_context(io.FileIO(path))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        return cls(cast(BinaryIO, stream), str(path), regular, path=path)

    def with_snapshot(self, name: str | None) -> None:
        """``name`` was said by ``--snapshot``; :attr:`snapshot` is to be asked for it."""
        self._snapshot = name

    @property
    def snapshot(self) -> str | None:
        """Which of several snapshots in the input is wanted, where that was said."""
        name, self._snapshot = self._snapshot, None
        return name

    @property
    def unasked_snapshot(self) -> str | None:
        """What was said and no format has asked for."""
        return self._snapshot

    @property
    def size(self) -> int | None:
        """Bytes in all, where that is known beforehand."""
        return os.fstat(self._stream.fileno()).st_size if self.regular else None

    def read_into(self, buffer: memoryview) -> int:
        """Fills the beginning of ``buffer``; the number of bytes, 0 at the end of the input."""
        if self._given < len(self.head):
            count = min(len(buffer), len(self.head) - self._given)
            buffer[:count] = self.head[self._given : self._given + count]
            self._given += count
            return count
        return self._read(buffer)

    def as_file(self) -> FileSource:
        """The regular file behind this input, under a descriptor of its own."""
        return FileSource(os.dup(self._stream.fileno()), self.name)

    def whole(self, workspace: Workspace) -> FileSource | Spool:
        """All of the input, to be read at any offset: the regular file itself, or a spool of what came."""
        if self.regular:
            return workspace.adopt(self.as_file())
        spool = workspace.spool()
        buffer = memoryview(bytearray(_BUFFER_SIZE))
        size = 0
        while got := self.read_into(buffer):
            for at in range(0, got, _PIECE_SIZE):
                piece = bytes(buffer[at : min(at + _PIECE_SIZE, got)])
                if piece != _ZERO_PIECE[: len(piece)]:  # where it is zeros, the spool gets a hole
                    spool.write_at(size + at, piece)
            size += got
        spool.resize(size)
        return spool

    def _read(self, buffer: memoryview) -> int:
        try:
            while (count := self._stream.readinto(buffer)) is None:
                select.select([self._stream], [], [])  # someone made the pipe non-blocking
        except OSError as error:
            raise UnsupportedInputError(f"{self.name} cannot be read: {error.strerror}") from error
        return count


class Format(Protocol):
    """One kind of memory image of another program. Each module of a format has one such object, ``FORMAT``."""

    name: str
    """As ``--format`` takes it."""

    def matches(self, source: Input) -> bool:
        """Whether the input is of this format, by its ``head`` of at most HEAD_SIZE bytes, its name or, for a
        directory, by what is in it. At most one format may say so."""

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        """Consume the input in one pass, with bounded memory. ``memory_files`` are what ``--memory`` named, in order:
        files with the memory that belong to the input.

        Raises UnsupportedInputError with field and offset for what is truncated, damaged or not understood, and
        UsageError for ``memory_files`` where none, or not so many, are wanted.
        """


class NativeRecorder:
    """A TemplateBuilder whose entries and literals go to spools."""

    def __init__(self, workspace: Workspace) -> None:
        self._entries = workspace.spool()
        self._literals = workspace.spool()
        self.builder = TemplateBuilder(self._entries.append, self._literals.append)

    def finish(
        self,
        exceptions: ByteSource,
        superseded: ByteSource,
        page_of: Callable[[int], int | None] | None = None,
    ) -> NativeTemplate:
        """``page_of`` turns what the builder was given as page numbers into those of ``memory``, for formats that
        learn too late where memory's pages are; what was consecutive must stay so."""
        self.builder.finish()
        self._entries.flush()
        self._literals.flush()
        if page_of is not None:
            self._renumber(page_of)
        return NativeTemplate(self.builder.size, self._entries, self._literals, exceptions, superseded)

    def _renumber(self, page_of: Callable[[int], int | None]) -> None:
        for at in range(0, self._entries.size, _RENUMBERED * ENTRY_SIZE):
            data = self._entries.read_at(at, _RENUMBERED * ENTRY_SIZE)
            entries = []
            for offset in range(0, len(data), ENTRY_SIZE):
                entry = Entry.unpack(data, offset)
                if entry.kind == PAGES:
                    page = page_of(entry.page)
                    assert page is not None
                    entry = replace(entry, page=page)
                entries.append(entry.pack())
            self._entries.write_at(at, b"".join(entries))
