"""A libvirt of the tests' own: ``qemu:///system`` in a mount namespace where its directories are private.

Nothing of a libvirt that this machine may run is seen or touched, and no service manager is needed. Its QEMUs run as
root, since what they read is root's: the files of a mount.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from support.guest import Guest
from support.uninterrupted import uninterrupted

PATIENCE = 120.0
SECONDS_TO_END = 20.0

_START = r"""
set -e
for directory in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt; do
    mkdir -p "$directory" "$1$directory"
    mount --bind "$1$directory" "$directory"
done
for file in passwd group; do
    cp /etc/$file "$1/$file"
    mount --bind "$1/$file" /etc/$file
done
# Debian's libvirt looks its usual user up, whatever qemu.conf says.
grep -q ^libvirt-qemu: /etc/passwd || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >>/etc/passwd
for group in libvirt-qemu:64055 kvm:64056; do
    grep -q "^${group%:*}:" /etc/group || echo "${group%:*}:x:${group#*:}:" >>/etc/group
done
cp "$1/qemu.conf" /etc/libvirt/qemu.conf
exec libvirtd -f "$1/libvirtd.conf" -p "$1/pid"
"""
_QEMU_CONF = """\
security_driver = "none"
user = "root"
group = "root"
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
save_image_format = "{save_format}"
"""
_LIBVIRTD_CONF = """\
unix_sock_dir = "{directory}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
"""
_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    {boot}
  </os>
  <cpu mode='custom'><model>qemu64</model></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {serial}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""
_BOOT = "<kernel>{guest.kernel}</kernel><initrd>{guest.initramfs}</initrd><cmdline>{options}</cmdline>"
_SERIAL = "<serial type='unix'><source mode='connect' path='{path}'/></serial>"


class LibvirtError(Exception):
    """libvirt or its guest did not do what was waited for."""


class Libvirt:
    """``with Libvirt() as libvirt: libvirt.virsh("list")``."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="imagefs-libvirt-"))
        self._daemon: subprocess.Popen[bytes] | None = None

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

    def restart(self, save_format: str = "raw") -> None:
        """Another daemon: one that sees what was mounted meanwhile. ``virsh save`` writes ``save_format`` then."""
        self._end()
        self._start(save_format)

    def virsh(self, *arguments: str) -> str:
        """What it prints; LibvirtError where it fails."""
        uri = f"qemu+unix:///system?socket={self.directory}/sock/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-q", "-c", uri, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        if done.returncode:
            raise LibvirtError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def create(
        self, name: str, memory_mib: int, machine: str, guest: Guest | None = None, serial: Path | None = None
    ) -> None:
        """Start a domain: the test guest, its serial line connected to ``serial``; or firmware alone."""
        boot = _BOOT.format(guest=guest, options=escape(guest.kernel_options)) if guest else ""
        line = _SERIAL.format(path=serial) if serial else ""
        path = self.directory / f"{name}.xml"
        path.write_text(_DOMAIN.format(name=name, memory_mib=memory_mib, machine=machine, boot=boot, serial=line))
        self.virsh("create", str(path))

    def _start(self, save_format: str = "raw") -> None:
        (self.directory / "sock").mkdir(exist_ok=True)
        (self.directory / "sock" / "libvirt-sock").unlink(missing_ok=True)
        (self.directory / "qemu.conf").write_text(_QEMU_CONF.format(save_format=save_format))
        (self.directory / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(directory=self.directory))
        with open(self.directory / "log", "wb") as log:
            self._daemon = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _START, "sh", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while not (self.directory / "sock" / "libvirt-sock").exists():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                said = (self.directory / "log").read_text(errors="replace")[-2000:]
                raise LibvirtError(f"libvirtd did not start (status {self._daemon.poll()})\n{said}")
            time.sleep(0.05)

    @uninterrupted()
    def close(self) -> None:
        """End its guests and itself; remove its directory."""
        for pid in (self.directory / "run/libvirt/qemu").glob("*.pid"):
            try:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError, FileNotFoundError):
                continue
        self._end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()


class SerialLine:
    """The guest's agent, over a socket to which the domain connects, when it is restored once more."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(PATIENCE)
        self._line: socket.socket | None = None
        self._unread = b""
        self._questions = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        if self._line is not None:
            self._line.close()

    def accept(self) -> None:
        """The next connection; to be called when the domain was started or restored."""
        if self._line is not None:
            self._line.close()
        self._line = self._listener.accept()[0]
        self._line.settimeout(PATIENCE)
        self._unread = b""

    def ask(self, command: str) -> str:
        """The rest of the line that the agent answers with."""
        assert self._line is not None
        self._line.sendall(command.encode() + b"\n")
        return self.expect(rf"^{re.escape(command.split()[0])} (.*)$")[1]

    def ping(self) -> tuple[str, int]:
        """The guest's boot nonce and its count of tenths of a second."""
        assert self._line is not None
        word = f"{os.getpid()}-{next(self._questions)}"
        self._line.sendall(f"ping {word}\n".encode())
        found = self.expect(rf"^pong {word} nonce=([0-9a-f]{{16}}) count=(\d+)$")
        return found[1], int(found[2])

    def expect(self, pattern: str) -> re.Match[str]:
        assert self._line is not None
        while True:
            while b"\n" not in self._unread:
                data = self._line.recv(65536)
                if not data:
                    raise LibvirtError(f"the serial line ended before {pattern!r}")
                self._unread += data
            line, _, self._unread = self._unread.partition(b"\n")
            if found := re.search(pattern, line.decode(errors="replace").rstrip("\r")):
                return found
