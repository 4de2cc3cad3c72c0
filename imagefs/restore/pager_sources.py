"""Where a pager gets pages from: the files of a mount, and its cache where this user may read that."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from imagefs.errors import MountError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.workingset import from_text
from imagefs.pager import PagerCache
from imagefs.restore.memory_reader import mount_status
from imagefs.restore.mountpoint import MountedImage

log = logging.getLogger(__name__)

LONGEST_SET = 1 << 20
"""Bytes: the lines of a set's 16 384 pages take half of that at most."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Open files; -1 and None where there are none. ``pages`` is the number of pages of ``memory``, ``order`` the runs
    (page, count) that guests touched first on this host."""

    pages: int
    memory_fd: int
    cache: PagerCache | None
    arrivals_fd: int
    trace_fd: int
    order: tuple[tuple[int, int], ...]


def page_count(image: MountedImage) -> int:
    """MountError where the memory cannot be paged."""
    size = image.memory_size()
    if size == 0 or size % PAGE_SIZE:
        raise MountError(f"{image.memory} has {size:,} bytes: guest memory is made of pages of {PAGE_SIZE}")
    return size // PAGE_SIZE


@contextmanager
def opened(image: MountedImage, *, trace: bool) -> Iterator[Sources]:
    """OSError and MountError where the mount cannot be read. ``trace``: whether touches are handed to the mount."""
    with ExitStack() as stack:
        pages = page_count(image)
        memory = _open(image.memory, os.O_RDONLY)
        stack.callback(os.close, memory)
        # Otherwise the kernel reads 128 KiB around a page that is wanted, and waits for all of it.
        os.posix_fadvise(memory, 0, 0, os.POSIX_FADV_RANDOM)
        path = mount_status(image, "cache", "path")
        yield Sources(
            pages,
            memory,
            _cache(path, pages, stack) if isinstance(path, str) else None,
            _optional(image.control("arrivals"), os.O_RDONLY, stack),
            _optional(image.control("trace"), os.O_WRONLY, stack) if trace else -1,
            _order(path, pages) if isinstance(path, str) else (),
        )


def _cache(path: str, pages: int, stack: ExitStack) -> PagerCache | None:
    files = [_optional(Path(path, name), os.O_RDONLY, stack) for name in ("pages", "present")]
    if min(files) < 0 or os.fstat(files[0]).st_size != pages * PAGE_SIZE:
        log.info("%s: the cache cannot be read, so that pages come through the mount", path)
        return None
    return PagerCache(*files)


def _order(path: str, pages: int) -> tuple[tuple[int, int], ...]:
    """It decides what comes sooner and nothing else, so that one that cannot be read is none."""
    try:
        with open(Path(path, "working-set"), "rb") as file:
            recorded = from_text(file.read(LONGEST_SET), pages)
    except (OSError, ValueError):
        return ()
    runs: list[tuple[int, int]] = []
    for page in recorded.pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return tuple(runs)


def _optional(path: Path, flags: int, stack: ExitStack) -> int:
    try:
        fd = _open(path, flags)
    except OSError:
        return -1
    stack.callback(os.close, fd)
    return fd


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)
