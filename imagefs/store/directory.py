"""A store in a directory of the local machine (or of a network filesystem).

Each object is a file at its key. A put writes a file of its own under ``.tmp/``, syncs it, renames it over the
key and syncs the directory: an object is there whole or not at all, also after SIGKILL or a power cut.

The writer holds a lock (flock) on its temporary file. What a crashed run left under ``.tmp/`` is nobody's, so it
can be locked: the first put of each opened store removes it. Keys never begin with a dot, so nothing under
``.tmp/`` is ever an object.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path

from imagefs.errors import (
    AccessDeniedError,
    ImagefsError,
    MissingObjectError,
    NoSpaceError,
    UnavailableError,
    UsageError,
)
from imagefs.store.base import DEFAULT_LIMIT, check_extent, check_key, check_span

PIECE = 256 << 10
"""Bytes of a piece of a stream."""
_TEMPORARY = ".tmp"
_NO_OBJECT = "no such object"
_RENAME_ATTEMPTS = 100
"""A concurrent delete may take the directory away between making it and renaming into it."""


class DirectoryStore:
    """A :class:`~imagefs.store.base.Store` whose objects are files below ``root``.

    Memory images are secrets. A root that does not exist is created (``create=True``) with mode 0700 and holds
    files of mode 0600. A root that exists says by its own permissions who may read: what its group or others may
    read of it, they may read of everything that is put into it (0755 gives files of 0644, 0750 of 0640), whatever
    the umask is. That is how a web server under its own user gets access: ``install -d -m 750 -g www-data STORE``.
    """

    def __init__(self, root: str | Path, create: bool = False) -> None:
        # Absolute: a daemon changes its working directory.
        self._root = Path(root).absolute()
        try:
            if create and not self._root.exists():
                self._root.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    self._root.mkdir(mode=0o700)
            mode = self._root.stat().st_mode
        except FileNotFoundError:
            raise UsageError(f"{root}: no such directory; a store is a directory that holds images") from None
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{root}: not a directory; a store is a directory that holds images") from None
        except OSError as error:
            raise _classified(error, key=".", origin=self.origin) from error
        if not stat.S_ISDIR(mode):
            raise UsageError(f"{root}: not a directory; a store is a directory that holds images")
        shared_read = mode & 0o044
        self._file_mode = 0o600 | shared_read
        # Who may read a directory's entries may also pass through it.
        self._directory_mode = 0o700 | shared_read | shared_read >> 2
        self._sweep_lock = threading.Lock()
        self._swept = False

    def __repr__(self) -> str:
        return f"DirectoryStore({str(self._root)!r})"

    @property
    def origin(self) -> str:
        return str(self._root)

    @property
    def root(self) -> Path:
        return self._root

    def get(self, key: str, start: int = 0, length: int | None = None, limit: int = DEFAULT_LIMIT) -> bytes:
        check_span(start, length)
        path = self._path(key)
        if length == 0:
            return b""
        with self._opened(path, key) as (fd, size):
            count = check_extent(key, self.origin, size, start, length, limit)
            data = _pread_all(fd, count, start)
        if len(data) != count:
            # Someone truncated the file after fstat; say what is true now.
            check_extent(key, self.origin, start + len(data), start, count, limit)
        return data

    def stream(self, key: str, start: int = 0, limit: int = DEFAULT_LIMIT) -> Iterator[bytes]:
        check_span(start, None)
        with self._opened(self._path(key), key) as (fd, size):
            end = start + check_extent(key, self.origin, size, start, None, limit)
            while start < end:
                piece = os.pread(fd, min(PIECE, end - start), start)
                if not piece:
                    check_extent(key, self.origin, start, start, end - start, limit)
                yield piece
                start += len(piece)

    def size(self, key: str) -> int:
        try:
            status = os.stat(self._path(key))
        except OSError as error:
            raise self._failure(error, key) from error
        if not stat.S_ISREG(status.st_mode):
            raise MissingObjectError(_NO_OBJECT, key=key, origin=self.origin)
        return status.st_size

    def has(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingObjectError:
            return False
        return True

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        path = self._path(key)
        try:
            self._remove_leftovers_once()
            fd, temporary = self._open_temporary()
            try:
                _write_all(fd, data)
                os.fchmod(fd, self._file_mode)
                os.fsync(fd)
                self._rename(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            finally:
                os.close(fd)
            _sync_directory(path.parent)
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = "the object's directory vanished, or is no directory"
            raise UnavailableError(reason, key=key, origin=self.origin) from error
        except OSError as error:
            raise self._failure(error, key) from error

    def delete(self, key: str) -> None:
        """Also removes the directories that became empty, so that a failed split leaves nothing behind."""
        path = self._path(key)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        except OSError as error:
            raise self._failure(error, key) from error
        for directory in path.parents:
            if directory == self._root:
                break
            try:
                directory.rmdir()
            except OSError:
                break

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys of all objects under the directory ``prefix`` (itself a key; all of the store if empty), sorted."""
        prefix = prefix.rstrip("/")
        start = self._path(prefix) if prefix else self._root
        try:
            entries = sorted(os.scandir(start), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._failure(error, prefix) from error
        for entry in entries:
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                check_key(key)
            except UsageError:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self.keys(key)
            elif entry.is_file():
                yield key

    def close(self) -> None:
        """Nothing stays open between calls."""

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _opened(self, path: Path, key: str) -> Iterator[tuple[int, int]]:
        """Descriptor and size of an object; errors inside the block become those of the store."""
        try:
            # O_NONBLOCK: a fifo that lies about in a store must not hang the opener; files ignore it.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise MissingObjectError(_NO_OBJECT, key=key, origin=self.origin)
                yield fd, status.st_size
            finally:
                os.close(fd)
        except OSError as error:
            raise self._failure(error, key) from error

    def _failure(self, error: OSError, key: str) -> ImagefsError:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not self._root.is_dir():
            return UnavailableError("the store's directory is gone", key=key, origin=self.origin)
        return _classified(error, key=key, origin=self.origin)

    def _open_temporary(self) -> tuple[int, Path]:
        """A new file under ``.tmp/``, locked by us until it is closed."""
        directory = self._root / _TEMPORARY
        while True:
            self._make_directory(directory, 0o700)
            path = directory / f"{os.getpid()}-{secrets.token_hex(8)}"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            with suppress(OSError):  # a filesystem without locks: then nobody can remove leftovers either
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd, path
            # Another process took the file for a leftover in the moment before it was locked.
            os.close(fd)

    def _remove_leftovers_once(self) -> None:
        with self._sweep_lock:
            if self._swept:
                return
            self._swept = True
        with suppress(FileNotFoundError):
            for name in os.listdir(self._root / _TEMPORARY):
                # A leftover that cannot be removed (another user's) harms nobody.
                with suppress(OSError):
                    _remove_if_abandoned(self._root / _TEMPORARY / name)

    def _rename(self, temporary: Path, path: Path) -> None:
        for attempt in range(_RENAME_ATTEMPTS):
            try:
                for directory in reversed(path.parents[: len(path.parents) - len(self._root.parents) - 1]):
                    self._make_directory(directory, self._directory_mode)
                os.rename(temporary, path)
            except FileNotFoundError:
                if attempt == _RENAME_ATTEMPTS - 1 or not temporary.exists():
                    raise
            else:
                return

    def _make_directory(self, path: Path, mode: int) -> None:
        """One directory whose parent exists, durably; nothing if it is there already."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return
        # The umask may have taken bits that the root grants; a set-group-ID bit comes from the parent and stays.
        os.chmod(path, mode | (path.stat().st_mode & stat.S_ISGID))
        _sync_directory(path.parent)


def _pread_all(fd: int, count: int, offset: int) -> bytes:
    """``count`` bytes at ``offset``; fewer only at the end of the file. One pread may give less (2 GiB, NFS)."""
    data = os.pread(fd, count, offset)
    while data and len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_if_abandoned(path: Path) -> None:
    """Unlink a temporary file that no living writer holds; OSError if one does."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(fd)


def _classified(error: OSError, *, key: str, origin: str) -> ImagefsError:
    """What a failed system call means for the caller of a store. ENOSPC has no exception type of its own."""
    reason = (error.strerror or type(error).__name__).lower()
    if error.errno in (ENOSPC, EDQUOT):
        return NoSpaceError(f"{origin}: {key}: {reason}")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingObjectError(_NO_OBJECT, key=key, origin=origin)
    kind = AccessDeniedError if isinstance(error, PermissionError) else UnavailableError
    return kind(reason, key=key, origin=origin)
