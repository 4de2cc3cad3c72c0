"""What must outlive a pager and its supervisor: the pager's state, and a record of whose it is.

One file, shared by all who serve a VMM, one after the other: first the state (``native/pager.h``), in the last
RECORD_SIZE bytes the record. It is a memfd that QEMU keeps open, too; or, for a VMM that we did not start, a file
beside the socket. Locks of the file's first two bytes say who is at work; the kernel drops them when a process dies.

| byte | locked by the process that |
|-----:|-----------------------------|
|    0 | pages: a second one waits until the first is dead |
|    1 | supervises |
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from imagefs.errors import RestoreError, UsageError
from imagefs.pager import PagerStatistics, size_state, state_size, state_statistics

RECORD_SIZE = 4096
SUFFIX = ".state"
"""What a state file is named by, after the socket's name."""

_PAGES, _SUPERVISES = 0, 1
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True)
class Record:
    """Whose state it is."""

    identity: str
    """Of the image, see :func:`imagefs.restore.memory_reader.identity`."""
    pages: int
    pid: int
    """The VMM; 0 where it is in another PID namespace."""
    started: int | None
    """The VMM's start time, by which it is told from a later process."""
    uffd: int | None
    """The userfaultfd's number in the VMM, where that is known."""


class SharedState:
    """An open state; a context manager that closes it. A file stays until :meth:`forget`, for whoever takes over."""

    def __init__(self, fd: int, path: Path | None = None) -> None:
        """Takes the descriptor over."""
        self.fd = fd
        self.path = path

    @classmethod
    def begun(cls, fd: int, pages: int) -> SharedState:
        """In an empty memfd, which it takes over."""
        size_state(fd, pages, RECORD_SIZE)
        return cls(fd)

    @classmethod
    def beside(cls, socket: Path, pages: int) -> SharedState:
        """A new file, owner-only. UsageError where there is one, or none can be made."""
        path = socket.with_name(socket.name + SUFFIX)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise UsageError(
                f"{path} is there: a VMM that was served through {socket} may still need it. If it runs, "
                "take over with --reattach; otherwise remove the file"
            ) from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        state = cls(fd, path)
        try:
            # Not a hole that cannot be filled later: what a pager notes there must not fail.
            os.posix_fallocate(fd, 0, state_size(pages) + RECORD_SIZE)
        except OSError as error:
            state.forget()
            state.close()
            raise UsageError(f"{path}: {error.strerror}") from error
        return state

    @classmethod
    def found_beside(cls, socket: Path) -> SharedState:
        """UsageError where there is none."""
        path = socket.with_name(socket.name + SUFFIX)
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}; what VMM was served through {socket}?") from error

    def __enter__(self) -> SharedState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def forget(self) -> None:
        """Nobody needs it any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        text = json.dumps(asdict(record)).encode().ljust(RECORD_SIZE, b" ")
        os.pwrite(self.fd, text, os.fstat(self.fd).st_size - RECORD_SIZE)

    def read(self) -> Record | None:
        """None where no VMM has been handed over."""
        text = os.pread(self.fd, RECORD_SIZE, max(0, os.fstat(self.fd).st_size - RECORD_SIZE))
        try:
            return Record(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def statistics(self) -> PagerStatistics | None:
        return state_statistics(self.fd)

    # ---- who is at work ----

    def begin_supervising(self) -> None:
        """For as long as this process lives. RestoreError where another one does."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _SUPERVISES)
        except OSError as error:
            raise RestoreError(f"process {self._holder(_SUPERVISES)} serves this VMM already") from error

    def begin_paging(self) -> None:
        """For as long as this process lives; waits for the death of another one that does."""
        fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, _PAGES)

    def paging_process(self) -> int | None:
        """None where there is none."""
        return self._holder(_PAGES) or None

    def _holder(self, byte: int) -> int:
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_GETLK, query))
        return 0 if kind == fcntl.F_UNLCK else int(pid)
