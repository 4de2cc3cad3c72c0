"""Who is writing into a directory store: every split holds a lock in it, shared with all others, from before it looks
at what is there until it is done or has cleaned up.

A split may refer to objects that another one has put and that has not ended yet. So an object may be deleted only by
who holds the lock alone. ``flock(2)`` on the file ``.lock``: the kernel lets go of it however a process ends. Where the
filesystem has no locks nobody ever holds it alone, and nothing is deleted.
"""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Self

from imagefs.errors import UnavailableError
from imagefs.store.base import OBJECTS
from imagefs.store.directory import DirectoryStore

FILE_NAME = ".lock"
_ATTEMPTS = 100
"""A split that failed takes the store with it that was made for it, lock file and all, maybe as we open it."""


class SplitLock:
    """The lock of one split, held from construction to :meth:`close`. Blocks while another one is deleting.

    ``settled`` are the objects that were there at a moment when no other split was running, so that nobody will take
    them back; None if others were running.
    """

    def __init__(self, store: DirectoryStore) -> None:
        self._store = store
        self.settled: frozenset[str] | None = None
        for _ in range(_ATTEMPTS):
            self._fd = self._open()
            try:
                if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) and self._is_current():
                    self.settled = frozenset(store.keys(OBJECTS))
                self._lock(fcntl.LOCK_SH)
                if self._is_current():
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
            self.settled = None
        raise UnavailableError("comes and goes: too many splits fail here", key=FILE_NAME, origin=store.origin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def alone(self) -> bool:
        """Take the lock for us alone, unless another split is running. For the end of a split that failed: on False
        we hold no lock any more. On True nobody else starts before :meth:`close`."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) and self._is_current()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        path = self._store.root / FILE_NAME
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            DirectoryStore(self._store.root, create=True)
            return os.open(path, flags, 0o600)

    def _lock(self, how: int) -> bool:
        try:
            fcntl.flock(self._fd, how)
        except OSError:
            return False
        return True

    def _is_current(self) -> bool:
        """Whether the file that we hold is still the one that others will find."""
        try:
            found = os.stat(self._store.root / FILE_NAME)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))
