"""The preload shim in real processes: what the kernel then says of their mappings (VmFlags in /proc/self/smaps).

``rr`` is MADV_RANDOM, ``hg`` is MADV_HUGEPAGE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from imagefs.restore.shim import preload_path

PAGE = 4096
SIZE = 16 * PAGE

# Runs in the process under test; `call` makes libc calls as a program linked with it does, through its symbols.
PRELUDE = """
import ctypes, errno, json, mmap, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mmap64.restype = ctypes.c_void_p
PAGE, SIZE = 4096, 16 * 4096
MADV_RANDOM, MADV_SEQUENTIAL, MADV_HUGEPAGE = 1, 2, 14
memory, other = sys.argv[1:]

def call(name, *args):
    ctypes.set_errno(0)
    result = getattr(libc, name)(*[ctypes.c_size_t(arg) if isinstance(arg, int) else arg for arg in args])
    return result, errno.errorcode.get(ctypes.get_errno())

def map_file(path, name="mmap", at=0, length=SIZE, flags=mmap.MAP_PRIVATE, offset=0):
    fd = os.open(path, os.O_RDWR)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if flags == mmap.MAP_PRIVATE else 0)
    address, error = call(name, at, length, protection, flags, fd, offset)
    os.close(fd)
    assert error is None, error
    return address

def anonymous(at=0, length=SIZE, flags=0):
    flags |= mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address, error = call("mmap", at, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, 2**64 - 1, 0)
    assert error is None, error
    return address

def flags_of(addresses):
    \"\"\"The advice on the pages at addresses: of each some of "rr", "hg", "sr".\"\"\"
    found = {}
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:
                start, end = (int(word, 16) for word in words[0].split("-"))
            elif words[0] == "VmFlags:":
                for address in addresses:
                    if start <= address < end:
                        found[address] = [word for word in words if word in ("rr", "hg", "sr")]
    return [found.get(address) for address in addresses]

def flags(address):
    return flags_of([address])[0]

"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The guest memory file, and one that is none."""
    for name in ("memory", "other"):
        (tmp_path / name).write_bytes(b"m" * SIZE)
    return tmp_path / "memory", tmp_path / "other"


class Run(Protocol):
    """What ``program`` prints as JSON, under the shim with IMAGEFS_MEMORY naming ``memory``."""

    def __call__(self, program: str, memory: Path | None, preload: bool = True) -> Any: ...


@pytest.fixture
def run(files: tuple[Path, Path], shim: dict[str, str]) -> Run:
    def run(program: str, memory: Path | None, preload: bool = True) -> Any:
        env = os.environ | (shim if preload else {})
        if memory is not None:
            env["IMAGEFS_MEMORY"] = str(memory)
        command = [sys.executable, "-W", "error", "-c", PRELUDE + program, *map(str, files)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


HUGE_ON_BOTH = """
found = {}
for name, path in (("memory", memory), ("other", other)):
    for function in ("mmap", "mmap64"):
        at = map_file(path, function)
        before = flags(at)
        result = call("madvise", at, SIZE, MADV_HUGEPAGE)
        found[name + " " + function] = [before, list(result), flags(at)]
print(json.dumps(found))
"""
HUGE_AS_ASKED = [[], [0, None], ["hg"]]


def test_named_file_is_random_and_never_huge(run: Run, files: tuple[Path, Path]) -> None:
    assert run(HUGE_ON_BOTH, files[0]) == {
        "memory mmap": [["rr"], [0, None], ["rr"]],
        "memory mmap64": [["rr"], [0, None], ["rr"]],
        "other mmap": HUGE_AS_ASKED,
        "other mmap64": HUGE_AS_ASKED,
    }


def test_name_of_another_directory_means_the_same_file(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(files[0])
    assert run(HUGE_ON_BOTH, tmp_path / "alias")["memory mmap"] == [["rr"], [0, None], ["rr"]]


@pytest.mark.parametrize("named", [None, "", "missing", "."])
def test_without_a_file_nothing_changes(run: Run, files: tuple[Path, Path], tmp_path: Path, named: str | None) -> None:
    memory = None if named is None else Path(tmp_path / named) if named else Path("")
    found = run(HUGE_ON_BOTH, memory)
    assert set(map(str, found.values())) == {str(HUGE_AS_ASKED)}
    assert found == run(HUGE_ON_BOTH, None, preload=False)


def test_named_file_is_opened_for_reading(run: Run, files: tuple[Path, Path]) -> None:
    """By each name that the C library has for it; what is more than an O_RDWR is left alone."""
    program = """
import fcntl
paths = {"memory": memory.encode(), "other": other.encode()}
found = {}
for name, path in paths.items():
    for function in ("open", "open64", "__open_2", "__open64_2"):
        for wanted in (os.O_RDWR | os.O_CLOEXEC, os.O_WRONLY, os.O_RDONLY):
            fd, error = call(function, path, wanted)
            found.setdefault(name, []).append([error, (fcntl.fcntl(fd, fcntl.F_GETFL) ^ wanted) & os.O_ACCMODE,
                fcntl.fcntl(fd, fcntl.F_GETFD) == bool(wanted & os.O_CLOEXEC)])
            os.close(fd)
fd, _ = call("open", paths["memory"], os.O_RDWR | os.O_TRUNC)
found["truncated"] = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, os.fstat(fd).st_size]
fd, _ = call("open", (memory + "-new").encode(), os.O_RDWR | os.O_CREAT, 0o640)
found["created"] = os.fstat(fd).st_mode & 0o777
print(json.dumps(found))
"""
    as_asked, reading = [None, 0, True], [None, os.O_RDWR, True]
    assert run(program, files[0]) == {
        "memory": [reading, as_asked, as_asked] * 4,
        "other": [as_asked] * 12,
        "truncated": [os.O_RDWR, 0],
        "created": 0o640,
    }


def test_posix_madvise(run: Run, files: tuple[Path, Path]) -> None:
    program = """
at, plain = map_file(memory), map_file(other)
libc.memset(ctypes.c_void_p(at), 7, PAGE)
print(json.dumps([
    call("posix_madvise", at, SIZE, MADV_HUGEPAGE), flags(at),
    call("posix_madvise", plain, SIZE, MADV_SEQUENTIAL), flags(plain),
    call("posix_madvise", at, SIZE, 4), ctypes.string_at(at, 1)[0],   # POSIX_MADV_DONTNEED: keeps the data
    call("posix_madvise", at + 1, PAGE, 0), call("posix_madvise", at, SIZE, 12345),
]))
"""
    found = run(program, files[0])
    # Errors are returned, errno stays as it was.
    expected = [[0, None], ["rr"], [0, None], ["sr"], [0, None], 7, [22, None], [22, None]]
    assert found == expected
    assert run(program, None, preload=False) == [[0, None], ["hg"], *expected[2:]]


def test_other_advice_passes(run: Run, files: tuple[Path, Path]) -> None:
    program = """
at = map_file(memory)
print(json.dumps([
    call("madvise", at, SIZE, MADV_SEQUENTIAL), flags(at),
    call("madvise", at, SIZE, 0), flags(at),
    call("madvise", at + 1, PAGE, MADV_HUGEPAGE), call("madvise", at, 0, MADV_HUGEPAGE),
    call("madvise", at, 2**64 - PAGE, MADV_HUGEPAGE), call("madvise", at, SIZE, 12345), flags(at),
]))
"""
    refused = [-1, "EINVAL"]
    expected = [[0, None], ["sr"], [0, None], [], refused, [0, None], refused, refused, []]
    assert run(program, files[0]) == expected
    assert run(program, None, preload=False) == expected


def test_range_that_is_partly_guest_memory(run: Run, files: tuple[Path, Path]) -> None:
    """As QEMU maps: a reservation, the file put over a part of it, then one call of madvise over all."""
    program = """
at = anonymous()
map_file(memory, at=at + 4 * PAGE, length=2 * PAGE, flags=mmap.MAP_PRIVATE | 0x10)
map_file(memory, at=at + 8 * PAGE, length=PAGE + 1, flags=mmap.MAP_PRIVATE | 0x10, offset=2 * PAGE)
result = call("madvise", at, SIZE, MADV_HUGEPAGE)
print(json.dumps([result, flags_of([at + i * PAGE for i in range(16)])]))
"""
    result, pages = run(program, files[0])
    assert result == [0, None]
    assert [i for i, advice in enumerate(pages) if advice == ["rr"]] == [4, 5, 8, 9]
    assert [i for i, advice in enumerate(pages) if advice == ["hg"]] == [0, 1, 2, 3, 6, 7, *range(10, 16)]


@pytest.mark.parametrize("how", ["call('munmap', at, SIZE)", "None", "libc.syscall(11, ctypes.c_size_t(at), SIZE)"])
def test_memory_that_takes_the_place_is_not_guest_memory(run: Run, files: tuple[Path, Path], how: str) -> None:
    """The place is free again through munmap, mapped over, or was unmapped behind the shim's back."""
    program = f"""
at = map_file(memory)
{how}
assert anonymous(at=at, flags=0x10) == at
print(json.dumps([call("madvise", at, SIZE, MADV_HUGEPAGE), flags(at)]))
"""
    assert run(program, files[0]) == [[0, None], ["hg"]]


def test_failed_calls_fail_as_ever(run: Run, files: tuple[Path, Path]) -> None:
    program = """
print(json.dumps([
    call("mmap", 0, 0, 3, 0x22, 2**64 - 1, 0), call("mmap", 0, PAGE, 3, 2, 999, 0), call("munmap", 1, PAGE),
]))
"""
    expected = [[2**64 - 1, "EINVAL"], [2**64 - 1, "EBADF"], [-1, "EINVAL"]]
    assert run(program, files[0]) == expected
    assert run(program, None, preload=False) == expected


def test_more_mappings_than_the_table_holds(run: Run, files: tuple[Path, Path]) -> None:
    program = """
at = [map_file(memory, length=PAGE, flags=mmap.MAP_SHARED, offset=i % 16 * PAGE) for i in range(100)]
first = flags_of(at)
results = {call("madvise", place, PAGE, MADV_HUGEPAGE)[0] for place in at}
print(json.dumps([first == [["rr"]] * 100, list(results), flags_of(at)]))
"""
    all_random, results, advice = run(program, files[0])
    assert (all_random, results) == (True, [0])
    assert advice[:64] == [["rr"]] * 64
    assert all("rr" in each for each in advice)


def test_threads(run: Run, files: tuple[Path, Path]) -> None:
    """They map and unmap at once, and none takes another's mapping for its own."""
    program = """
import threading
wrong = []
def work(path, expected):
    for turn in range(100):
        at = map_file(path)
        result = call("madvise", at, SIZE, MADV_HUGEPAGE)
        advice = flags(at) if turn % 10 == 0 else expected
        if result != (0, None) or advice != expected or call("munmap", at, SIZE)[0]:
            wrong.append([path, result])
threads = [threading.Thread(target=work, args=each) for each in 2 * [(memory, ["rr"]), (other, ["hg"])]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(wrong))
"""
    assert run(program, files[0]) == []


def test_children_see_no_change(run: Run, files: tuple[Path, Path]) -> None:
    """What QEMU starts (exec:cat, a network script) inherits the shim and the variable."""
    program = """
at = map_file(memory)
pid = os.fork()
if pid == 0:
    # A child of fork has the mapping still, and what is known of it.
    os._exit(0 if call("madvise", at, SIZE, MADV_HUGEPAGE)[0] == 0 and flags(at) == ["rr"] else 1)
forked = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
cat = subprocess.run(["cat", other], capture_output=True)
print(json.dumps([forked, cat.returncode, len(cat.stdout), cat.stderr.decode()]))
"""
    assert run(program, files[0]) == [0, 0, SIZE, ""]


@pytest.mark.parametrize(("named", "share"), [(True, "off"), (True, "on"), (False, "off"), (False, "on")])
def test_qemu(files: tuple[Path, Path], named: bool, share: str) -> None:
    """The call that the shim is there for, made by QEMU itself on the file that is its guest's RAM; which it may not
    share, as on a mount."""
    memory = files[0]
    os.truncate(memory, 64 << 20)
    backend = f"memory-backend-file,id=ram,size=64M,mem-path={memory},share={share}"
    qemu = ["qemu-system-x86_64", "-machine", "pc,memory-backend=ram", "-m", "64M", "-object", backend, "-S"]
    env = {**os.environ, "LD_PRELOAD": str(preload_path()), "IMAGEFS_MEMORY": str(files[0 if named else 1])}
    with subprocess.Popen(
        [*qemu, "-nodefaults", "-display", "none", "-qmp", "stdio"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            # The greeting comes when the machine has been built.
            greeting = process.stdout.readline()
            if named and share == "on":
                assert (greeting, process.wait(60)) == (b"", 1)
                return
            assert b'"QMP"' in greeting
            smaps = Path(f"/proc/{process.pid}/smaps").read_text()
        finally:
            process.kill()
    advice = {flag for flag in advice_on(memory, smaps) if flag in ("rr", "hg")}
    assert advice == ({"rr"} if named else {"hg"})


def advice_on(path: Path, smaps: str) -> set[str]:
    """The VmFlags of all mappings of a file."""
    found: set[str] = set()
    inside = False
    for line in smaps.splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = words[-1] == str(path)
        elif words[0] == "VmFlags:" and inside:
            found.update(words[1:])
    return found
