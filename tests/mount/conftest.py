"""Mounts under test: made, watched, and taken away whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from imagefs.mount import kernel
from tests.mount.fakes import FakeControl

ROOT = Path(__file__).resolve().parents[2]
TEST_TIME = 60.0
"""Seconds after which the watchdog aborts a test's mounts. A test takes a few."""


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.01)


def environment() -> Mapping[str, str]:
    """For programs of this checkout."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@dataclass
class Mounted:
    """A fake image, mounted."""

    path: Path
    log: Path
    control: FakeControl
    pid: int
    readers: list[subprocess.Popen[str]] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        """Content of status.json."""
        content: dict[str, Any] = json.loads((self.path / ".imagefs/status.json").read_text())
        return content

    def waiting(self) -> int:
        """Reads that wait for their pages."""
        return int(self.status()["mount"]["waiting"])

    def is_mounted(self) -> bool:
        return kernel.topmost(str(self.path)) is not None

    def is_alive(self) -> bool:
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        # Whoever has adopted it may take its time.
        return state != "Z"

    def run(self, *command: str, timeout: float = 30) -> str:
        """A command in the mount; its standard output."""
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=timeout, check=True)
        return done.stdout

    def start(self, program: str, *args: str) -> subprocess.Popen[str]:
        """A Python program in the background, in the mount."""
        command = [sys.executable, "-c", program, *args]
        reader = subprocess.Popen(
            command, cwd=self.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.readers.append(reader)
        return reader

    def wait_until_gone(self) -> None:
        """The daemon has ended and nothing is mounted."""
        wait_until(lambda: not self.is_alive(), "the daemon ends")
        wait_until(lambda: not self.is_mounted(), "nothing is mounted")


Mounter = Callable[..., Mounted]


@pytest.fixture
def fake_mount(tmp_path: Path) -> Iterator[Mounter]:
    """Mounts a fake image: ``fake_mount("soft,timeo=1")``."""
    made: list[Mounted] = []

    def mount(options: str = "", name: str = "fake") -> Mounted:
        path = tmp_path / f"mnt {len(made)}"
        path.mkdir()
        log, control = tmp_path / f"log{len(made)}", tmp_path / f"control{len(made)}"
        command = [sys.executable, "-m", "tests.mount.fakes", str(control), f"{tmp_path}/{name}", str(path)]
        options = ",".join(filter(None, [f"nocache,log={log}", options]))
        done = subprocess.run(
            [*command, "-o", options], env=environment(), capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        pid = json.loads((path / ".imagefs/status.json").read_text())["mount"]["pid"]
        made.append(Mounted(path, log, FakeControl(control), pid))
        return made[-1]

    yield mount
    for mounted in made:
        _end(mounted)


def _end(mounted: Mounted) -> None:
    mounted.control.close()
    for reader in mounted.readers:
        reader.kill()
    if mounted.is_alive():
        os.kill(mounted.pid, signal.SIGTERM)
    try:
        wait_until(lambda: not mounted.is_alive(), "the daemon ends")
    except AssertionError:
        os.kill(mounted.pid, signal.SIGKILL)
        raise
    finally:
        while (left := kernel.topmost(str(mounted.path))) is not None:
            kernel.detach(left)
        for reader in mounted.readers:
            reader.communicate(timeout=10)


@pytest.fixture(autouse=True)
def watchdog(tmp_path: Path) -> Iterator[None]:
    """A read that would block for ever fails instead: its connection is aborted, and with it the test.

    A signal could not do that. A process that waits for a page in the kernel takes none.
    """
    done = threading.Event()
    barked: list[str] = []

    def watch() -> None:
        while not done.wait(TEST_TIME if not barked else 1.0):
            barked.extend(abort_below(tmp_path))

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    if barked:
        pytest.fail(f"hung for {TEST_TIME} s; aborted the connections of {barked}", pytrace=False)


def abort_below(directory: Path) -> list[str]:
    """Abort the FUSE connections of all mounts below a directory; their mountpoints."""
    found = []
    for mount in kernel.mounts():
        if mount.filesystem_type == kernel.FILESYSTEM_TYPE and Path(mount.mountpoint).is_relative_to(directory):
            abort(mount)
            found.append(mount.mountpoint)
    return found


def abort(mount: kernel.Mount) -> None:
    with kernel.fusectl() as connections:
        try:
            descriptor = os.open(f"{mount.connection}/abort", os.O_WRONLY, dir_fd=connections)
        except FileNotFoundError:
            return  # the connection is gone, the mount not yet
        os.write(descriptor, b"1")
        os.close(descriptor)
