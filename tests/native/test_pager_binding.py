"""imagefs.pager: the typed binding over a real userfaultfd of a process that fills its memory through it."""

from __future__ import annotations

import array
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagefs import native
from imagefs.pager import Pager, PagerCache, PagerError, PagerRegion, Status, new_state, state_statistics

PAGE = 4096
PAGES = 64

# Plays the VMM: registers anonymous memory, hands it over, then writes what it finds there to its standard output.
VMM = """
import array, ctypes, fcntl, mmap, os, socket, struct, sys
libc = ctypes.CDLL(None)
through = socket.socket(fileno=int(sys.argv[1]))
size = int(sys.argv[2])
uffd = libc.syscall(323, os.O_CLOEXEC)
libc.mmap.restype = ctypes.c_void_p
address = libc.mmap(None, ctypes.c_size_t(size), 3, 0x22, -1, 0)
fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", address, size, 1, 0)))
through.sendmsg([struct.pack("Q", address)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
through.recv(1)
# By a system call, which touches the memory without the GIL being anybody's business.
libc.write(1, ctypes.c_void_p(address), ctypes.c_size_t(size))
"""


@dataclass(frozen=True)
class Vmm:
    process: subprocess.Popen[bytes]
    uffd: int
    region: PagerRegion
    through: socket.socket

    def read(self) -> bytes:
        self.through.send(b"g")
        return self.process.communicate(timeout=30)[0]


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            command = [sys.executable, "-c", VMM, str(theirs.fileno()), str(PAGES * PAGE)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()])
        stack.enter_context(process)
        stack.callback(process.kill)
        data, ancillary, _, _ = ours.recvmsg(8, socket.CMSG_SPACE(4))
        fds = array.array("i", ancillary[0][2])
        stack.callback(os.close, fds[0])
        yield Vmm(process, fds[0], PagerRegion(int.from_bytes(data, "little"), PAGES * PAGE, 0), ours)


@pytest.fixture
def state() -> Iterator[int]:
    fd = new_state(PAGES)
    yield fd
    os.close(fd)


@pytest.fixture
def image() -> bytes:
    return b"".join(bytes(PAGE) if page % 4 == 0 else os.urandom(PAGE) for page in range(PAGES))


def test_from_memory(vmm: Vmm, state: int, image: bytes, tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(image)
    trace = tmp_path / "trace"
    with (tmp_path / "memory").open("rb") as memory, trace.open("wb") as lines:
        assert state_statistics(state) is None
        with Pager(
            vmm.uffd, [vmm.region], memory.fileno(), pages=PAGES, state_fd=state, trace_fd=lines.fileno()
        ) as pager:
            pager.start()
            assert vmm.read() == image
            assert (pager.status, pager.error) == (Status.RUNNING, None)
            pager.stop()
            assert pager.wait() is Status.STOPPED
            counted = pager.statistics()
            assert (counted.copied_pages, counted.zero_pages) == (PAGES - PAGES // 4, PAGES // 4)
            assert counted.from_memory == counted.touched > 0
            assert counted.from_cache == counted.ahead_pages == 0
        assert state_statistics(state) == counted
    fields = [line.split() for line in trace.read_text().splitlines()]
    assert len(fields) == counted.touched
    assert all(float(a) >= 0 and 0 <= int(b) < PAGES and (c, d) == ("1", "pager") for a, b, c, d in fields)


def test_arrivals_from_the_cache(vmm: Vmm, state: int, image: bytes, tmp_path: Path) -> None:
    """All of it comes ahead of touches: the first half was here, the second arrives. ``memory`` cannot be read."""
    (tmp_path / "pages").write_bytes(image)
    (tmp_path / "present").write_bytes(b"\xff" * (PAGES // 16) + bytes(PAGES // 16))
    arrivals, arrived = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, arrivals)
        pages = stack.enter_context((tmp_path / "pages").open("rb"))
        present = stack.enter_context((tmp_path / "present").open("r+b"))
        bits = stack.enter_context(mmap.mmap(present.fileno(), 0))
        pager = stack.enter_context(
            Pager(
                vmm.uffd,
                [vmm.region],
                state,
                pages=PAGES,
                state_fd=state,
                cache=PagerCache(pages.fileno(), present.fileno()),
                arrivals_fd=arrivals,
                order=[(8, 4)],
            )
        )
        pager.start()
        native.bits_set(bits, PAGES // 2, PAGES // 2)
        os.write(arrived, f"\n{PAGES // 2} 1\n{PAGES // 2 + 1} {PAGES // 2 - 1}\n".encode())
        os.close(arrived)
        # All has arrived, so that the VMM needs no pager any more.
        assert pager.wait(30) is Status.COMPLETE
        assert pager.statistics().ahead_pages == PAGES
        assert vmm.read() == image
        assert pager.statistics().faults == 0


def test_order(vmm: Vmm, state: int, tmp_path: Path) -> None:
    """What is first in it comes first. The rest is met by an address that no process has, which ends the pager."""
    (tmp_path / "pages").write_bytes(os.urandom(PAGES * PAGE))
    (tmp_path / "present").write_bytes(b"\xff" * (PAGES // 8))
    regions = [
        PagerRegion(1 << 60, 8 * PAGE, 0),
        PagerRegion(vmm.region.address, (PAGES - 8) * PAGE, 8 * PAGE),
    ]
    with (tmp_path / "pages").open("rb") as pages, (tmp_path / "present").open("rb") as present:
        cache = PagerCache(pages.fileno(), present.fileno())
        order = [(40, 4), (20, 1)]
        with Pager(vmm.uffd, regions, state, pages=PAGES, state_fd=state, cache=cache, order=order) as pager:
            pager.start()
            assert pager.wait(30) is Status.FAILED
            assert pager.error is not None
            assert (pager.error.page, pager.statistics().copied_pages) == (0, 5)


def test_failure(vmm: Vmm, state: int, tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(b"x" * (PAGE * 3 + 17))
    with (tmp_path / "memory").open("rb") as memory:
        pager = Pager(vmm.uffd, [vmm.region], memory.fileno(), pages=PAGES, state_fd=state)
        with pager:
            pager.start()
            vmm.through.send(b"g")
            assert pager.wait(30) is Status.FAILED
            assert str(pager.error) == "fault helper: page 3: memory ends before it: No data available"
            assert pager.error is not None
            assert pager.error.page == 3
            assert vmm.process.poll() is None
    with pytest.raises(ValueError, match="the pager is closed"):
        pager.start()
    assert repr(pager) == "<Pager closed>"


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "0 regions: between 1 and 64 are understood"),
        ([PagerRegion(0, PAGE, 0)] * 65, "65 regions"),
        ([PagerRegion(0, PAGE, 0, 8192)], "region 0: page size 8192 is neither 4096 nor 2097152"),
        ([PagerRegion(0, PAGE, 0, 2 << 20)], "region 0: address, size or offset is not a multiple"),
        ([PagerRegion(1, PAGE, 0)], "region 0: address, size or offset is not a multiple"),
        ([PagerRegion(0, 0, 0)], "region 0: address, size or offset"),
        ([PagerRegion(0, PAGE, PAGES * PAGE)], "region 0: reaches beyond the memory's 262144 bytes"),
        ([PagerRegion(2**64 - PAGE, 2 * PAGE, 0)], "region 0: reaches beyond"),
        ([PagerRegion(0, 2 * PAGE, 0), PagerRegion(PAGE, PAGE, 2 * PAGE)], "regions 0 and 1 overlap"),
        ([PagerRegion(0, 2 * PAGE, 0), PagerRegion(2 * PAGE, PAGE, PAGE)], "regions 0 and 1 overlap"),
    ],
)
def test_bad_regions(state: int, regions: list[PagerRegion], message: str) -> None:
    with pytest.raises(PagerError, match=message):
        Pager(state, regions, state, pages=PAGES, state_fd=state)


def test_bad_state(state: int) -> None:
    region = [PagerRegion(0, PAGE, 0)]
    with pytest.raises(PagerError, match="state: Invalid argument"):
        Pager(state, region, state, pages=PAGES * 4096, state_fd=state)
    os.pwrite(state, b"x", 0)
    with pytest.raises(PagerError, match="not that of a pager"):
        Pager(state, region, state, pages=PAGES, state_fd=state)
    with pytest.raises(ValueError, match="more than a pager can serve"):
        new_state(2**40 + 1)
