"""Memory out of pieces, and files out of that memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import UsageError
from imagefs.formats.base import NativeRecorder, Workspace
from imagefs.formats.directory import file_names, regular_files
from imagefs.formats.pieces import PageRun, PieceMemory, page_runs, record_file
from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_reader import NativeReader


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1), st.integers(0, 90), st.integers(1, 60)), max_size=8))
def test_pieces_are_where_they_were_put(pieces: list[tuple[int, int, int, int]]) -> None:
    rng = random.Random(len(pieces))
    sources = [BytesSource(rng.randbytes(150)) for _ in range(2)]
    memory, expected = PieceMemory(), b""
    for gap, number, place, length in pieces:
        expected += bytes(gap)
        memory.add(len(expected), sources[number], place, length)
        expected += sources[number].data[place : place + length]
    memory.pad(len(expected) + 10)
    expected += bytes(10)
    assert memory.size == len(expected)
    assert memory.read_at(0, len(expected) + 5) == expected
    for _ in range(20):
        offset, length = rng.randrange(len(expected)), rng.randrange(100)
        assert memory.read_at(offset, length) == expected[offset : offset + length]
        data_at = memory.next_data(offset)
        assert offset <= data_at <= len(expected)
        assert not any(expected[offset:data_at])


def test_holes_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"here")
    with Workspace(tmp_path) as workspace:
        source = workspace.file(path)
        memory = PieceMemory()
        memory.add(1 << 30, source, 1 << 20, 1 << 39)
        assert memory.next_data(0) == (1 << 30) + (1 << 39) - (1 << 20)
        assert memory.next_data((1 << 30) + (1 << 39)) == memory.size
        native = NativeRecorder(workspace)
        record_file(native.builder, source, [PageRun(1 << 39, 0, 1)])
        template = native.finish(BytesSource(b""), BytesSource(b""))
        assert template.size == 1 << 40
        assert template.literals.size < 1 << 20
        assert template.entries.size < 1 << 12
        reader = NativeReader(template, BytesSource(b"here".ljust(PAGE_SIZE, b"\0")))
        assert reader.read_at((1 << 39) - 10, 20) == bytes(10) + b"here" + bytes(6)
        assert reader.read_at((1 << 40) - 10, 20) == bytes(10)


def test_only_whole_pages_are_pages() -> None:
    assert list(page_runs([(100, PAGE_SIZE, 0), (9000, PAGE_SIZE, 7), (20_000, 3 * PAGE_SIZE - 1, 4 * PAGE_SIZE)])) == [
        PageRun(100, 0, 1),
        PageRun(20_000, 4, 2),
    ]
    assert list(page_runs([(0, 2 * PAGE_SIZE, PAGE_SIZE - 1)])) == [PageRun(1, 1, 1)]


def test_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("z", "a/b/c", "a/d"):
        (tmp_path / name).touch()
    assert list(map(str, regular_files(tmp_path))) == ["a/b/c", "a/d", "z"]
    assert list(map(str, regular_files(tmp_path, without="a"))) == ["z"]
    (tmp_path / "a/link").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match=r"a/link is a symbolic link: put what it leads to in its place"):
        regular_files(tmp_path)
    (tmp_path / "a/link").unlink()
    (tmp_path / "a/link").symlink_to("/etc")
    with pytest.raises(UsageError, match="is a symbolic link"):
        regular_files(tmp_path)
    (tmp_path / "a/link").unlink()
    (tmp_path / "a" / "\udcff").touch()
    with pytest.raises(UsageError, match="the name is not UTF-8"):
        regular_files(tmp_path)


def test_names_of_files_from_several_places() -> None:
    assert file_names([Path("a/state"), Path("b/mem")]) == ["state", "mem"]
    assert file_names([Path("state"), Path("base/mem"), Path("diff/mem")]) == ["0-state", "1-mem", "2-mem"]
