"""The preload shim with a pager: guest memory is anonymous, handed over, and no file behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagefs.pager import Pager, new_state
from imagefs.restore.handshake import wait_for_handover
from imagefs.restore.listening import Listener
from tests.native.test_preload import PRELUDE

PAGE = 4096
SIZE = 16 * PAGE

PROGRAM = (
    PRELUDE
    + """
def bytes_at(address, length=SIZE):
    return ctypes.string_at(address, length)

fd = os.open(memory, os.O_RDWR)
protection = mmap.PROT_READ | mmap.PROT_WRITE
"""
)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"".join(bytes([page + 1]) * PAGE for page in range(16)))
    return path


class Ended:
    """A process, as a Listener watches it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.fd = os.pidfd_open(process.pid)

    def fileno(self) -> int:
        return self.fd


@contextmanager
def started(
    shim: dict[str, str],
    program: str,
    memory: Path,
    socket: Path,
    fds: Sequence[int] = (),
    prefix: Sequence[str] = (),
) -> Iterator[subprocess.Popen[str]]:
    env = os.environ | shim | {"IMAGEFS_MEMORY": str(memory), "IMAGEFS_PAGER": str(socket)}
    if fds:
        env["IMAGEFS_PAGER_STATE"] = str(fds[0])
    command = [*prefix, sys.executable, "-W", "error", "-c", PROGRAM + program, str(memory), "/dev/null"]
    with subprocess.Popen(
        command, env=env, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(shim: dict[str, str], program: str, memory: Path, *, give_state: bool = False) -> Any:
    """What the program prints as JSON, its memory served by a pager of ours."""
    with ExitStack() as stack:
        state = new_state(16)
        stack.callback(os.close, state)
        listener = stack.enter_context(Listener(memory.with_name("socket")))
        process = stack.enter_context(started(shim, program, memory, listener.path, [state] if give_state else []))
        ended = Ended(process)
        stack.callback(os.close, ended.fd)
        handover = wait_for_handover(listener, SIZE, ended)
        assert handover is not None, process.communicate()
        stack.callback(handover.close)
        assert handover.peer.pid == process.pid
        assert os.readlink(f"/proc/{process.pid}/fd/{handover.number}") == "anon_inode:[userfaultfd]"
        file = stack.enter_context(memory.open("rb"))
        pager = Pager(handover.uffd, handover.regions, file.fileno(), pages=16, state_fd=state)
        stack.enter_context(pager)
        pager.start()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        return json.loads(out)


def test_memory(shim: dict[str, str], memory: Path) -> None:
    program = """
at, error = call("mmap", 0, SIZE, protection, mmap.MAP_PRIVATE, fd, 0)
content = bytes_at(at)
right = [content[page * PAGE : (page + 1) * PAGE] == bytes([page + 1]) * PAGE for page in range(16)]
ctypes.memset(at, 7, PAGE)
given_back = call("madvise", at + PAGE, PAGE, 4)   # MADV_DONTNEED, before and after a hole in what is no file any more
hole = call("fallocate", fd, 3, PAGE, PAGE)
print(json.dumps([
    all(right), call("madvise", at, SIZE, MADV_HUGEPAGE), flags(at), given_back, hole,
    bytes_at(at, 1)[0], set(bytes_at(at + PAGE, PAGE)) == {0}, os.fstat(fd).st_size, os.pread(fd, 4, 0).hex(),
]))
"""
    done = run(shim, program, memory)
    assert done == [True, [0, None], ["hg"], [0, None], [0, None], 7, True, SIZE, "00000000"]


@pytest.mark.parametrize("again", ["fd", "os.open(memory, os.O_RDWR)"])
def test_it_is_mapped_once(shim: dict[str, str], memory: Path, again: str) -> None:
    """What is behind the file's number now is empty, and must not pass for guest memory."""
    program = f"""
at, error = call("mmap", 0, SIZE, protection, mmap.MAP_PRIVATE, fd, 0)
sys.stderr = None
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
print(json.dumps([error, call("mmap", 0, SIZE, protection, mmap.MAP_PRIVATE, {again}, 0)]))
"""
    assert run(shim, program, memory) == [None, [2**64 - 1, "EBUSY"]]


def test_where_it_was_reserved(shim: dict[str, str], memory: Path) -> None:
    """As QEMU maps, into a reservation; the process locks all its memory, now and later."""
    program = """
room = anonymous(length=2 * SIZE)
assert call("mlockall", 2) == (0, None)
at, error = call("mmap", room + PAGE, SIZE, protection, mmap.MAP_PRIVATE | 0x10, fd, 0)
assert at == room + PAGE, error
print(json.dumps([list(set(bytes_at(at + page * PAGE, PAGE))) for page in range(16)]))
"""
    assert run(shim, program, memory) == [[page + 1] for page in range(16)]


def test_children_do_not_get_the_state(shim: dict[str, str], memory: Path) -> None:
    program = """
import subprocess
state = os.environ["IMAGEFS_PAGER_STATE"]
link = os.readlink("/proc/self/fd/" + state)
def child():
    return subprocess.run(["readlink", "/proc/self/fd/" + state], close_fds=False, capture_output=True).returncode
before = child()
at, error = call("mmap", 0, SIZE, protection, mmap.MAP_PRIVATE, fd, 0)
print(json.dumps([link, before, child()]))
"""
    assert run(shim, program, memory, give_state=True) == ["/memfd:imagefs (deleted)", 0, 1]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("mmap.MAP_SHARED", "EINVAL", "the VMM shares its memory with other processes: Invalid argument"),
        ("mmap.MAP_PRIVATE", "ENOENT", "{memory}-socket: No such file or directory"),
    ],
)
def test_what_cannot_be_handed_over(shim: dict[str, str], memory: Path, how: str, error: str, message: str) -> None:
    """It is not mapped at all."""
    program = f"""
print(json.dumps(call("mmap", 0, SIZE, protection, {how}, fd, 0)))
"""
    with started(shim, program, memory, Path(f"{memory}-socket")) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)) == (0, [2**64 - 1, error])
    assert err == f"imagefs: guest memory cannot be handed to the pager: {message.format(memory=memory)}\n"


def test_userfaultfd_is_not_permitted(shim: dict[str, str], memory: Path, tmp_path: Path) -> None:
    """Root that may do nothing, and a device that is another's."""
    (tmp_path / "device").touch(0o000)
    os.chown(tmp_path / "device", 65534, 65534)
    script = f'mount --bind {tmp_path}/device /dev/userfaultfd; exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    program = """
print(json.dumps(call("mmap", 0, SIZE, protection, mmap.MAP_PRIVATE, fd, 0)))
"""
    prefix = ["unshare", "-m", "sh", "-ec", script, "sh"]
    with started(shim, program, memory, tmp_path / "socket", prefix=prefix) as process:
        out, err = process.communicate(timeout=60)
    assert json.loads(out) == [2**64 - 1, "EPERM"]
    assert all(name in err for name in ("vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE", "/dev/userfaultfd"))
