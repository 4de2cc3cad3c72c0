"""A VMM that does what Firecracker does (``vmm.c``), a pager's command for it, and images that both know."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0
"""How long anything may take on a busy machine; everything waits for a condition."""
IMAGEFS = [sys.executable, "-m", "imagefs.cli"]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@dataclass(frozen=True)
class Program:
    """``vmm.c``, built."""

    path: Path

    def make_image(self, path: Path, pages: int) -> None:
        subprocess.run([self.path, "image", path, str(pages)], check=True, timeout=SECONDS)

    @contextmanager
    def running(self, socket: Path, pages: int, seed: int, *options: str) -> Iterator[Guest]:
        command = [str(self.path), "run", str(socket), str(pages), str(seed), *options]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield Guest(process)
            finally:
                process.kill()


@dataclass(frozen=True)
class Guest:
    process: subprocess.Popen[str]

    def touched(self) -> int:
        """How many pages it has looked at."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline().split()[1])

    def finish(self) -> str:
        """Have it check everything; the line that it ends with."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert (self.process.returncode, err) == (0, ""), out
        return out


class Command:
    """``imagefs restore …`` in the background."""

    def __init__(self, *arguments: str | Path, log: Path) -> None:
        self._log = log
        with open(log, "ab") as stderr:
            self.process = subprocess.Popen(
                [*IMAGEFS, "restore", *map(str, arguments)], stderr=stderr, stdout=stderr, start_new_session=True
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        # Its pagers, too.
        for number in (self.process.pid, *self.workers()):
            kill(number)
        self.process.wait(SECONDS)

    def said(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[int]:
        pid = self.process.pid
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [child for child in map(int, text.split()) if is_alive(child)]

    def worker(self, *former: int) -> int:
        """The pager, once there is one other than ``former``."""
        found: list[int] = []

        def is_there() -> bool:
            assert self.process.poll() is None, self.said()
            found[:] = [pid for pid in self.workers() if pid not in former]
            return bool(found)

        wait_until(is_there)
        return found[0]

    def wait(self) -> int:
        return self.process.wait(SECONDS)


def listening(mountpoint: Path, socket: Path, log: Path, *more: str) -> Command:
    """A pager's command that can be connected to."""
    command = Command(mountpoint, "--door", "pager", "--socket", socket, *more, log=log)
    try:
        wait_until(lambda: socket.is_socket() or command.process.poll() is not None)
        assert command.process.poll() is None, command.said()
    except BaseException:
        command.__exit__()
        raise
    return command


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
