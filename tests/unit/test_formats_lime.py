"""LiME images: ranges that need not be whole pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.formats.spool import FileSource
from imagefs.image.geometry import PAGE_SIZE, Region
from imagefs.image.native_reader import NativeReader
from tests.unit.samples_lime import HIGH, LOW, RANGES, lime

Open = Callable[[Path, bytes], object]


@pytest.mark.parametrize("piped", [False, True])
def test_ranges_become_regions(tmp_path: Path, piped: bool) -> None:
    data = lime(RANGES)
    path = tmp_path / "ram.lime"
    path.write_bytes(data)
    with open_capture(io.BytesIO(data) if piped else path, spool_dir=tmp_path) as capture:
        assert (capture.source_format, capture.source_version) == ("lime", "1")
        assert capture.geometry.regions == (
            Region("ram-0x1000", 0x1000, 3 * PAGE_SIZE, 0),
            Region("ram-0x100000", 0x100000, 2 * PAGE_SIZE, 3 * PAGE_SIZE),
        )
        # What is missing of the last page of a range is zeros.
        assert capture.memory.read_at(0, 1 << 20) == LOW.ljust(3 * PAGE_SIZE, b"\0") + HIGH
        assert NativeReader(capture.native, capture.memory).read_at(0, len(data)) == data
        assert capture.native.literals.size == 2 * 32 + 0xC00
        assert capture.restore == {}


@given(
    spans=st.lists(st.tuples(st.integers(0, 3 * PAGE_SIZE), st.integers(1, 3 * PAGE_SIZE)), min_size=1, max_size=6),
    start=st.integers(0, 2 * PAGE_SIZE),
)
def test_any_ranges(tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]], start: int) -> None:
    """Ranges may begin and end anywhere, and share pages: each byte is at its address, and what is between is zero."""
    directory = tmp_path_factory.mktemp("lime")
    ranges, address = [], start
    for number, (gap, length) in enumerate(spans):
        address += gap
        ranges.append((address, bytes([number + 1]) * length))
        address += length
    with open_capture(io.BytesIO(lime(ranges)), spool_dir=directory) as capture:
        assert NativeReader(capture.native, capture.memory).read_at(0, 1 << 20) == lime(ranges)
        for region in capture.geometry.regions:
            expected = bytearray(region.size)
            for at, data in ranges:
                if region.guest_address <= at < region.guest_address + region.size:
                    expected[at - region.guest_address : at - region.guest_address + len(data)] = data
            assert capture.memory.read_at(region.offset, region.size) == bytes(expected)
        covered = sum(len(data) for _, data in ranges)
        assert covered <= capture.geometry.size < covered + 2 * PAGE_SIZE * len(ranges)


def test_a_file_is_read_in_place(tmp_path: Path) -> None:
    """16 GiB of holes cost nothing."""
    path = tmp_path / "ram.lime"
    size = 16 << 30
    with open(path, "wb") as file:
        file.write(lime([(0, b"x")])[:16] + (size - 1).to_bytes(8, "little") + bytes(8))
        file.truncate(32 + size)
    with open_capture(path, spool_dir=tmp_path) as capture:
        assert capture.memory.size == size
        assert capture.memory.next_data(PAGE_SIZE) >= size - PAGE_SIZE
        assert capture.native.size == 32 + size
    assert isinstance(FileSource.open(path), FileSource)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lime([(0x1000, b"x" * 10), (0x1009, b"y")]), r"start address: 0x1009 is not behind .* 0x1009 at offset 0x32"),
        (
            lime([(0x1000, b"x" * 10)])[:-1],
            r"end address: the range .* has 10 bytes, the file has 9 more at offset 0x10",
        ),
        (lime([(1 << 52, b"x")]), r"start address: 0x10000000000000 is beyond 52 address bits at offset 0x8"),
        (lime([(5, b"x")]) + b"junk", r"range header: the file ends after 4 of 32 bytes at offset 0x25"),
        (lime([(5, b"x")]) + bytes(32), r"magic: 0x00000000 is not 0x4c694d45 at offset 0x21"),
        (lime([(5, b"x")])[:4] + b"\2" + lime([(5, b"x")])[5:], r"version: 2 is not 1"),
    ],
)
def test_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with (
        pytest.raises(UnsupportedInputError, match=message),
        open_capture(io.BytesIO(data), spool_dir=tmp_path, format="lime"),
    ):
        pass


def test_usage(tmp_path: Path) -> None:
    path = tmp_path / "ram.lime"
    path.write_bytes(lime(RANGES))
    with (
        pytest.raises(UsageError, match=r"--memory .*: a LiME image has its memory in itself"),
        open_capture(path, spool_dir=tmp_path, memory_files=[path]),
    ):
        pass
    with (
        pytest.raises(UsageError, match="is a directory, not a LiME image"),
        open_capture(tmp_path, spool_dir=tmp_path, format="lime"),
    ):
        pass
