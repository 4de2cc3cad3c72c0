"""Images that are several files: what a directory holds, and the native stream that the files make."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import NativeRecorder, Workspace
from imagefs.formats.pieces import PageRun, record_file
from imagefs.formats.spool import FileSource
from imagefs.image.capture import ByteSource, BytesSource
from imagefs.image.native import NativeTemplate
from imagefs.image.native_files import NativeFile, is_file_name

MAX_FILES = 10_000
_LARGEST_READ = 64 << 20


class SeveralFiles:
    """Makes the native stream of several files, in the order in which they are added."""

    def __init__(self, workspace: Workspace) -> None:
        self._native = NativeRecorder(workspace)
        self._files: list[NativeFile] = []

    def add(self, path: str, source: ByteSource, runs: Iterable[PageRun] = ()) -> None:
        """A file at ``path`` below ``native/``; ``runs`` are its pages that are in memory."""
        record_file(self._native.builder, source, runs)
        self._files.append(NativeFile(path, source.size))

    def finish(self) -> tuple[NativeTemplate, tuple[NativeFile, ...]]:
        return self._native.finish(BytesSource(b""), BytesSource(b"")), tuple(self._files)


def regular_files(directory: Path, without: str = "") -> list[Path]:
    """All files below a directory but for its entry ``without``, sorted by their paths, which are relative to it.

    UsageError for what cannot be kept: symbolic links and what is no regular file. Links are not followed, because
    whoever made the directory, and not who splits it, would choose what is read then.
    """
    found: list[Path] = []
    for path, entry in _walk(directory, Path(), without):
        if entry.is_symlink():
            raise UsageError(
                f"{directory / path} is a symbolic link: put what it leads to in its place (cp -rL makes such a copy)"
            )
        if not entry.is_file(follow_symlinks=False):
            raise UsageError(f"{directory / path} is no regular file")
        found.append(path)
        if len(found) > MAX_FILES:
            raise UsageError(f"{directory} has more than {MAX_FILES:,} files")
    return sorted(found)


def _walk(directory: Path, below: Path, without: str = "") -> Iterator[tuple[Path, os.DirEntry[str]]]:
    try:
        with os.scandir(directory / below) as entries:
            for entry in entries:
                path = below / entry.name
                if entry.name == without:
                    continue
                if not is_file_name(entry.name):
                    raise UsageError(f"{os.fsencode(directory / path)!r}: the name is not UTF-8")
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(directory, path)
                else:
                    yield path, entry
    except OSError as error:
        raise UsageError(f"{directory / below}: {error.strerror}") from error


def open_file(workspace: Workspace, path: Path) -> FileSource:
    """A file of a directory, not through a link. UsageError where it cannot be opened."""
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is a symbolic link")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return workspace.file(path)


def read_file(source: ByteSource, name: str, limit: int = _LARGEST_READ) -> bytes:
    """All of a small file."""
    if source.size > limit:
        raise UnsupportedInputError(f"{source.size:,} bytes, over {limit:,}", field=name, offset=limit)
    return bytes(source.read_at(0, source.size))


def head_of(path: Path, size: int) -> bytes:
    """What a regular file begins with, for recognition; empty where it is none or cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, size, 0) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def file_names(paths: Sequence[Path]) -> list[str]:
    """A name below ``native/`` for each: its own, behind its number where two are alike."""
    names = [path.name for path in paths]
    for path, name in zip(paths, names, strict=True):
        if not is_file_name(name):
            raise UsageError(f"{path}: the name is not UTF-8")
    return names if len(set(names)) == len(names) else [f"{number}-{name}" for number, name in enumerate(names)]
