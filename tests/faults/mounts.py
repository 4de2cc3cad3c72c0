"""Real mounts under test: made by the command, read through the kernel, and gone at the end whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.link import Link

from imagefs.mount import kernel
from tests.faults.images import RealImage
from tests.mount.conftest import ROOT, environment, wait_until

READER = ROOT / "tests/faults/reader.py"


@dataclass
class Reader:
    """``reader.py`` at work in a process of its own, so that a read that never ends holds up no test."""

    process: subprocess.Popen[str]

    def result(self, timeout: float = 60.0) -> dict[str, Any]:
        """What became of each of its reads: ``bytes`` right, ``wrong`` pages, ``errors`` by errno."""
        out, err = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, err
        result: dict[str, Any] = json.loads(out)
        return result

    @property
    def state(self) -> str:
        """The kernel's letter for it: R, S, D, Z …, and X when it is gone."""
        return process_state(self.process.pid)


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@dataclass
class RealMount:
    """An image, mounted by ``mount.imagefs``."""

    path: Path
    log: Path
    pid: int
    expected: list[str] = field(default_factory=list)
    """What its log may say beside what every log says: regular expressions."""
    readers: list[Reader] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / ".imagefs/status.json").read_text())
        return content

    def waiting(self) -> int:
        return int(self.status()["mount"]["waiting"])

    def present(self) -> list[int]:
        """Numbers of the pages that are here."""
        bits = int.from_bytes((self.path / ".imagefs/present").read_bytes(), "little")
        return [page for page in range(bits.bit_length()) if bits >> page & 1]

    def page_file(self, page: int) -> Path:
        """Of a page of an image whose memory begins at guest-physical address zero."""
        return self.path / f"pages/0x{page >> 12:05x}/0x{page:07x}"

    def read_page(self, page: int) -> bytes:
        """Reading its file asks for the page and nothing beside it; OSError as the kernel says."""
        return self.page_file(page).read_bytes()

    def read_memory(self, offset: int, length: int) -> bytes:
        """Without the kernel's readahead; OSError as the kernel says."""
        descriptor = os.open(self.path / "memory", os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def xattr(self, page: int, name: str) -> str:
        return os.getxattr(self.page_file(page), f"user.imagefs.{name}").decode()

    def start_reader(self, image: RealImage, pages: Iterable[int], *, threads: int = 1, file: str = "memory") -> Reader:
        """Read pages of ``memory``, each compared with the original where it is read."""
        original = image.native.with_suffix(".memory")
        if not original.exists():
            original.write_bytes(image.memory)
        command = [sys.executable, str(READER), str(self.path / file), str(original), str(threads)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        process.stdin.write(" ".join(map(str, pages)))
        process.stdin.close()
        # communicate() would flush it.
        process.stdin = None
        self.readers.append(Reader(process))
        return self.readers[-1]

    def start(self, *command: str) -> Reader:
        """Any program, in the mount."""
        process = subprocess.Popen(
            command,
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.readers.append(Reader(process))
        return self.readers[-1]

    def run(self, *command: str, timeout: float = 60.0) -> str:
        """A program in the mount, to its end; its standard output."""
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=timeout, check=True)
        return done.stdout

    def wait_until_complete(self, timeout: float = 60.0) -> None:
        wait_until(lambda: self.status()["memory"]["complete"], "all pages are here", timeout)

    def wait_until_waiting(self, count: int = 1) -> None:
        wait_until(lambda: self.waiting() >= count, f"{count} reads wait")

    def wait_until_log_says(self, pattern: str, timeout: float = 90.0) -> None:
        wait_until(lambda: re.search(pattern, self.log.read_text()), f"the log says {pattern!r}", timeout)

    def is_alive(self) -> bool:
        return process_state(self.pid) not in "ZX"

    def is_mounted(self) -> bool:
        return kernel.topmost(str(self.path)) is not None

    def wait_until_gone(self) -> None:
        wait_until(lambda: not self.is_alive(), "the daemon ends")
        wait_until(lambda: not self.is_mounted(), "nothing is mounted")

    def unmount(self, *options: str) -> None:
        subprocess.run(["umount", *options, str(self.path)], check=True, capture_output=True, timeout=30)
        self.wait_until_gone()

    def kill(self) -> None:
        """SIGKILL to the daemon, and the dead mount taken away."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.is_alive(), "it is dead")
        subprocess.run(["umount", "-l", str(self.path)], check=True, capture_output=True, timeout=30)

    def unexpected(self) -> list[str]:
        """Lines of the log that are worse than information and not expected."""
        lines = self.log.read_text().splitlines()
        bad = [line for line in lines if re.search(r" (WARNING|ERROR|CRITICAL) |^Traceback|^\w*Error", line)]
        return [line for line in bad if not any(re.search(pattern, line) for pattern in self.expected)]

    def close(self) -> None:
        """Whatever state it is in: nothing of it stays."""
        with ExitStack() as stack:
            stack.callback(self._detach)
            for reader in self.readers:
                stack.callback(reader.process.communicate, timeout=20)
                stack.callback(reader.process.kill)
            if self.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)
            try:
                wait_until(lambda: not self.is_alive(), "the daemon ends")
            except AssertionError:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                raise

    def _detach(self) -> None:
        while (left := kernel.topmost(str(self.path))) is not None:
            kernel.detach(left)


class Mounter:
    """Mounts images below a directory; all are gone, and their logs have been looked at, when the context is left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounts: list[RealMount] = []
        self._links: list[Link] = []

    def __enter__(self) -> Mounter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with ExitStack() as stack:
            for end in [link.close for link in self._links] + [mount.close for mount in self._mounts]:
                stack.callback(end)
        unexpected = [line for mount in self._mounts for line in mount.unexpected()][:10]
        if kind is None and unexpected:
            raise AssertionError("unexpected in a mount's log:\n" + "\n".join(unexpected))
        if unexpected:
            print("unexpected in a mount's log:", *unexpected, sep="\n")

    def __call__(self, source: str | Path, options: str = "", *, expected: Sequence[str] = ()) -> RealMount:
        """``mount.imagefs SOURCE …``; without ``cache=`` or ``nocache`` the cache is a directory of this test's.

        ``expected`` are regular expressions of what its log may say.
        """
        path = self._directory / f"mnt{len(self._mounts)}"
        with self.start(source, path, options) as process:
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", ""), err[-500:]
        pid = json.loads((path / ".imagefs/status.json").read_text())["mount"]["pid"]
        self._mounts.append(RealMount(path, path.with_suffix(".log"), pid, list(expected)))
        return self._mounts[-1]

    def link(self, target: tuple[str, int], *, mbit: float, rtt_ms: float) -> Link:
        """A link that is there until the mounts are gone: what it resets as it ends is in nobody's log."""
        self._links.append(Link(target, mbit, rtt_ms))
        return self._links[-1]

    @contextmanager
    def start(self, source: str | Path, path: Path, options: str = "") -> Iterator[subprocess.Popen[str]]:
        """The command alone, on a directory that is made for it; killed if it still runs at the end."""
        path.mkdir()
        if not re.search(r"\b(no)?cache\b", options):
            options = ",".join(filter(None, [f"cache={self._directory}/cache", options]))
        options = f"log={path.with_suffix('.log')},{options}"
        with subprocess.Popen(
            [sys.executable, "-m", "imagefs.cli.mount", str(source), str(path), "-o", options],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()
