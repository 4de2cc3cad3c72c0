"""Pages on disk: a sparse file in guest-memory order, and the presence bitmap beside it.

    CACHE/<manifest digest>/pages         bytes of ``memory``, holes where nothing has arrived (or all is zero)
    CACHE/<manifest digest>/present       the bitmap, mapped by the daemon and by native helpers
    CACHE/<manifest digest>/boot          the boot id of the host under which the bitmap was written
    CACHE/<manifest digest>/distrusted    the bitmap of an earlier boot
    CACHE/<manifest digest>/blocks/…      index blocks by digest
    CACHE/<manifest digest>/working-set   what guests touched first on this host: lines PAGE RECORDINGS

A process that dies loses nothing: what it wrote is in the host's page cache. A host that dies may have kept a bit
and lost its page, so the bitmap of another boot is not believed: its pages are verified by digest when they are next
wanted, which is a local read instead of a transfer. That is why nothing here ever waits for fsync.

Several daemons of one host may share a cache: bits are only ever set, each after its page.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from imagefs.cache.presence import Presence
from imagefs.errors import NoSpaceError
from imagefs.image.geometry import PAGE_SIZE

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
ZEROS = 1 << 20
"""Bytes that are written at a time where there should be a hole."""
WORKING_SET = "working-set"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DiskCache:
    """The pages of one image under ``root``. See :class:`imagefs.fetch.sink.PageSink`."""

    def __init__(self, root: Path, image: bytes, size: int, *, boot_id: str | None = None) -> None:
        """Open or create. ``size`` is that of ``memory`` in bytes. NoSpaceError, or OSError for a bad directory."""
        self.path = root / image.hex()
        self.pages = -(-size // PAGE_SIZE)
        self._size = size
        self._lock = threading.Lock()
        self._closed = False
        self._full = self._failing = False
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_ours(root)
            _check_ours(self.path)
            with (self.path / "lock").open("a") as lock, ExitStack() as undo:
                # Held only while opening: two daemons must not both take the other's bitmap for an old one.
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._drop_bits_without_pages()
                self._distrust_other_boot(boot_id or BOOT_ID.read_text().strip())
                self._fd = self._open("pages", size)
                undo.callback(os.close, self._fd)
                self._presence = undo.enter_context(closing(Presence(self._map("present"), self.pages)))
                old = (self.path / "distrusted").exists()
                self._old = Presence(self._map("distrusted"), self.pages) if old else None
                undo.pop_all()
        except OSError as error:
            if error.errno in FULL:
                raise NoSpaceError(f"{self.path}: no space for the cache's bitmap") from error
            raise

    def __repr__(self) -> str:
        return f"<DiskCache {self.path}: {self._presence.count()} of {self.pages} pages>"

    def read(self, offset: int, length: int) -> bytes | None:
        first, last = offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE
        if self._closed or not self._presence.all(first, last - first + 1):
            return None
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            self._say_once(error)
            return None
        # Shorter than asked: someone has cut the file. Then nothing of it is to be believed.
        return data if len(data) == length else None

    def has(self, first: int, count: int) -> bool:
        return self._presence.all(first, count)

    def put(self, first: int, data: bytes | memoryview) -> bool:
        with self._lock:
            if self._closed:
                return False
            try:
                # The last page may reach beyond the memory's end; the file does not.
                view = memoryview(data)[: self._size - first * PAGE_SIZE]
                done = 0
                while done < len(view):
                    done += os.pwrite(self._fd, view[done:], first * PAGE_SIZE + done)
            except OSError as error:
                # Whatever it is, a guest waits for the page and has it without the cache.
                self._say_once(error)
                return False
            self._full = self._failing = False
            self._presence.set(first, min(len(data) // PAGE_SIZE, self.pages - first))
            return True

    @property
    def full(self) -> bool:
        return self._full or self._failing

    def put_zeros(self, first: int, count: int) -> None:
        with self._lock:
            if not self._closed:
                if self._old is not None and not self._clear(first, count):
                    return
                self._presence.set(first, count)

    def distrusted(self, first: int, count: int) -> bytes | None:
        with self._lock:
            if self._closed or self._old is None or not self._old.all(first, count):
                return None
            self._old.clear(first, count)
            try:
                data = os.pread(self._fd, count * PAGE_SIZE, first * PAGE_SIZE)
            except OSError as error:
                self._say_once(error)
                return None
        return data + bytes(count * PAGE_SIZE - len(data))

    def block(self, digest: bytes) -> bytes | None:
        try:
            return self._block_path(digest).read_bytes()
        except OSError:
            return None

    def put_block(self, digest: bytes, data: bytes) -> None:
        # A block that cannot be kept is fetched again; a torn one fails its digest and is fetched again, too.
        _replace(self._block_path(digest), data)

    def working_set(self) -> bytes | None:
        try:
            return (self.path / WORKING_SET).read_bytes()
        except OSError:
            return None

    def put_working_set(self, text: bytes) -> None:
        _replace(self.path / WORKING_SET, text)

    def bitmap(self, offset: int, length: int) -> bytes:
        return self._presence.bytes_at(offset, length)

    def statistics(self) -> dict[str, Any]:
        return {
            "kind": "disk",
            "path": str(self.path),
            "pages_present": self._presence.count(),
            "bytes_on_disk": os.fstat(self._fd).st_blocks * 512,
            "full": self._full,
            "distrusted_pages": 0 if self._old is None else self._old.count(),
        }

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._fd)
            self._presence.close()
            if self._old is not None:
                self._old.close()

    def _say_once(self, error: OSError) -> None:
        """Once until a write succeeds again: a disk that fails does so for each page."""
        self._full = error.errno in FULL
        if not self._failing:
            reason = "no space left" if self._full else (error.strerror or str(error)).lower()
            log.warning("%s: %s; pages that cannot be kept are fetched again when needed", self.path, reason)
        self._failing = True

    def _block_path(self, digest: bytes) -> Path:
        return self.path / "blocks" / digest.hex()

    def _clear(self, first: int, count: int) -> bool:
        """Zero what a crash has left where there ought to be a hole; False where that cannot be done.

        Asks the file system where there is data, and reads nothing.
        """
        start, end = first * PAGE_SIZE, min((first + count) * PAGE_SIZE, self._size)
        try:
            while (start := os.lseek(self._fd, start, os.SEEK_DATA)) < end:
                hole = min(os.lseek(self._fd, start, os.SEEK_HOLE), end, start + ZEROS)
                start += os.pwrite(self._fd, bytes(hole - start), start)
        except OSError as error:
            return error.errno == errno.ENXIO  # no data up to the end of the file
        return True

    def _drop_bits_without_pages(self) -> None:
        """A page file that is lost or has another size has lost pages: to fill it up would make zeros of them.

        All files are left to the daemons that may have them open, and made anew.
        """
        pages = self.path / "pages"
        if not pages.exists() or pages.stat().st_size != self._size:
            for name in ("present", "distrusted", "pages"):
                (self.path / name).unlink(missing_ok=True)

    def _distrust_other_boot(self, boot_id: str) -> None:
        boot, present, distrusted = (self.path / name for name in ("boot", "present", "distrusted"))
        if boot.exists() and boot.read_text() == boot_id and present.exists():
            return
        if present.exists():
            # Pages that an even older boot left unverified are lost; they are fetched again.
            present.replace(distrusted)
        boot.write_text(boot_id)

    def _open(self, name: str, size: int) -> int:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
        return fd

    def _map(self, name: str) -> mmap.mmap:
        size = (self.pages + 7) // 8
        fd = self._open(name, size)
        try:
            # A hole that cannot be filled later would be a SIGBUS: have the blocks now. 32 MiB for 1 TiB.
            os.posix_fallocate(fd, 0, size)
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)


def _replace(path: Path, data: bytes) -> None:
    """A file that may as well be lost: nothing is said where it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.touch(mode=0o600)
        temporary.write_bytes(data)
        temporary.rename(path)


def _check_ours(directory: Path) -> None:
    """What is in the cache is believed, so nobody else may put anything there. PermissionError otherwise."""
    status = directory.stat()
    # In a sticky directory, as /tmp is, others can neither remove nor rename what is ours.
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if status.st_uid not in (0, os.geteuid()) or writable:
        reason = "others can write there, and could put wrong pages into a guest"
        raise PermissionError(errno.EPERM, reason, str(directory))
