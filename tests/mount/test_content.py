"""What a mount shows, read with ordinary tools."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from imagefs.image.geometry import PAGE_SIZE
from tests.mount.conftest import Mounter
from tests.mount.fakes import (
    DOCUMENT,
    GEOMETRY,
    STATE_BYTES,
    ZERO_EVERY,
    memory_bytes,
    native_bytes,
    page_bytes,
)

FIRST_OF_MAIN = 160
"""Page number of the first page above the hole: pfn 0x100."""


def test_files_and_modes(fake_mount: Mounter) -> None:
    path = fake_mount().path
    assert sorted(os.listdir(path)) == [
        *(".imagefs", "config", "memory", "metadata.json", "native", "pages", "state"),
    ]
    assert sorted(os.listdir(path / ".imagefs")) == ["arrivals", "present", "status.json", "trace"]
    # A name that would lead out of the mount is not shown.
    assert sorted(os.listdir(path / "config")) == ["command line", "domain.xml"]
    assert sorted(os.listdir(path / "pages")) == ["0x00000", "0x00001", "0x00100"]
    for directory, _, files in os.walk(path):
        assert stat.filemode(os.stat(directory).st_mode) == "dr-x------", directory
        for name in files:
            file = Path(directory, name)
            writable = file in (path / "memory", path / ".imagefs/trace")
            assert stat.filemode(file.stat().st_mode) == ("-rw-------" if writable else "-r--------"), file
            assert file.stat().st_uid == os.geteuid()
    assert (path / "memory").stat().st_size == GEOMETRY.size
    assert (path / "memory").stat().st_blocks == GEOMETRY.size // 512
    assert (path / "native").stat().st_size == len(native_bytes())


def test_contents(fake_mount: Mounter) -> None:
    path = fake_mount().path
    assert (path / "memory").read_bytes() == memory_bytes()
    assert (path / "state").read_bytes() == STATE_BYTES
    assert (path / "native").read_bytes() == native_bytes()
    assert (path / "config/domain.xml").read_bytes() == b"<domain/>\n"
    assert json.loads((path / "metadata.json").read_text()) == DOCUMENT
    assert (path / "pages/0x00000/0x0000003").read_bytes() == page_bytes(3)
    assert (path / "pages/0x00000/0x0000100").read_bytes() == page_bytes(FIRST_OF_MAIN)
    assert (path / "pages/0x00001/0x0001fff").read_bytes() == page_bytes(FIRST_OF_MAIN + 0x1EFF)
    assert (path / "pages/0x00100/0x0100001").read_bytes() == page_bytes(FIRST_OF_MAIN + 31 * 256 + 1)
    assert (path / ".imagefs/present").read_bytes() == b"\xff" * (GEOMETRY.pages // 8)


@pytest.mark.parametrize(
    "name",
    [
        *("pages/0x00000/0x00000a0", "pages/0x00000/0x00000ff", "pages/0x00002", "pages/0x00001/0x0000003"),
        *("pages/0x0", "pages/0x00000/0x3", "pages/0x00000/0x0000003 ", "pages/0x00000/0x000000F", "pages/0X00000"),
        *("pages/0x000000", "pages/0x00000/0x00000003", "pages/0x00100/0x0100100", "pages/0xffffffffffff"),
        *("config/escape", "config/..%2fescape", "memory2", ".imagefs/x", "memory/x"),
    ],
)
def test_names_that_do_not_exist(fake_mount: Mounter, name: str) -> None:
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        os.stat(fake_mount().path / name)


def test_native_at_random_places(fake_mount: Mounter, rng: random.Random) -> None:
    expected = native_bytes()
    with open(fake_mount().path / "native", "rb", buffering=0) as file:
        for _ in range(200):
            offset = rng.randrange(len(expected))
            length = min(rng.choice((1, 12, 4096, 5000, 100_000)), len(expected) - offset)
            assert os.pread(file.fileno(), length, offset) == expected[offset : offset + length]


def test_extended_attributes(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(0)
    frames = mounted.path / "pages/0x00000"

    def attributes(name: str) -> dict[str, bytes]:
        return {key: os.getxattr(frames / name, key) for key in os.listxattr(frames / name)}

    digest = {"user.imagefs.digest": b"blake3:%064x" % 1}
    assert attributes("0x0000001") == {"user.imagefs.state": b"remote", "user.imagefs.kind": b"pml4", **digest}
    assert attributes("0x0000000") == {"user.imagefs.state": b"zero", "user.imagefs.kind": b"ram"}
    assert attributes("0x0000010")["user.imagefs.state"] == b"present"
    assert os.listxattr(mounted.path / "memory") == []
    for path, name in ((frames / "0x0000000", "user.imagefs.digest"), (mounted.path / "memory", "user.imagefs.state")):
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(path, name)
    out = mounted.run("getfattr", "-d", "pages/0x00000/0x0000001")
    assert 'user.imagefs.kind="pml4"' in out
    # Asking is not reading.
    assert [read for read in mounted.control.reads() if read[0] == "memory"] == []


def test_tools(fake_mount: Mounter, tmp_path: Path) -> None:
    mounted = fake_mount()
    run = mounted.run
    pages = GEOMETRY.pages
    assert run("find", "pages", "-type", "f").count("\n") == pages
    assert run("ls", "-R", "pages").count("\n0x0") > pages
    assert run("ls", "-la", "pages/0x00001").count("\n") == 1 + 2 + 4096
    assert int(run("du", "-sk", "pages").split()[0]) == pages * 4
    zero = len(range(0, 160, ZERO_EVERY))
    with_text = run("grep", "-c", "hello", "-r", "pages/0x00000", "--include=0x00000[0-9]?")
    assert sum(line.endswith(":0") for line in with_text.splitlines()) == zero
    assert run("hexdump", "-C", "-n", "5", "pages/0x00000/0x0000001").startswith("00000000  70 61 67 65 20")
    (tmp_path / "copy").write_bytes(memory_bytes())
    run("cmp", "memory", str(tmp_path / "copy"))
    assert run("sha256sum", "native").split()[0] == hashlib.sha256(native_bytes()).hexdigest()
    run("cp", "-r", "pages/0x00100", "state", "native", str(tmp_path))
    assert (tmp_path / "0x00100/0x0100001").read_bytes() == page_bytes(FIRST_OF_MAIN + 31 * 256 + 1)
    assert (tmp_path / "native").read_bytes() == native_bytes()
    run("tar", "cf", str(tmp_path / "tar"), "pages", "config", "metadata.json")
    with tarfile.open(tmp_path / "tar") as archive:
        members = archive.getmembers()
        assert sum(member.isfile() for member in members) == pages + 3
        extracted = archive.extractfile("pages/0x00001/0x0001000")
        assert extracted is not None
        assert extracted.read() == page_bytes(0x1000 - 96)
    run("dd", "if=memory", f"of={tmp_path / 'dd'}", "bs=1M", "iflag=direct", "status=none")
    assert (tmp_path / "dd").read_bytes() == memory_bytes()
    assert run("df", "--output=fstype,size", ".").split()[-2:] == ["fuse.imagefs", str(pages * 4)]
    assert run("grep", "-c", "pages", ".imagefs/status.json") != "0\n"


def test_nothing_can_be_changed(fake_mount: Mounter) -> None:
    path = fake_mount().path
    memory = path / "memory"
    attempts: tuple[Callable[[], object], ...] = (
        lambda: os.mkdir(path / "new"),
        lambda: os.mknod(path / "new"),
        lambda: os.symlink("x", path / "new"),
        lambda: os.link(memory, path / "new"),
        lambda: os.rename(memory, path / "new"),
        lambda: os.unlink(memory),
        lambda: os.rmdir(path / "config"),
        lambda: os.truncate(memory, 4096),
        lambda: os.chmod(memory, 0o644),
        lambda: os.chown(memory, 1000, 1000),
        lambda: os.utime(memory),
        lambda: os.setxattr(memory, "user.imagefs.state", b"zero"),
        lambda: os.removexattr(path / "pages/0x00000/0x0000001", "user.imagefs.state"),
        lambda: os.open(path / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.open(path / "state", os.O_RDWR),
        lambda: os.open(memory, os.O_WRONLY),
        lambda: os.open(memory, os.O_RDWR | os.O_TRUNC),
        lambda: os.open(path / "pages/0x00000/0x0000001", os.O_RDWR),
        lambda: os.open(path / ".imagefs/status.json", os.O_RDWR),
    )
    outcomes = []
    for attempt in attempts:
        try:
            outcomes.append(attempt())
        except OSError as error:
            outcomes.append(errno.errorcode[error.errno or 0])
    assert outcomes == ["EROFS"] * len(attempts)


def test_memory_opened_for_writing(fake_mount: Mounter) -> None:
    """As QEMU does with share=off: what the guest writes stays the guest's."""
    path = fake_mount().path
    descriptor = os.open(path / "memory", os.O_RDWR)
    other = os.open(path / "memory", os.O_RDONLY)
    try:
        with (
            mmap.mmap(descriptor, GEOMETRY.size, flags=mmap.MAP_PRIVATE) as guest,
            mmap.mmap(other, GEOMETRY.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as reader,
        ):
            assert guest[PAGE_SIZE : 2 * PAGE_SIZE] == page_bytes(1)
            guest[PAGE_SIZE : PAGE_SIZE + 5] = b"guest"
            assert guest[PAGE_SIZE : 2 * PAGE_SIZE] == b"guest" + page_bytes(1)[5:]
            assert reader[PAGE_SIZE : 2 * PAGE_SIZE] == page_bytes(1)
            with pytest.raises(OSError, match="Read-only"):
                os.pwrite(descriptor, b"written", PAGE_SIZE)
            # Not even for a moment may others see it, nor by the way of a shared mapping.
            assert reader[PAGE_SIZE : 2 * PAGE_SIZE] == page_bytes(1)
            with pytest.raises(OSError, match="No such device"):
                mmap.mmap(descriptor, GEOMETRY.size, flags=mmap.MAP_SHARED)
            assert os.pread(descriptor, PAGE_SIZE, PAGE_SIZE) == page_bytes(1)
        # A VMM may set its RAM file to the size that it has.
        os.ftruncate(descriptor, GEOMETRY.size)
        with pytest.raises(OSError, match="Read-only"):
            os.ftruncate(descriptor, GEOMETRY.size + PAGE_SIZE)
    finally:
        os.close(descriptor)
        os.close(other)


def test_pages_are_kept_by_the_kernel(fake_mount: Mounter) -> None:
    """A page that was read once is not asked for again, by whichever open."""
    mounted = fake_mount()
    for _ in range(2):
        (mounted.path / "state").read_bytes()
        (mounted.path / "pages/0x00000/0x0000001").read_bytes()
    reads = mounted.control.reads()
    assert sum(length for stream, _, length in reads if stream == "state") == len(STATE_BYTES)
    assert [read for read in reads if read[0] == "memory"] == [("memory", PAGE_SIZE, PAGE_SIZE)]


def test_native_is_read_in_large_pieces(fake_mount: Mounter) -> None:
    """Pages that follow each other in memory are one read, though the file has headers between them."""
    mounted = fake_mount()
    with open(mounted.path / "native", "rb", buffering=0) as file:
        os.pread(file.fileno(), 400_000, 0)
        mounted.control.reads()
        os.pread(file.fileno(), 1 << 20, 1 << 20)
    reads = mounted.control.reads()
    longest = max(length for stream, _, length in reads if stream == "memory")
    assert longest >= PAGE_SIZE
    # Blocks of the template are read once each, not once per request.
    entries = [read for read in reads if read[0] == "native-entries"]
    assert len(entries) == len(set(entries))
