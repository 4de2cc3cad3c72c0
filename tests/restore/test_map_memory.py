"""imagefs.restore.map_memory: the memory of an image in this very process, page by page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounts import mounted

from imagefs.cli import main
from imagefs.errors import MountError
from imagefs.restore import map_memory
from tests.restore.conftest import PAGES
from tests.restore.vmms import wait_until

PAGE = 4096


def test_bytes(mountpoint: Path) -> None:
    content = (mountpoint / "memory").read_bytes()
    with map_memory(mountpoint) as memory:
        assert len(memory) == len(content)
        assert memory[5 * PAGE : 5 * PAGE + 100] == content[5 * PAGE : 5 * PAGE + 100]
        few = memory.statistics()
        assert few.faults == 1
        assert few.copied_pages + few.zero_pages <= 16
        assert memory.find(content[-64:]) == content.find(content[-64:])
        assert memory[:] == content
        assert memory.statistics().ahead_pages == 0
        with pytest.raises(TypeError):
            memory[0] = 1
    with pytest.raises(ValueError, match="the memory is closed"):
        memory.statistics()


def test_many_threads(mountpoint: Path) -> None:
    """Under one GIL, which whoever waits for a page keeps."""
    content = (mountpoint / "memory").read_bytes()
    wrong: list[int] = []

    def look(first: int) -> None:
        for page in range(first, PAGES, 7):
            if memory[page * PAGE : (page + 1) * PAGE] != content[page * PAGE : (page + 1) * PAGE]:
                wrong.append(page)

    with map_memory(mountpoint) as memory:
        threads = [threading.Thread(target=look, args=(first,)) for first in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_views_outlive_an_attempt_to_close(mountpoint: Path) -> None:
    memory = map_memory(mountpoint)
    with memoryview(memory) as view:
        with pytest.raises(BufferError):
            memory.close()
        assert view[PAGE : 2 * PAGE] == (mountpoint / "memory").read_bytes()[PAGE : 2 * PAGE]
    memory.close()
    assert memory.closed
    memory.close()


def test_forgotten_ones_leave_nothing(mountpoint: Path) -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        memory = map_memory(mountpoint)
        assert memory[0] == 0
        del memory
    wait_until(lambda: len(os.listdir("/proc/self/task")) == before)


@pytest.fixture
def mount(memory: Path, tmp_path: Path) -> Iterator[Path]:
    """A real one."""
    assert main(["split", "-q", "--format", "raw", str(memory), str(tmp_path / "store" / "vm")]) == 0
    with mounted(str(tmp_path / "store" / "vm"), tmp_path / "real", f"cache={tmp_path}/cache") as mountpoint:
        yield mountpoint


def test_mount(mount: Path, memory: Path) -> None:
    """Ahead of touches, and then without the mount."""
    content = memory.read_bytes()
    with map_memory(mount, ahead=True) as mapped:
        wait_until(lambda: (now := mapped.statistics()).copied_pages + now.zero_pages == PAGES)
        faults = mapped.statistics().faults
        assert mapped[:] == content
        assert mapped.statistics().faults == faults
    with map_memory(mount) as mapped:
        assert mapped[: 64 * PAGE] == content[: 64 * PAGE]
        # The cache's own file, not FUSE.
        assert mapped.statistics().from_cache > 0


FAILING = """
import os, sys
from imagefs.restore import map_memory
memory = map_memory(sys.argv[1])
os.truncate(sys.argv[1] + "/memory", 4096)
print(memory[0], flush=True)
print(memory[-1], flush=True)
"""


@pytest.mark.parametrize("handler", ["", "import faulthandler; faulthandler.enable()"])
def test_page_that_cannot_be_had(mountpoint: Path, handler: str) -> None:
    """The process ends, as by a mapped file; it never sees zeros."""
    whole = (mountpoint / "memory").read_bytes()
    (mountpoint / "memory").unlink()
    (mountpoint / "memory").write_bytes(whole)
    done = subprocess.run(
        [sys.executable, "-c", handler + FAILING, mountpoint], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "0\n"
    assert done.stderr == "imagefs: fault helper: page 4095: memory ends before it: No data available\n"


FORKING = """
import os, sys
from imagefs.restore import map_memory
memory = map_memory(sys.argv[1])
child = os.fork()
if not child:
    print(memory[0])
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), memory[0])
"""


def test_child_does_not_see_zeros(mountpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, mountpoint], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGSEGV} 0\n")


def test_without_capabilities(mountpoint: Path) -> None:
    """Root without any may open /dev/userfaultfd."""
    program = "import sys; from imagefs.restore import map_memory; print(map_memory(sys.argv[1])[-8:].hex())"
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", program, str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ((mountpoint / "memory").read_bytes()[-8:].hex() + "\n", "")


def test_no_mount(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="no imagefs is mounted there"):
        map_memory(tmp_path)
