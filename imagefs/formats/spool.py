"""Where bytes of an image wait while it is being split: spools of our own, and files of others.

A *spool* is a sparse file without a name, so that it is gone whatever ends the process. What is in it are pages
of a guest, hence mode 0600.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagefs.errors import NoSpaceError, UnsupportedInputError, UsageError

IOV_MAX = 1024
"""Linux' limit on the pieces of one vectored write."""

_APPEND_BUFFER = 256 << 10
_ZEROS = bytes(1 << 20)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Buffer = bytes | bytearray | memoryview


def _open_unnamed(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    # Filesystems without O_TMPFILE (NFS, overlays of old kernels): a name for an instant. mkstemp makes it 0600.
    fd, name = tempfile.mkstemp(prefix=".imagefs-spool-", dir=directory)
    os.unlink(name)
    return fd


def _next_data(fd: int, offset: int, size: int) -> int:
    if offset >= size:
        return size
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno == errno.EINVAL:  # a filesystem that knows no holes
            return offset
        raise


def _next_hole(fd: int, offset: int, size: int) -> int:
    try:
        return min(os.lseek(fd, offset, os.SEEK_HOLE), size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO):  # no holes are known, or the file has shrunk: reading will tell
            return size
        raise


def _pread(fd: int, offset: int, length: int) -> bytes:
    """``length`` bytes, or as many as there are: one pread returns at most 2 GiB, and may return less."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    pieces = [data]
    got = len(data)
    while got < length:
        data = os.pread(fd, length - got, offset + got)
        if not data:
            break
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


class Spool:
    """A sparse unnamed file: a ByteSource that can be written to.

    ``size`` grows with what is written, or by :meth:`resize`; bytes never written read as zeros. All offsets and
    lengths in bytes. Writing raises NoSpaceError where the disk is full. Once all is written and flushed, several
    threads may read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._fd = _open_unnamed(directory)
        except OSError as error:
            raise self._failure(error) from error
        self._size = 0
        self._tail = bytearray()  # appended, not yet written

    def __repr__(self) -> str:
        return f"<Spool of {self.size} bytes in {self._directory}>"

    @property
    def size(self) -> int:
        return self._size + len(self._tail)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def path(self) -> str:
        """By which another program can open it, as long as it is open here."""
        self.flush()
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def resize(self, size: int) -> None:
        self.flush()
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._failure(error) from error
        self._size = size

    def write_at(self, offset: int, data: Buffer) -> None:
        self.write_all_at(offset, [data])

    def write_all_at(self, offset: int, pieces: Sequence[Buffer]) -> None:
        """The pieces one after another from ``offset`` on, in as few system calls as can be."""
        if self._tail:
            self.flush()
        for first in range(0, len(pieces), IOV_MAX):
            batch = pieces[first : first + IOV_MAX]
            length = sum(map(len, batch))
            try:
                written = os.pwritev(self._fd, batch, offset)
                if written < length:
                    self._write_rest(offset, batch, written)
            except OSError as error:
                raise self._failure(error) from error
            offset += length
        self._size = max(self._size, offset)

    def append(self, data: Buffer) -> None:
        """At the end. Small pieces are collected; whoever reads, in this thread, sees them."""
        self._tail += data
        if len(self._tail) >= _APPEND_BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write what :meth:`append` collected."""
        if self._tail:
            tail, self._tail = self._tail, bytearray()
            self.write_all_at(self._size, [tail])

    def punch(self, offset: int, length: int) -> None:
        """Make a range zeros. What is a hole already stays one; what is not is overwritten."""
        self.flush()
        stop = min(offset + length, self._size)
        at = _next_data(self._fd, offset, stop)
        while at < stop:
            piece = min(stop - at, len(_ZEROS))
            self.write_at(at, memoryview(_ZEROS)[:piece])
            at = _next_data(self._fd, at + piece, stop)

    def read_at(self, offset: int, length: int) -> bytes:
        self.flush()
        return _pread(self._fd, offset, length)

    def next_data(self, offset: int) -> int:
        self.flush()
        return _next_data(self._fd, offset, self._size)

    def _write_rest(self, offset: int, pieces: Sequence[Buffer], written: int) -> None:
        """A write came back short, as it does just before the disk is full: go on to learn the reason."""
        rest = memoryview(b"".join(pieces))[written:]
        offset += written
        while rest:
            count = os.pwrite(self._fd, rest, offset)
            rest = rest[count:]
            offset += count

    def _failure(self, error: OSError) -> Exception:
        if error.errno in _NO_SPACE:
            return NoSpaceError(f"{self._directory}: no space left for a temporary copy of the guest's pages")
        return UsageError(f"{self._directory}: cannot keep temporary files here: {error.strerror}")


class FileSource:
    """A regular file of someone else's as a ByteSource, which must not change while it is read.

    Takes the descriptor over. Raises UnsupportedInputError, naming the file, as soon as its size or time of last
    change is another than when it was opened.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        status = os.fstat(fd)
        self._size = status.st_size
        self._seen = (status.st_size, status.st_mtime_ns)

    def __repr__(self) -> str:
        return f"<FileSource {self._name} of {self._size} bytes>"

    @classmethod
    def open(cls, path: Path) -> FileSource:
        """Raises UsageError where ``path`` is no readable regular file."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        source = cls(fd, str(path))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            source.close()
            raise UsageError(f"{path}: not a regular file")
        return source

    @property
    def size(self) -> int:
        return self._size

    @property
    def name(self) -> str:
        return self._name

    @property
    def path(self) -> str:
        """By which another program can open it, as long as it is open here."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_at(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self._size - offset))
        data = _pread(self._fd, offset, length)
        self._check(offset, len(data) == length)
        return data

    def scatter_at(self, offset: int, pieces: Sequence[bytearray | memoryview]) -> None:
        """Fill the pieces, one after another, with what is at ``offset``: all of it must be there."""
        for first in range(0, len(pieces), IOV_MAX):
            batch = pieces[first : first + IOV_MAX]
            length = sum(map(len, batch))
            # A regular file gives less than was asked for at its end only.
            self._check(offset, os.preadv(self._fd, batch, offset) == length)
            offset += length

    def next_data(self, offset: int) -> int:
        return _next_data(self._fd, offset, self._size)

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Start and end of everything in the file that is no hole, in order; all of it where holes are not known."""
        at = self.next_data(0)
        while at < self._size:
            end = _next_hole(self._fd, at, self._size)
            yield at, end
            at = self.next_data(end)

    def has_holes(self) -> bool:
        return next(self.data_extents(), None) != (0, self._size)

    def _check(self, offset: int, complete: bool) -> None:
        status = os.fstat(self._fd)
        if not complete or (status.st_size, status.st_mtime_ns) != self._seen:
            raise UnsupportedInputError(
                f"{self._name} changed while it was being read; stop whoever writes to it", offset=offset
            )
