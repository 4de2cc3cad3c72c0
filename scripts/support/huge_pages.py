"""Huge pages of 2 MiB for those who map hugetlbfs; takes root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


class NoHugePagesError(Exception):
    pass


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many more in the kernel's pool. NoHugePagesError where its memory is too scattered."""
    _add(count)
    try:
        free = int((POOL / "free_hugepages").read_text())
        if free < count:
            raise NoHugePagesError(f"the kernel has {free} huge pages, {count} are needed")
        yield
    finally:
        _add(-count)


def _add(count: int) -> None:
    pool = POOL / "nr_hugepages"
    pool.write_text(str(max(0, int(pool.read_text()) + count)))
