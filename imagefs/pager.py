"""The native fault helper, typed; what it does and promises is in ``native/pager.h`` and ``docs/pager.md``.

Its threads are the native code's own and never need the GIL. No Python touches registered memory.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING

from imagefs._native import ffi, lib
from imagefs.errors import RestoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from imagefs._native import CData

NO_PAGE = 2**64 - 1
SECONDS_TO_STOP = 5.0
"""How long close() waits for threads that read the mount; pulled out of the air."""


class Status(Enum):
    RUNNING = 0
    STOPPED = 1
    VMM_GONE = 2
    FAILED = 3
    """:attr:`Pager.error` says why. The owner must stop the VMM, or begin anew once the mount can be read again."""
    COMPLETE = 4
    """The VMM has all of its memory and needs no pager any more."""


@dataclass(frozen=True, slots=True)
class PagerRegion:
    """A piece of the VMM's registered memory, all in bytes; ``offset`` is its place in ``memory``."""

    address: int
    size: int
    offset: int
    page_size: int = 4096


@dataclass(frozen=True, slots=True)
class PagerCache:
    """The page file of the cache and its presence bitmap, open for reading."""

    pages_fd: int
    present_fd: int


@dataclass(frozen=True, slots=True)
class PagerStatistics:
    """Counters over all pagers that have worked on one state; their meanings are in ``native/pager.h``."""

    faults: int
    from_cache: int
    from_memory: int
    from_nothing: int
    unprotected: int
    copied_pages: int
    zero_pages: int
    ahead_pages: int
    removed_pages: int
    remaps: int
    unmaps: int
    forks: int
    existed: int
    vanished: int
    again: int
    takeovers: int
    touched: int
    trace_dropped: int


class PagerError(RestoreError):
    """The right page cannot be had; ``page`` is None where no page is to blame. ``reading`` is the errno with which
    the mount's ``memory`` could not be read, 0 for other failures."""

    def __init__(self, reason: str, page: int | None = None, reading: int = 0) -> None:
        self.reason = reason
        self.page = page
        self.reading = reading
        super().__init__(f"fault helper: {reason}")


def size_state(fd: int, pages: int, spare: int = 0) -> None:
    """Make an empty file the fresh shared state of an image of that many pages. Behind the state are ``spare`` bytes or
    more, for the caller. It outlives the process that serves if another process holds it, too.

    ValueError for too many pages; OSError.
    """
    os.ftruncate(fd, state_size(pages) + spare)


def new_state(pages: int) -> int:
    """A file descriptor of fresh shared state, the caller's to close. Errors as :func:`size_state`."""
    fd = os.memfd_create("imagefs", os.MFD_CLOEXEC)
    try:
        size_state(fd, pages)
    except (OSError, ValueError):
        os.close(fd)
        raise
    return fd


def check_regions(regions: Sequence[PagerRegion], pages: int) -> None:
    """PagerError where no VMM can have such regions over a ``memory`` of that many pages."""
    why = ffi.new("char[]", 256)
    areas = _regions(regions)
    if lib.imagefs_pager_check_regions(areas, len(areas), pages, why, len(why)):
        raise PagerError(ffi.string(why).decode())


def open_userfaultfd(*, moves: bool) -> int:
    """A userfaultfd of this process; ``moves`` asks for the events of munmap and mremap. OSError."""
    uffd = lib.imagefs_userfault_open(moves)
    if uffd < 0:
        raise OSError(-uffd, os.strerror(-uffd))
    return uffd


def register(uffd: int, address: int, size: int) -> None:
    """Anonymous private memory of this process, which it must not touch before a pager serves it. OSError."""
    error = -lib.imagefs_userfault_register(uffd, address, size)
    if error:
        raise OSError(error, os.strerror(error))


def register_mapping(uffd: int, mapping: Buffer) -> PagerRegion:
    """All of an anonymous private mapping of whole pages, as a region over the beginning of ``memory``. OSError."""
    with ffi.from_buffer("uint8_t[]", mapping) as view:
        region = PagerRegion(int(ffi.cast("uintptr_t", view)), len(view), 0)
    register(uffd, region.address, region.size)
    return region


def fetch_descriptor(pidfd: int, number: int) -> int:
    """A copy of another process's file descriptor. OSError."""
    fd = lib.imagefs_userfault_fetch(pidfd, number)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


def state_size(pages: int) -> int:
    """Bytes of the shared state of an image of that many pages. ValueError for too many."""
    size = lib.imagefs_pager_state_size(pages)
    if not size:
        raise ValueError(f"{pages} pages: more than a pager can serve")
    return size


def state_statistics(state_fd: int) -> PagerStatistics | None:
    """The counters in a state, for whoever holds it. None where no pager has begun on it."""
    out = ffi.new("struct imagefs_pager_statistics *")
    return _statistics(out) if lib.imagefs_pager_state_statistics(state_fd, out) else None


class Pager:
    """Serves one userfaultfd. File descriptors are duplicated: the caller keeps its own."""

    def __init__(
        self,
        uffd: int,
        regions: Sequence[PagerRegion],
        memory_fd: int,
        *,
        pages: int,
        state_fd: int,
        cache: PagerCache | None = None,
        arrivals_fd: int = -1,
        trace_fd: int = -1,
        order: Iterable[tuple[int, int]] = (),
        ahead: bool = True,
        event_threads: int = 0,
        fetch_threads: int = 0,
        failure_signal: int = 0,
    ) -> None:
        """``pages`` is that of ``memory``; ``order`` is (page, count) of what to install first. 0 threads: default.
        ``failure_signal`` ends this process where the pager fails: for a process that pages itself.

        A ``state_fd`` that is in use is taken over, its pager being dead; ``regions`` do not matter then.
        PagerError where it cannot begin: wrong regions, no file descriptors, a state of something else.
        """
        options = ffi.new("struct imagefs_pager_options *")
        areas = _regions(regions)
        runs = ffi.new("struct imagefs_pager_run[]", list(order))
        options.uffd, options.state_fd, options.memory_fd = uffd, state_fd, memory_fd
        options.cache_fd, options.present_fd = (cache.pages_fd, cache.present_fd) if cache else (-1, -1)
        options.arrivals_fd, options.trace_fd = arrivals_fd, trace_fd
        options.event_threads, options.fetch_threads, options.ahead = event_threads, fetch_threads, ahead
        options.failure_signal = failure_signal
        options.pages = pages
        options.regions, options.region_count = areas, len(areas)
        options.order, options.order_count = runs, len(runs)
        why = ffi.new("char[]", 256)
        self._pager = lib.imagefs_pager_create(options, why, len(why))
        if self._pager == ffi.NULL:
            raise PagerError(ffi.string(why).decode())
        self._closed = False

    def __repr__(self) -> str:
        return "<Pager closed>" if self._closed else f"<Pager {self.status.name.lower()}: {self.statistics()}>"

    def __enter__(self) -> Pager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> Status:
        return Status(lib.imagefs_pager_get_status(self._open()))

    @property
    def error(self) -> PagerError | None:
        out = ffi.new("struct imagefs_pager_failure *")
        if not lib.imagefs_pager_get_failure(self._open(), out):
            return None
        page = None if out.page == NO_PAGE else out.page
        return PagerError(ffi.string(out.text).decode(), page, out.error if out.reading else 0)

    def fileno(self) -> int:
        """Readable once the pager has ended; the pager's own."""
        return lib.imagefs_pager_ended_fd(self._open())

    def statistics(self) -> PagerStatistics:
        out = ffi.new("struct imagefs_pager_statistics *")
        lib.imagefs_pager_get_statistics(self._open(), out)
        return _statistics(out)

    def start(self) -> None:
        """Serve. Once. PagerError where threads cannot be had."""
        error = lib.imagefs_pager_start(self._open())
        if error:
            raise PagerError(f"no threads: {os.strerror(error)}")

    def wait(self, seconds: float | None = None) -> Status:
        """Until it ends, at most ``seconds``; what it is then."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        return self.status

    def stop(self) -> None:
        """Serve no more. Touches wait from now on."""
        lib.imagefs_pager_stop(self._open())

    def close(self, seconds: float = SECONDS_TO_STOP) -> bool:
        """Stop and let go. False where a thread is still in a read that the mount does not answer: it leaves later."""
        if self._closed:
            return True
        self._closed = True
        return bool(lib.imagefs_pager_destroy(self._pager, int(seconds * 1000)))

    def _open(self) -> CData:
        if self._closed:
            raise ValueError("the pager is closed")
        return self._pager


def _regions(regions: Sequence[PagerRegion]) -> CData:
    made: CData = ffi.new(
        "struct imagefs_pager_region[]", [(r.address, r.size, r.offset, r.page_size) for r in regions]
    )
    return made


def _statistics(out: CData) -> PagerStatistics:
    return PagerStatistics(**{field.name: getattr(out, field.name) for field in fields(PagerStatistics)})
