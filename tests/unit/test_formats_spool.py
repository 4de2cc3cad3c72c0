"""Spools and files that are read while an image is split."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagefs.errors import NoSpaceError, UnsupportedInputError, UsageError
from imagefs.formats.spool import IOV_MAX, FileSource, Spool
from imagefs.image.geometry import PAGE_SIZE


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path)
    yield spool
    spool.close()


WRITES = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 20_000), st.binary(max_size=50)),
    st.tuples(st.just("append"), st.just(0), st.binary(max_size=50)),
    st.tuples(st.just("punch"), st.integers(0, 20_000), st.integers(0, 9000).map(bytes)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WRITES, max_size=20), st.integers(0, 21_000))
def test_like_a_bytearray(tmp_path: Path, steps: list[tuple[str, int, bytes]], probe: int) -> None:
    spool = Spool(tmp_path)
    model = bytearray()
    try:
        for kind, offset, data in steps:
            if kind == "append":
                offset = len(model)
                spool.append(data)
            elif kind == "write" and data:
                spool.write_at(offset, data)
            elif kind == "punch":
                spool.punch(offset, len(data))
                data = data[: max(0, len(model) - offset)]
            if data:
                model.extend(bytes(max(0, offset + len(data) - len(model))))
                model[offset : offset + len(data)] = data
        assert spool.size == len(model)
        assert spool.read_at(0, len(model) + 10) == model
        assert spool.read_at(probe, 100) == model[probe : probe + 100]
        found = spool.next_data(probe)
        assert min(probe, len(model)) <= found <= max(len(model), probe)
        assert not any(model[probe:found])
    finally:
        spool.close()


def test_holes_stay_holes(spool: Spool) -> None:
    spool.resize(1 << 40)
    spool.write_at(1 << 39, b"x")
    assert spool.size == 1 << 40
    assert (1 << 39) - 65536 <= spool.next_data(0) <= 1 << 39
    assert spool.next_data((1 << 39) + 65536) == 1 << 40
    spool.punch(0, 1 << 40)
    assert spool.read_at(1 << 39, 1) == b"\0"


def test_more_pieces_than_one_system_call_takes(spool: Spool) -> None:
    pieces = [index.to_bytes(4, "big") for index in range(2 * IOV_MAX + 5)]
    spool.write_all_at(3, pieces)
    assert spool.read_at(3, spool.size) == b"".join(pieces)


def test_only_for_the_owner_and_without_a_name(spool: Spool, tmp_path: Path) -> None:
    spool.write_at(0, b"secret")
    assert list(tmp_path.iterdir()) == []
    opened = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/"):
                opened.append(os.fstat(fd))
    (status,) = opened
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0


def test_filesystem_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what such a filesystem makes of the flag: EISDIR
    test_only_for_the_owner_and_without_a_name(unnamed := Spool(tmp_path), tmp_path)
    unnamed.close()


def test_reading_from_several_threads(spool: Spool) -> None:
    data = os.urandom(1 << 20)
    spool.append(data)
    assert spool.read_at(0, 1) == data[:1]
    wrong = []

    def read() -> None:
        for at in range(0, len(data), PAGE_SIZE):
            if spool.read_at(at, PAGE_SIZE) != data[at : at + PAGE_SIZE]:
                wrong.append(at)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent: cannot keep temporary files here"):
        Spool(tmp_path / "absent")


FULL_DISK = """
import sys
from pathlib import Path
from imagefs.errors import NoSpaceError
from imagefs.formats.spool import Spool
for write in (lambda s: s.write_at(0, bytes(8 << 20)), lambda s: [s.append(bytes(1 << 20)) for _ in range(8)],
              lambda s: s.write_all_at(4096, [b"x" * 4096] * 2000)):
    spool = Spool(Path(sys.argv[1]))
    try:
        write(spool)
    except NoSpaceError as error:
        print(error)
    spool.close()
"""


def test_full_disk(tmp_path: Path) -> None:
    """A real full filesystem, in a mount namespace of its own, so that nothing needs to be cleaned up."""
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, "sh", str(tmp_path), sys.executable, FULL_DISK],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{tmp_path}: no space left for a temporary copy of the guest's pages"] * 3


def test_short_write_says_why(spool: Spool) -> None:
    """The write that reaches a limit comes back short; the next one has the reason."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(UsageError, match="File too large"):
            spool.write_all_at(0, [b"x" * 4096] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_quota_is_no_space_either(spool: Spool) -> None:
    assert isinstance(spool._failure(OSError(errno.EDQUOT, "Quota exceeded")), NoSpaceError)


def test_file_source(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"abc")
    source = FileSource.open(path)
    try:
        assert source.size == 1 << 30
        assert source.read_at(1 << 29, 5) == b"abc\0\0"
        assert source.read_at((1 << 30) - 2, 5) == b"\0\0"
        assert source.read_at(1 << 30, 5) == b""
        assert (1 << 29) - 65536 <= source.next_data(5) <= 1 << 29
        assert source.next_data(1 << 30) == 1 << 30
        buffers = [bytearray(2), bytearray(1)]
        source.scatter_at((1 << 29) + 1, buffers)
        assert buffers == [b"bc", b"\0"]
    finally:
        source.close()


@pytest.mark.parametrize("change", ["shorter", "longer", "touched"])
def test_file_that_changes(tmp_path: Path, change: str) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(20_000))
    source = FileSource.open(path)
    try:
        source.read_at(0, 5)
        if change == "touched":
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, 10_000 if change == "shorter" else 30_000)
        with pytest.raises(UnsupportedInputError, match=r"ram changed while it was being read.* at offset 0x1000"):
            source.read_at(4096, 5)
        with pytest.raises(UnsupportedInputError, match="changed while it was being read"):
            source.scatter_at(15_000, [bytearray(10)])
    finally:
        source.close()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(UsageError, match="not a regular file"):
            FileSource.open(path)
    with pytest.raises(UsageError, match="No such file"):
        FileSource.open(tmp_path / "absent")
