"""A store in a directory when its writer is killed, and when its disk is full."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs.errors import NoSpaceError
from imagefs.store.directory import DirectoryStore

MIB = 1024 * 1024
SIZE = 4 * MIB

WRITER = f"""
import sys
from imagefs.store.directory import DirectoryStore
store = DirectoryStore(sys.argv[1])
versions = [bytes([letter]) * {SIZE} for letter in b"ab"]
print("ready", flush=True)
while True:
    for data in versions:
        store.put("objects/ab/x", data)
"""


def wait_for(directory: Path, count: int) -> None:
    """Until that many temporary files were seen to be begun: the writer is in its loop."""
    deadline = time.monotonic() + 30
    seen: set[str] = set()
    while len(seen) < count:
        seen.update(entry.name for entry in directory.glob(".tmp/*"))
        assert time.monotonic() < deadline


def test_killed_in_the_middle(tmp_path: Path, rng: random.Random) -> None:
    """Whenever SIGKILL comes, the object is a whole one, and what the dead left behind goes away by itself."""
    store = DirectoryStore(tmp_path)
    store.put("objects/ab/x", b"a" * SIZE)
    in_the_middle = 0
    for run in range(40):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                wait_for(tmp_path, 1)
                time.sleep(rng.uniform(0, 0.01))  # not to wait for something: to hit another moment each time
            finally:
                process.kill()
        in_the_middle += any(tmp_path.glob(".tmp/*"))
        data = store.get("objects/ab/x")
        assert len(data) == SIZE
        assert data.count(data[:1]) == SIZE
        assert list(store.keys()) == ["objects/ab/x"]
        if run >= 9 and in_the_middle >= 3:
            break
    assert in_the_middle >= 3, "no kill came while a file was being written"
    DirectoryStore(tmp_path).put("y", b"")
    assert list(tmp_path.glob(".tmp/*")) == []


def test_first_put_killed(tmp_path: Path) -> None:
    """Before the first put of a key has ended there is no object at all."""
    script = WRITER.replace("while True:", "while True:\n    sys.stdin.read()\n    versions[0] *= 64")
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdin is not None
                process.stdin.close()
                while not list(tmp_path.glob(".tmp/*")):
                    assert process.poll() is None
            finally:
                process.kill()
        store = DirectoryStore(tmp_path)
        if list(tmp_path.glob(".tmp/*")):
            assert not store.has("objects/ab/x")
            assert list(store.keys()) == []
            store.put("objects/ab/x", b"whole")
            assert list(tmp_path.glob(".tmp/*")) == []
            return
        store.delete("objects/ab/x")  # it was too quick for us
    pytest.fail("no kill came while the file was being written")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=20", "imagefs-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_full_disk(small_disk: Path) -> None:
    store = DirectoryStore(small_disk)
    store.put("objects/ab/first", b"x" * MIB)
    for _ in range(3):
        with pytest.raises(NoSpaceError, match=f"^{small_disk}: objects/ab/second: no space left on device$"):
            store.put("objects/ab/second", b"y" * (2 * MIB))
        assert list(store.keys()) == ["objects/ab/first"]
        assert list(small_disk.glob(".tmp/*")) == []
    with pytest.raises(NoSpaceError):
        store.put("objects/ab/first", b"z" * (2 * MIB))
    assert store.get("objects/ab/first") == b"x" * MIB
    store.delete("objects/ab/first")
    store.put("objects/ab/second", b"y" * MIB)
    assert store.get("objects/ab/second") == b"y" * MIB


def test_no_inode_left(small_disk: Path) -> None:
    store = DirectoryStore(small_disk)

    def fill() -> None:
        for number in range(40):
            store.put(f"objects/{number:02}/x", b"")

    with pytest.raises(NoSpaceError):
        fill()
    assert list(small_disk.glob(".tmp/*")) == []
    assert all(store.get(key) == b"" for key in store.keys())  # noqa: SIM118 - not a mapping
