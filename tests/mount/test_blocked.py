"""Reads that wait: they hold up nobody else, and however the mount ends, they end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from imagefs.image.geometry import PAGE_SIZE
from imagefs.mount import kernel
from tests.mount.conftest import Mounted, Mounter, abort, wait_until
from tests.mount.fakes import WINDOW, WINDOW_PAGES, page_bytes

READERS = 150
FIRST_HELD = 100

MANY = f"""
import os, sys, threading
errors = []
def read(window):
    fd = os.open('memory', os.O_RDONLY)
    # No readahead: each read is for the one window.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        data = os.pread(fd, 4096, window * {WINDOW})
        assert b'page' in data or data == bytes(4096)
    except OSError as error:
        errors.append(error.errno)
threads = [threading.Thread(target=read, args=(w,)) for w in range({FIRST_HELD}, {FIRST_HELD + READERS})]
for t in threads: t.start()
for t in threads: t.join()
print(*errors)
"""
"""150 blocked readers in one process, each of a page of its own."""

GONE = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED}


def start_readers(mounted: Mounted) -> subprocess.Popen[str]:
    mounted.control.hold(FIRST_HELD, READERS)
    readers = mounted.start(MANY)
    wait_until(lambda: mounted.waiting() == READERS, f"{READERS} reads wait")
    return readers


def errors_of(readers: subprocess.Popen[str]) -> list[int]:
    out, err = readers.communicate(timeout=20)
    assert readers.returncode == 0, err
    return [int(word) for word in out.split()]


def test_blocked_readers_hold_up_nobody(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    readers = start_readers(mounted)
    # Everything else works: names, other pages of the same file, mapped and read, other files, control files.
    assert len(os.listdir(mounted.path / "pages/0x00001")) == 4096
    with open(mounted.path / "memory", "rb", buffering=0) as memory:
        for page in range(1, 1000, 77):
            assert os.pread(memory.fileno(), PAGE_SIZE, page * PAGE_SIZE) == page_bytes(page)
    assert mounted.run("cmp", "-n", str(WINDOW * 50), "memory", "memory") == ""
    assert (mounted.path / "pages/0x00000/0x0000003").read_bytes() == page_bytes(3)
    assert mounted.waiting() == READERS
    mounted.control.release(FIRST_HELD, READERS)
    assert errors_of(readers) == []


def test_one_waits_for_what_another_has_asked_for(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(3)
    name = f"pages/0x00000/0x{3 * WINDOW_PAGES + 1:07x}"
    readers = [mounted.start(f"print(open('{name}', 'rb').read() != b'')") for _ in range(3)]
    wait_until(lambda: mounted.waiting() >= 1, "they wait")
    mounted.control.release(3)
    assert [reader.communicate(timeout=20)[0] for reader in readers] == ["True\n"] * 3


def test_mapped_page_that_arrives(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(4)
    program = f"""
import mmap
with open('memory', 'r+b') as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory:
    print(memory[{4 * WINDOW + PAGE_SIZE}:][:14].decode())
"""
    reader = mounted.start(program)
    wait_until(lambda: mounted.waiting() >= 1, "the fault waits")
    mounted.control.release(4)
    assert reader.communicate(timeout=20)[0] == f"page {4 * WINDOW_PAGES + 1:07d} s\n"[:14] + "\n"


def test_killed_reader_of_memory_frees_its_place(fake_mount: Mounter) -> None:
    """Whether or not the kernel lets it go at once, nothing of it is left when its page has come."""
    mounted = fake_mount()
    mounted.control.hold(5)
    reader = mounted.start(f"import os; os.pread(os.open('memory', 0), 1, {5 * WINDOW})")
    wait_until(lambda: mounted.waiting() >= 1, "it waits")
    reader.kill()
    mounted.control.release(5)
    reader.wait(20)
    wait_until(lambda: mounted.waiting() == 0, "nothing waits")


def by_sigterm(mounted: Mounted) -> None:
    os.kill(mounted.pid, signal.SIGTERM)


def by_two_signals(mounted: Mounted) -> None:
    os.kill(mounted.pid, signal.SIGTERM)
    os.kill(mounted.pid, signal.SIGTERM)
    os.kill(mounted.pid, signal.SIGINT)


def by_umount(mounted: Mounted) -> None:
    # The mount is busy, so umount may complain; the connection is cut all the same, and the daemon detaches it.
    subprocess.run(["umount", "-f", mounted.path], capture_output=True, timeout=20, check=False)


def by_abort(mounted: Mounted) -> None:
    mount = kernel.topmost(str(mounted.path))
    assert mount is not None
    abort(mount)


@pytest.mark.parametrize("end", [by_sigterm, by_two_signals, by_umount, by_abort])
def test_end_with_blocked_readers(fake_mount: Mounter, end: Callable[[Mounted], None]) -> None:
    mounted = fake_mount()
    readers = start_readers(mounted)
    end(mounted)
    errors = errors_of(readers)
    assert len(errors) == READERS
    assert set(errors) <= GONE
    mounted.wait_until_gone()
    assert os.listdir(mounted.path) == []
    assert "ERROR" not in mounted.log.read_text()


def test_daemon_killed_with_blocked_readers(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    readers = start_readers(mounted)
    os.kill(mounted.pid, signal.SIGKILL)
    assert set(errors_of(readers)) <= GONE
    wait_until(lambda: not mounted.is_alive(), "it is dead")
    # What is left is a mount without a daemon. Whoever looks is told.
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(mounted.path)


def test_mapped_memory_when_the_daemon_dies(fake_mount: Mounter) -> None:
    """SIGBUS, not zeros."""
    mounted = fake_mount()
    mounted.control.hold(6)
    program = f"""
import mmap
with open('memory', 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
    print(memory[{6 * WINDOW}])
"""
    reader = mounted.start(program)
    wait_until(lambda: mounted.waiting() >= 1, "the fault waits")
    os.kill(mounted.pid, signal.SIGTERM)
    assert reader.wait(20) == -signal.SIGBUS
    mounted.wait_until_gone()


def test_soft_mount(fake_mount: Mounter) -> None:
    mounted = fake_mount("soft,timeo=0.2")
    mounted.control.hold(2)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted.path / "pages/0x00000/0x0000021").read_bytes()
    assert "read of page 33: " in mounted.log.read_text()
    # The error is not remembered.
    mounted.control.release(2)
    assert (mounted.path / "pages/0x00000/0x0000021").read_bytes() == page_bytes(33)


@pytest.mark.parametrize("kind", ["corrupt", "missing"])
def test_page_that_cannot_be_had(fake_mount: Mounter, kind: str) -> None:
    mounted = fake_mount()
    mounted.control.fail(7, kind)
    page = 7 * WINDOW_PAGES + 3
    with open(mounted.path / "memory", "rb", buffering=0) as memory:
        os.posix_fadvise(memory.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(3):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.pread(memory.fileno(), PAGE_SIZE, page * PAGE_SIZE)
        lines = [line for line in mounted.log.read_text().splitlines() if "WARNING" in line]
        # Page, key and origin; once, however often it is tried.
        assert len(lines) == 1
        assert f"(page {page}): http://store: objects/window-7: " in lines[0]
        assert mounted.status()["mount"]["errors"]["read"] >= 3
        mounted.control.heal(7)
        assert os.pread(memory.fileno(), PAGE_SIZE, page * PAGE_SIZE) == page_bytes(page)


def test_mistake_in_the_program(fake_mount: Mounter) -> None:
    """The reader gets EIO, the log gets the traceback, and the mount goes on."""
    mounted = fake_mount()
    mounted.control.fail(7, "bug")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted.path / f"pages/0x00000/0x{7 * WINDOW_PAGES + 1:07x}").read_bytes()
    log = mounted.log.read_text()
    assert "internal error: RuntimeError: a mistake in a program" in log
    assert "Traceback" in log
    assert (mounted.path / "pages/0x00000/0x0000003").read_bytes() == page_bytes(3)


def test_native_that_waits_and_fails(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(0, 3)
    reader = mounted.start("print(len(open('native', 'rb').read(300000)))")
    wait_until(lambda: mounted.waiting() >= 1, "it waits")
    mounted.control.release(0, 3)
    assert reader.communicate(timeout=20)[0] == "300000\n"
    mounted.control.fail(20, "corrupt")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mounted.path / "native").read_bytes()


def test_request_that_is_withdrawn(fake_mount: Mounter, tmp_path: Path) -> None:
    """A process killed after its request was announced, before it was read: the loop must not read on for ever.

    Whether it comes to that in one round is a coin's throw.
    """
    mounted = fake_mount()
    first, second = tmp_path / "first", tmp_path / "second"
    for number in range(8):
        mounted.control.stall(first)
        wait_until(first.exists, "the loop stands still")
        victim = mounted.start(f"import os; os.stat('pages/0x00001/0x0001{number:03x}')")
        wait_until(partial(in_kernel, victim.pid), "its request is there")
        mounted.control.stall(second)
        first.unlink()
        wait_until(second.exists, "the loop has seen both, and stands still again")
        victim.kill()
        victim.wait(20)
        second.unlink()
        # Answered by the loop alone, without a request that would bring it out of its read.
        mounted.control.trace()


def in_kernel(pid: int) -> bool:
    """Whether a process waits for the answer to a request."""
    with open(f"/proc/{pid}/wchan") as file:
        return file.read() == "request_wait_answer"
