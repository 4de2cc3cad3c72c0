"""Pages in the cache: presence, restarts, full disks, closing."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.cache.disk import DiskCache
from imagefs.cache.memory import SINGLE_LIMIT, MemoryCache
from imagefs.errors import NoSpaceError
from imagefs.fetch.arrivals import KEPT, ArrivalLog, scan_runs
from imagefs.fetch.view import Run
from imagefs.image.geometry import PAGE_SIZE

IMAGE = b"i" * 32
PAGE = bytes(range(256)) * 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_pages_are_there_once_put_and_only_then(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, IMAGE, 100 * PAGE_SIZE + 10)
    assert cache.read(0, 10) is None
    assert cache.put(3, PAGE * 2)
    assert cache.read(3 * PAGE_SIZE + 1, 5) == PAGE[1:6]
    assert cache.read(4 * PAGE_SIZE, PAGE_SIZE) == PAGE
    assert cache.read(4 * PAGE_SIZE, PAGE_SIZE + 1) is None
    assert cache.put(100, PAGE)
    assert cache.read(100 * PAGE_SIZE, 10) == PAGE[:10]
    cache.put_zeros(50, 10)
    assert cache.read(50 * PAGE_SIZE, 10 * PAGE_SIZE) == bytes(10 * PAGE_SIZE)
    assert repr(cache).endswith("13 of 101 pages>")
    assert (cache.path / "pages").stat().st_mode & 0o777 == 0o600
    assert cache.path.stat().st_mode & 0o777 == 0o700
    cache.close()
    assert not cache.put(1, PAGE)
    assert cache.read(3 * PAGE_SIZE, 1) is None


def test_two_daemons_share_a_cache(tmp_path: Path) -> None:
    first, second = (DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE) for _ in range(2))
    first.put(1, PAGE)
    assert second.read(PAGE_SIZE, 4) == PAGE[:4]
    first.close()
    second.put(2, PAGE)
    second.close()
    third = DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE)
    assert third.has(1, 2)
    third.close()


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="others can write there"):
        DiskCache(tmp_path / "open", IMAGE, PAGE_SIZE)
    planted = tmp_path / IMAGE.hex()
    planted.mkdir()
    os.chown(planted, 65534, 65534)
    with pytest.raises(PermissionError, match="others can write there"):
        DiskCache(tmp_path, IMAGE, PAGE_SIZE)


def test_blocks_survive(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, IMAGE, PAGE_SIZE)
    assert cache.block(b"d" * 32) is None
    cache.put_block(b"d" * 32, b"a block")
    assert cache.block(b"d" * 32) == b"a block"
    cache.close()


@pytest.mark.parametrize("size", [None, 0, 5 * PAGE_SIZE, 11 * PAGE_SIZE])
def test_bits_without_pages_are_dropped(tmp_path: Path, size: int | None) -> None:
    """Not filled up with zeros; and who has the old files open goes on with them."""
    first = DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE)
    first.put(0, PAGE * 10)
    pages = first.path / "pages"
    pages.unlink()
    if size is not None:
        pages.write_bytes(PAGE * (size // PAGE_SIZE))
    second = DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE)
    assert not any(second.has(page, 1) for page in range(10))
    assert second.put(9, PAGE)
    assert second.read(9 * PAGE_SIZE, PAGE_SIZE) == PAGE
    assert first.read(0, 10 * PAGE_SIZE) == PAGE * 10
    first.close()
    second.close()


def test_zeros_after_a_crash_are_zeros(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, IMAGE, 1000 * PAGE_SIZE, boot_id="one")
    cache.put(0, PAGE * 1000)
    cache.close()
    again = DiskCache(tmp_path, IMAGE, 1000 * PAGE_SIZE, boot_id="two")
    again.put_zeros(10, 900)
    assert again.read(10 * PAGE_SIZE, 900 * PAGE_SIZE) == bytes(900 * PAGE_SIZE)
    assert again.distrusted(0, 10) == PAGE * 10
    assert again.distrusted(910, 90) == PAGE * 90
    again.close()


@pytest.mark.expect_log("no space left")
def test_a_full_disk_degrades(small_disk: Path) -> None:
    cache = DiskCache(small_disk, IMAGE, 1000 * PAGE_SIZE)
    kept = [page for page in range(0, 1000, 10) if cache.put(page, PAGE)]
    assert 0 < len(kept) < 100
    for page in range(0, 1000, 10):
        assert cache.read(page * PAGE_SIZE, PAGE_SIZE) == (PAGE if page in kept else None)
    assert cache.statistics()["full"]
    cache.close()


@pytest.mark.expect_log("file too large; pages that cannot be kept")
def test_a_disk_that_fails_degrades(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, IMAGE, 1000 * PAGE_SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * PAGE_SIZE, hard))
    try:
        assert not cache.put(500, PAGE)
        assert not cache.put(501, PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not cache.has(500, 1)
    assert cache.put(500, PAGE)
    assert not cache.statistics()["full"]
    cache.close()


@pytest.mark.expect_log("bad file descriptor; pages that cannot be kept")
def test_a_page_that_cannot_be_read_is_not_here(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE, boot_id="before")
    assert cache.put(3, PAGE)
    cache.close()
    cache = DiskCache(tmp_path, IMAGE, 10 * PAGE_SIZE, boot_id="after")
    assert cache.put(4, PAGE)
    write_only = os.open(cache.path / "pages", os.O_WRONLY)
    os.dup2(write_only, cache._fd)
    os.close(write_only)
    assert cache.read(4 * PAGE_SIZE, 10) is None
    assert cache.distrusted(3, 1) is None
    cache.close()


def test_no_room_for_the_bitmap_is_said_at_once(small_disk: Path) -> None:
    with pytest.raises(NoSpaceError, match="no space for the cache's bitmap"):
        DiskCache(small_disk, IMAGE, 1 << 40)


def test_memory_cache_forgets_the_oldest(tmp_path: Path) -> None:
    cache = MemoryCache(64 * PAGE_SIZE, 16 * PAGE_SIZE, limit=32 * PAGE_SIZE)
    cache.put_zeros(48, 16)
    for first in (0, 16, 32):
        cache.put(first, PAGE * 16)
    assert cache.read(0, 1) is None
    assert not cache.has(0, 1)
    assert cache.read(16 * PAGE_SIZE, 48 * PAGE_SIZE) == PAGE * 32 + bytes(16 * PAGE_SIZE)


def test_memory_cache_keeps_single_pages() -> None:
    """Whether or not the window around them comes and goes."""
    cache = MemoryCache(64 * PAGE_SIZE, 16 * PAGE_SIZE, limit=16 * PAGE_SIZE)
    assert cache.put(2, PAGE * 2)
    assert cache.put(15, PAGE * 2)
    assert [page for page in range(64) if cache.has(page, 1)] == [2, 3, 15, 16]
    assert cache.read(15 * PAGE_SIZE + 1, 2 * PAGE_SIZE - 1) == (PAGE * 2)[1:]
    assert cache.read(2 * PAGE_SIZE, 3 * PAGE_SIZE) is None
    assert cache.put(0, PAGE * 16)
    assert cache.read(0, 17 * PAGE_SIZE) == PAGE * 17
    assert cache.put(32, PAGE * 16)
    assert [page for page in range(32) if cache.has(page, 1)] == [2, 3, 15, 16]
    cache.put_zeros(17, 15)
    assert cache.read(16 * PAGE_SIZE, 16 * PAGE_SIZE) == PAGE + bytes(15 * PAGE_SIZE)
    assert cache.statistics()["bytes"] == 20 * PAGE_SIZE
    assert not cache.put(40, PAGE * (SINGLE_LIMIT // PAGE_SIZE))


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(0, 250))
def test_scan_finds_exactly_the_set_bits(bits: list[bool], start: int) -> None:
    data = bytearray((len(bits) + 7) // 8)
    for page, bit in enumerate(bits):
        data[page // 8] |= bit << page % 8
    runs = list(scan_runs(lambda offset, length: bytes(data[offset : offset + length]), len(bits), start))
    assert [p for run in runs for p in range(run.page, run.page + run.count)] == [
        p for p, bit in enumerate(bits) if bit and p >= start
    ]


async def test_a_slow_reader_of_arrivals_misses_nothing() -> None:
    pages = KEPT + 1000
    bits = bytearray((pages * 2 + 7) // 8)
    log = ArrivalLog(pages * 2, lambda offset, length: bytes(bits[offset : offset + length]))
    _, cursor = log.read(0, 10)
    for page in range(0, pages * 2, 2):
        bits[page // 8] |= 1 << page % 8
        log.add(Run(page, 1))
    seen: set[int] = set()
    for _ in range(10_000):
        runs, cursor = log.read(cursor, 100)
        seen.update(run.page for run in runs)
        if not runs:
            break
    assert seen == set(range(0, pages * 2, 2))
