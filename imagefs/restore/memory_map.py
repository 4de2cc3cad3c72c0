"""The memory of a mounted image in this process, for tools: lazily, and without the detours of a mapped FUSE file."""

from __future__ import annotations

import mmap
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from imagefs.errors import MountError, RestoreError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.pager import Pager, PagerStatistics, new_state, open_userfaultfd, register_mapping
from imagefs.restore.mountpoint import MountedImage, read_memory
from imagefs.restore.pager_sources import Sources, opened
from imagefs.restore.userfaultfd import userfaultfd_obstacle


class LazyMemory(mmap.mmap):
    """Guest memory, read-only; see :func:`map_memory`. A context manager, as :class:`mmap.mmap` is."""

    _pager: Pager | None = None

    def __new__(cls, size: int) -> LazyMemory:
        return super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._pager is not None:
            self._pager.close()

    def statistics(self) -> PagerStatistics:
        """What has been touched and brought so far. ValueError once it is closed."""
        if self._pager is None:
            raise ValueError("the memory is closed")
        return self._pager.statistics()

    def close(self) -> None:
        """BufferError where a memoryview of it is still there; then it stays as it was."""
        # First: a view that lives on must find its pager.
        super().close()
        if self._pager is not None:
            self._pager.close()
            self._pager = None


def map_memory(mountpoint: str | Path, *, ahead: bool = False) -> LazyMemory:
    """The flat guest memory of the image mounted at ``mountpoint``: a read-only :class:`mmap.mmap`.

    A page is brought when it is first touched, by native threads that need no GIL. ``ahead`` brings whatever has
    arrived at the mount as well. What was brought stays in this process's memory until the mapping is closed.

    The toucher waits for its page, and a Python thread keeps the GIL meanwhile. If a page cannot be had (EIO), this
    process ends by SIGBUS, as it would with any mapped file, after a line on standard error. A forked child does not
    have the mapping: it ends by SIGSEGV if it looks there.

    MountError where no image is mounted or its memory cannot be read; RestoreError where userfaultfd is not permitted.
    """
    image = read_memory(Path(mountpoint))
    try:
        with opened(image, trace=False) as sources:
            return _map(image, sources, ahead)
    except OSError as error:
        raise MountError(f"{error.filename or image.memory}: {error.strerror}") from error


def _map(image: MountedImage, sources: Sources, ahead: bool) -> LazyMemory:
    with ExitStack() as stack:
        try:
            uffd = open_userfaultfd(moves=False)
        except OSError as error:
            reason = userfaultfd_obstacle() or f"userfaultfd: {error.strerror}"
            raise RestoreError(f"{image.memory} cannot be mapped lazily: {reason}") from error
        stack.callback(os.close, uffd)
        state = new_state(sources.pages)
        stack.callback(os.close, state)
        memory = LazyMemory(sources.pages * PAGE_SIZE)
        pager = Pager(
            uffd,
            [register_mapping(uffd, memory)],
            sources.memory_fd,
            pages=sources.pages,
            state_fd=state,
            cache=sources.cache,
            arrivals_fd=sources.arrivals_fd,
            order=sources.order,
            ahead=ahead,
            failure_signal=signal.SIGBUS,
        )
        memory._pager = pager
        pager.start()
        return memory
