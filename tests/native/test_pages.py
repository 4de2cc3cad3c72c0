"""imagefs.native against plain Python, at its bounds, and from several threads and processes at once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import native
from imagefs.native import PAGE_SIZE
from imagefs.restore.shim import preload_path


@st.composite
def some_pages(draw: st.DrawFn) -> bytes:
    """Up to 40 pages: zero, full, or with a single byte anywhere, the first and last places of a page often."""
    places = st.sampled_from([0, 1, 7, 8, 255, 256, PAGE_SIZE - 1]) | st.integers(0, PAGE_SIZE - 1)
    pages = []
    for place, value in draw(st.lists(st.tuples(st.none() | places, st.integers(1, 255)), max_size=40)):
        page = bytearray(PAGE_SIZE)
        if place is not None:
            page[place] = value
        pages.append(bytes(page))
    return b"".join(pages)


def reference_scan(buf: bytes) -> bytes:
    pages = [buf[at : at + PAGE_SIZE] for at in range(0, len(buf), PAGE_SIZE)]
    bitmap = bytearray((len(pages) + 7) // 8)
    for i, page in enumerate(pages):
        if any(page):
            bitmap[i // 8] |= 1 << i % 8
    return bytes(bitmap)


def is_set(bits: bytes | bytearray, i: int) -> bool:
    return bool(bits[i // 8] >> i % 8 & 1)


@given(some_pages())
def test_scan(buf: bytes) -> None:
    assert native.scan(buf) == reference_scan(buf)


@given(st.data(), some_pages())
def test_compact_and_expand(data: st.DataObject, buf: bytes) -> None:
    pages = len(buf) // PAGE_SIZE
    size = (pages + 7) // 8
    # Any bitmap, those of whole runs often; bits past the last page are noise that must not count.
    bitmap = data.draw(st.binary(min_size=size, max_size=size) | st.lists(st.sampled_from([0, 255])).map(bytes))
    bitmap = bitmap[:size].ljust(size, b"\xff")
    kept = [buf[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] if is_set(bitmap, i) else None for i in range(pages)]

    packed = native.compact(buf, bitmap)
    assert packed == b"".join(page for page in kept if page is not None)
    assert native.expand(packed, bitmap, pages) == b"".join(page or bytes(PAGE_SIZE) for page in kept)


@given(some_pages())
def test_what_scan_keeps_is_all_there_is(buf: bytes) -> None:
    bitmap = native.scan(buf)
    assert native.expand(native.compact(buf, bitmap), bitmap, len(buf) // PAGE_SIZE) == buf


runs = st.tuples(st.integers(0, 300), st.integers(0, 300))


@given(st.lists(runs, max_size=8), runs)
def test_bits(set_runs: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    bits = bytearray(75)
    expected: set[int] = set()
    for first, count in set_runs:
        native.bits_set(bits, first, count)
        expected.update(range(first, first + count))
    assert {i for i in range(600) if is_set(bits, i)} == expected

    first, count = asked
    run = set(range(first, first + count))
    assert native.bits_all(bits, first, count) == (run <= expected)
    assert native.bits_count(bits, first, count) == len(run & expected)


def test_any_buffer_will_do(tmp_path: Path) -> None:
    page = b"x" * PAGE_SIZE
    (tmp_path / "f").write_bytes(page)
    with (tmp_path / "f").open("r+b") as file, mmap.mmap(file.fileno(), PAGE_SIZE) as mapped:
        for buf in (page, bytearray(page), memoryview(page), memoryview(b"_" + page)[1:], mapped):
            assert native.scan(buf) == b"\x01"
            assert native.compact(buf, b"\x01") == page
    with pytest.raises(BufferError):
        native.bits_set(b"\0", 0, 1)


@pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE + 1])
def test_partial_pages_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"buffer of {size} bytes: not a multiple"):
        native.scan(bytes(size))
    with pytest.raises(ValueError, match=rf"buffer of {size} bytes: not a multiple"):
        native.compact(bytes(size), b"\0")


@pytest.mark.parametrize("bitmap", [b"", b"\0", b"\0\0\0"])
def test_wrong_bitmaps_are_refused(bitmap: bytes) -> None:
    with pytest.raises(ValueError, match=rf"bitmap of {len(bitmap)} bytes: 9 pages take 2"):
        native.compact(bytes(9 * PAGE_SIZE), bitmap)
    with pytest.raises(ValueError, match=rf"bitmap of {len(bitmap)} bytes: 9 pages take 2"):
        native.expand(b"", bitmap, 9)


def test_wrong_data_is_refused() -> None:
    for size in (0, PAGE_SIZE, 2 * PAGE_SIZE - 1, 3 * PAGE_SIZE):
        with pytest.raises(ValueError, match=rf"data of {size} bytes: the bitmap's pages take {2 * PAGE_SIZE}"):
            native.expand(bytes(size), b"\x05", 3)
    with pytest.raises(ValueError, match="cannot be negative"):
        native.expand(b"", b"", -1)


@pytest.mark.parametrize(("first", "count"), [(0, 17), (16, 1), (17, 0), (-1, 2), (3, -1), (2**64, 1), (2**64 - 1, 2)])
def test_runs_outside_the_bitmap_are_refused(first: int, count: int) -> None:
    bits = bytearray(2)
    for call in (native.bits_set, native.bits_all, native.bits_count):
        with pytest.raises(ValueError, match="of a bitmap of 16 bits"):
            call(bits, first, count)
    assert bits == bytes(2)


def test_no_bits_at_the_very_end() -> None:
    native.bits_set(bytearray(2), 16, 0)
    assert native.bits_all(bytes(2), 16, 0)
    assert native.bits_count(b"\xff\xff", 16, 0) == 0


BITS = 1 << 18
SET_EVERY_OTHER = """
import mmap, sys
from imagefs import native
with open(sys.argv[1], "r+b") as file:
    bits = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
sys.stdin.read(1)
for i in range(int(sys.argv[2]), len(bits) * 8, 2):
    native.bits_set(bits, i, 1)
"""


def test_threads_lose_no_bit_of_each_other() -> None:
    bits = bytearray(BITS // 8)
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        # Runs of 3 that begin and end within bytes which the other threads write too.
        for at in range(first * 3, BITS - 3, 12):
            native.bits_set(bits, at, 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    missing = [i for i in range(BITS - 12) if not is_set(bits, i)]
    assert missing == []


def test_processes_lose_no_bit_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "bits"
    path.write_bytes(bytes(BITS // 8))
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SET_EVERY_OTHER, path, str(first)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for first in (0, 1)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
        for worker in workers:
            worker.communicate(b"g", timeout=60)
            assert worker.returncode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bits:
        assert native.bits_count(bits, 0, BITS) == BITS
        assert native.bits_all(bits, 0, BITS)


def test_preload_path_is_a_shared_object() -> None:
    path = preload_path()
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert os.access(path, os.R_OK)
