"""Flat memory, and how a format is chosen."""

from __future__ import annotations

import io
import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import format_names, open_capture
from imagefs.formats.spool import FileSource, Spool
from imagefs.image.geometry import PAGE_SIZE, Region
from imagefs.image.native_reader import NativeReader
from tests.unit.captures import memory_of


@pytest.mark.parametrize("rest", [0, 1, 4095])
@pytest.mark.parametrize("pages", [0, 1, 40])
@pytest.mark.parametrize("piped", [False, True])
def test_raw(tmp_path: Path, pages: int, rest: int, piped: bool) -> None:
    data = memory_of(pages, seed=3) + b"\1" * rest
    path = tmp_path / "memory"
    path.write_bytes(data)
    source = io.BytesIO(data) if piped else path
    if not data:
        with (
            pytest.raises(UnsupportedInputError, match="is empty"),
            open_capture(source, spool_dir=tmp_path, format="raw"),
        ):
            pass
        return
    whole = (len(data) + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
    with open_capture(source, spool_dir=tmp_path, format="raw") as capture:
        assert capture.source_format == "raw"
        assert capture.geometry.regions == (Region("ram", 0, whole, 0),)
        assert capture.memory.size == whole
        assert bytes(capture.memory.read_at(0, whole + 5)) == data.ljust(whole, b"\0")
        if rest:
            assert bytes(capture.memory.read_at(whole - PAGE_SIZE, 10_000)) == data[-rest:].ljust(PAGE_SIZE, b"\0")
            assert capture.memory.next_data(whole - 1) in (whole - 1, whole)
        assert capture.native.entries.size == 40 * (bool(pages) + bool(rest))
        assert NativeReader(capture.native, capture.memory).read_at(0, whole) == data
        assert capture.state.size == 0
        assert capture.restore == {}


def test_sparse_file_is_read_in_place(tmp_path: Path) -> None:
    """1 TiB of nothing costs nothing."""
    path = tmp_path / "memory"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"here")
    with open_capture(path, spool_dir=tmp_path, format="raw") as capture:
        assert isinstance(capture.memory, FileSource)
        assert capture.memory.next_data(0) == 1 << 39
        assert capture.memory.next_data((1 << 39) + PAGE_SIZE) == 1 << 40
        assert capture.native.size == 1 << 40


def test_pipe_keeps_holes(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    data = bytes(32 << 20) + b"x" * PAGE_SIZE + bytes(16 << 20)
    writer = threading.Thread(target=fifo.write_bytes, args=(data,))
    writer.start()
    try:
        with open_capture(fifo, spool_dir=tmp_path, format="raw") as capture:
            assert isinstance(capture.memory, Spool)
            assert capture.memory.next_data(0) == 32 << 20
            assert capture.memory.next_data((32 << 20) + (64 << 10)) == len(data)
            assert capture.memory.read_at(0, len(data)) == data
    finally:
        writer.join()


def test_pipe_that_does_not_block(tmp_path: Path) -> None:
    """Whoever shares a pipe with us can make it non-blocking; that nothing is there yet is not its end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    asked = threading.Event()

    class Watched(io.FileIO):
        def readinto(self, buffer: memoryview, /) -> int | None:  # type: ignore[override]
            count = super().readinto(buffer)
            if count is None:
                asked.set()
            return count

    def feed() -> None:
        assert asked.wait(60)
        with open(writer, "wb", buffering=0) as pipe:
            pipe.write(b"x" * PAGE_SIZE)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with Watched(reader) as source, open_capture(cast(BinaryIO, source), spool_dir=tmp_path, format="raw") as capture:
        assert capture.memory.read_at(0, 10_000) == b"x" * PAGE_SIZE
    feeder.join()


def test_raw_is_the_memory_already(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE_SIZE))
    with (
        pytest.raises(UsageError, match="--memory"),
        open_capture(path, spool_dir=tmp_path, format="raw", memory_files=[path]),
    ):
        pass


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    """Pages alone are no proof of raw memory: the user says so, or it is refused with what was seen."""
    path = tmp_path / "save"
    path.write_bytes(b"\x7fELF\2\1\1\0" + bytes(2 * PAGE_SIZE - 8))
    with pytest.raises(UnsupportedInputError) as caught, open_capture(path, spool_dir=tmp_path):
        pass
    text = str(caught.value)
    assert "7f454c4602010100" in text
    assert "8,192 bytes" in text
    assert f"--format ({', '.join(format_names())})" in text
    with (
        pytest.raises(UnsupportedInputError, match=r"it begins with 6162; say"),
        open_capture(io.BytesIO(b"ab"), spool_dir=tmp_path),
    ):
        pass
    with pytest.raises(UnsupportedInputError, match="is empty"), open_capture(io.BytesIO(), spool_dir=tmp_path):
        pass


def test_names(tmp_path: Path) -> None:
    assert {"qemu-migration", "raw"} < set(format_names())
    path = tmp_path / "save"
    path.write_bytes(bytes(PAGE_SIZE))
    with (
        pytest.raises(UsageError, match=r"--format vmdk: unknown; known are .*qemu-migration, .*raw"),
        open_capture(path, spool_dir=tmp_path, format="vmdk"),
    ):
        pass
    with (
        pytest.raises(UnsupportedInputError, match=r"magic: 00000000 is not 5145564d.* at offset 0x0"),
        open_capture(path, spool_dir=tmp_path, format="qemu-migration"),
    ):
        pass


def test_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent: No such file"), open_capture(tmp_path / "absent", spool_dir=tmp_path):
        pass


@pytest.mark.parametrize("name", ["closed", "closed/inside"])
def test_what_may_not_be_opened(name: str) -> None:
    """By somebody else than root, whom modes do not stop."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        (Path(directory) / "closed").mkdir(mode=0)
        user = os.geteuid()
        os.seteuid(65534)
        try:
            with (
                pytest.raises(UsageError, match=f"{name}: Permission denied"),
                open_capture(Path(directory) / name, spool_dir=Path(directory)),
            ):
                pass
        finally:
            os.seteuid(user)


def test_a_directory_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    with (
        pytest.raises(UnsupportedInputError, match="it is an empty directory; say which with --format"),
        open_capture(tmp_path / "saved", spool_dir=tmp_path),
    ):
        pass
    (tmp_path / "saved" / "a\nfile").touch()
    with (
        pytest.raises(UnsupportedInputError, match=r"it is a directory with 'a\\nfile';"),
        open_capture(tmp_path / "saved", spool_dir=tmp_path),
    ):
        pass
    with (
        pytest.raises(UsageError, match="is a directory"),
        open_capture(tmp_path / "saved", spool_dir=tmp_path, format="raw"),
    ):
        pass
