"""QEMU under test: a process, its serial line, its monitor; all of it gone when the context is left."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from imagefs.errors import RestoreError
from imagefs.restore.qmp import Qmp
from support.guest import Guest
from support.uninterrupted import uninterrupted

QEMU = os.environ.get("IMAGEFS_TEST_QEMU", "qemu-system-x86_64")
"""Another QEMU than the installed one can be put to the same tests."""
PATIENCE = 120.0
"""Seconds: how long anything may take on a busy machine. Only an upper bound; everything waits for a condition."""

SECONDS_TO_DIE = 20.0

Backend = Literal["default", "ram", "file", "memfd"]
"""Where guest RAM is: the machine's own block (``pc.ram``), or a backend ``ram`` of anonymous memory, of a shared
file, or of a shared memfd."""


class VmError(Exception):
    """The VM did not do what was waited for; the message ends with what QEMU and the guest said last."""


class Vm:
    """One QEMU with the test guest. ``with Vm(guest) as vm: vm.expect("FILLED"); vm.ask("check")``.

    ``command`` is the whole QEMU command line. ``prefix`` goes before it: ``imagefs restore /mnt --`` starts the same
    machine from an image. ``ram_file`` is the file of the ``file`` backend (by default in the VM's own directory).
    """

    def __init__(
        self,
        guest: Guest,
        *,
        memory_mib: int = 256,
        smp: int = 1,
        machine: str = "pc",
        backend: Backend = "default",
        ram_file: Path | None = None,
        extra: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        qemu: str = QEMU,
    ) -> None:
        # Short: the path of a unix socket has 107 bytes at most.
        self.directory = Path(tempfile.mkdtemp(prefix="imagefs-vm-"))
        self.ram_file = ram_file or self.directory / "ram"
        self.qmp_socket = self.directory / "qmp"
        """A monitor that is free for the tool under test; the tests' own is :attr:`qmp`."""
        self.prefix = list(prefix)
        self.command = [
            *(qemu, "-accel", "tcg", "-smp", str(smp), "-m", f"{memory_mib}M"),
            *self._machine(machine, backend, memory_mib),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", guest.kernel_options),
            *("-chardev", f"socket,id=serial,path={self.directory}/serial", "-serial", "chardev:serial"),
            *("-chardev", f"socket,id=own,path={self.directory}/own", "-mon", "chardev=own,mode=control"),
            *("-qmp", f"unix:{self.qmp_socket},server=on,wait=off"),
            *extra,
        ]
        self._environment = None if environment is None else {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._serial: socket.socket | None = None
        self._qmp: Qmp | None = None
        self._unread = b""
        self._log = b""
        self._questions = itertools.count(1)

    def _machine(self, machine: str, backend: Backend, memory_mib: int) -> list[str]:
        if backend == "default":
            return ["-machine", machine]
        kind = {
            "ram": "memory-backend-ram",
            "file": f"memory-backend-file,mem-path={self.ram_file},share=on",
            "memfd": "memory-backend-memfd,share=on",
        }[backend]
        return ["-object", f"{kind},id=ram,size={memory_mib}M", "-machine", f"{machine},memory-backend=ram"]

    # ---- life ----

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Start QEMU and wait until both our lines are connected: QEMU connects them, so nothing can be missed."""
        listeners = [_listen(self.directory / name) for name in ("serial", "own")]
        try:
            with open(self.directory / "stderr", "wb") as stderr, uninterrupted():
                # A session of its own: Ctrl-C in the terminal goes to us, and we end it.
                self._process = subprocess.Popen(
                    [*self.prefix, *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    env=self._environment,
                    start_new_session=True,
                )
            self._serial = self._accept(listeners[0])
            self._qmp = Qmp(self._accept(listeners[1]), "the VM's own monitor", PATIENCE)
        finally:
            for listener in listeners:
                listener.close()

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        listener.settimeout(0.05)
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if self.process.poll() is not None:
                    raise VmError(f"QEMU ended with status {self.process.returncode}\n{self.said()}") from None
                if time.monotonic() > deadline:
                    raise VmError(f"QEMU did not connect its lines\n{self.said()}") from None

    @uninterrupted()
    def close(self) -> None:
        """Kill QEMU, reap it, remove its directory."""
        if self._qmp is not None:
            self._qmp.close()
        if self._serial is not None:
            self._serial.close()
        ending = []
        if self._process is not None:
            # QEMU may be a child of what was started, and holds forwarded ports until it is gone.
            ending = [fd for pid in descendants(self._process.pid) if (fd := _pidfd(pid)) is not None]
            # Its children (exec:cat of an incoming state) too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for fd in ending:
            select.select([fd], [], [], SECONDS_TO_DIE)
            os.close(fd)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._process is not None:
            try:
                self._process.wait(SECONDS_TO_DIE)
            except subprocess.TimeoutExpired:
                # A thread of it waits for a page of a mount that does not come. Not for us to wait along: the mount
                # is below us, and its end lets QEMU go.
                raise VmError(f"QEMU (process {self._process.pid}) was killed and does not end") from None

    def wait(self, timeout: float = PATIENCE) -> int:
        """Exit status of QEMU when it ends by itself; a negative number is a signal's."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise VmError(f"QEMU did not end\n{self.said()}") from None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the VM has not been started"
        return self._process

    @property
    def qmp(self) -> Qmp:
        assert self._qmp is not None, "the VM has not been started"
        return self._qmp

    @property
    def status(self) -> str:
        """QEMU's run state: running, paused, postmigrate, …"""
        return self._status(PATIENCE)

    def wait_running(self, timeout: float = PATIENCE) -> None:
        """Until QEMU runs the guest. What is sent on the serial line before an incoming state is loaded gets lost."""
        deadline = time.monotonic() + timeout
        try:
            while self._status(left := max(0.0, deadline - time.monotonic())) != "running":
                self.qmp.wait_event("RESUME", "STOP", timeout=left)
        except RestoreError as error:
            raise VmError(f"QEMU does not run the guest: {error}\n{self.said()}") from None

    def go_on(self, timeout: float = PATIENCE) -> None:
        """Until QEMU has loaded an incoming state and runs the guest; one that was saved paused is told ``cont``."""
        deadline = time.monotonic() + timeout
        while (status := self._status(max(0.0, deadline - time.monotonic()))) == "inmigrate":
            time.sleep(0.02)
        if status == "paused":
            self.qmp.execute("cont")
        self.wait_running(max(0.0, deadline - time.monotonic()))

    def _status(self, timeout: float) -> str:
        """A QEMU whose main loop waits for a page answers nothing meanwhile."""
        try:
            return str(self.qmp.execute("query-status", timeout=timeout)["status"])
        except RestoreError as error:
            raise VmError(f"{error}\n{self.said()}") from None

    # ---- the serial line ----

    def expect(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Read on until a whole line matches (``re.search``) ``pattern``; what comes before it is passed over."""
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout
        while True:
            line = self._line(deadline, pattern)
            if found := compiled.search(line):
                return found

    def send(self, text: str) -> None:
        assert self._serial is not None, "the VM has not been started"
        self._serial.settimeout(PATIENCE)
        self._serial.sendall(text.encode() + b"\n")

    def ask(self, command: str, timeout: float = PATIENCE) -> str:
        """Send the agent a command and return the rest of the line that it answers with; VmError where it is busy."""
        verb = re.escape(command.split()[0])
        self.send(command)
        found = self.expect(rf"^{verb} (.*)$|^(busy|unknown) {verb}$", timeout)
        if found[2]:
            raise VmError(f"the guest's agent answers {found[0]!r} to {command!r}\n{self.said()}")
        return found[1]

    def ping(self, timeout: float = PATIENCE) -> tuple[str, int]:
        """The guest's boot nonce and its count of tenths of a second."""
        word = f"{os.getpid()}-{next(self._questions)}"
        self.send(f"ping {word}")
        found = self.expect(rf"^pong {word} nonce=([0-9a-f]{{16}}) count=(\d+)$", timeout)
        return found[1], int(found[2])

    def said(self) -> str:
        """What QEMU and the guest said last, for an error message."""
        try:
            stderr = (self.directory / "stderr").read_bytes()
        except FileNotFoundError:
            stderr = b""
        parts = (("stderr", stderr), ("serial line", self._log))
        return "\n".join(f"--- {name} ---\n{data[-2000:].decode(errors='replace').strip()}" for name, data in parts)

    def _line(self, deadline: float, wanted: str) -> str:
        assert self._serial is not None, "the VM has not been started"
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self._serial.settimeout(left)
                data = self._serial.recv(65536)
            except TimeoutError:
                raise VmError(f"waited in vain for {wanted!r} on the serial line\n{self.said()}") from None
            except ConnectionError:
                data = b""
            if not data:
                raise VmError(f"QEMU ended (status {self.wait()}) before {wanted!r}\n{self.said()}")
            self._unread += data
            self._log += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace").rstrip("\r")


def descendants(pid: int) -> Iterator[int]:
    """Of a process: its children, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
