"""The kernel's side of a mount: finding it, tuning it, seeing that it is gone, taking it away. Linux only."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

log = logging.getLogger(__name__)

FILESYSTEM_TYPE = "fuse.imagefs"
MAX_BACKGROUND = 1024
"""Reads that the kernel lets be in flight. Its default of 12 would be a trap: reads of ``memory`` go through readahead,
so a thirteenth reader of a page that is here waited behind twelve whose pages are not."""
CONGESTED = 64
"""Reads in flight from which on the kernel stops to read ahead, so that demand has the way to itself."""

_MNT_DETACH = 2
# The numbers of these are the same on all architectures.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mount_id: int
    device: str
    """``major:minor``."""
    mountpoint: str
    filesystem_type: str
    source: str

    @property
    def connection(self) -> str:
        """Name of the connection's directory in fusectl."""
        return self.device.partition(":")[2]


def mounts() -> list[Mount]:
    """All mounts, those mounted last at the end. Asks no filesystem."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, tail = line.partition(" - ")
        mount_id, _, device, _, mountpoint, *_ = fields.split(" ")
        kind, source, *_ = tail.split(" ")
        found.append(Mount(int(mount_id), device, _unescape(mountpoint), kind, _unescape(source)))
    return found


def topmost(mountpoint: str) -> Mount | None:
    """What is mounted at an absolute path without symbolic links. Nothing is asked of the filesystem there."""
    return next((mount for mount in reversed(mounts()) if mount.mountpoint == mountpoint), None)


def fuse_descriptors() -> set[int]:
    """This process's descriptors of /dev/fuse: pyfuse3 does not tell which one it has."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}") == "/dev/fuse":
                found.add(int(entry))
    return found


async def wait_until_severed(descriptor: int) -> None:
    """Return when the connection behind a descriptor of /dev/fuse is gone: unmounted, aborted, or ``umount -f``.

    pyfuse3's own loop notices, too, but does not end while a read waits. An epoll descriptor of our own that asks for
    nothing is still told of POLLERR, and never of requests.
    """
    with select.epoll() as epoll:
        epoll.register(descriptor, 0)
        await trio.lowlevel.wait_readable(epoll.fileno())


def set_readahead(mount: Mount, kib: int) -> None:
    """How much the kernel reads ahead of readers of this mount, for files opened from now on. Takes root."""
    try:
        Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(str(kib))
    except OSError as error:
        log.warning("readahead=%d: %s; it stays as it is", kib, error)


def allow_many_reads(mount: Mount) -> None:
    """Raise the number of reads in flight to MAX_BACKGROUND, where that is permitted."""
    try:
        with fusectl() as directory:
            for name, value in (("max_background", MAX_BACKGROUND), ("congestion_threshold", CONGESTED)):
                descriptor = os.open(f"{mount.connection}/{name}", os.O_WRONLY, dir_fd=directory)
                try:
                    os.write(descriptor, str(value).encode())
                finally:
                    os.close(descriptor)
    except OSError as error:
        log.warning("no more than 12 reads of memory can wait at a time: %s", error)


def detach(mount: Mount) -> None:
    """Unmount lazily, if it is still there and nothing else has been mounted over it."""
    now = topmost(mount.mountpoint)
    if now is None or (now.mount_id, now.device) != (mount.mount_id, mount.device):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mount.mountpoint), _MNT_DETACH) == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    # Not root: the set-user-id helper that has mounted it.
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["fusermount3", "-u", "-z", "--", mount.mountpoint], check=True, timeout=10, capture_output=True)
        return
    log.warning("%s: cannot be unmounted: %s", mount.mountpoint, reason)


@contextmanager
def fusectl() -> Iterator[int]:
    """A directory descriptor of fusectl: where it is mounted, otherwise of an instance that is mounted nowhere."""
    place = next((mount.mountpoint for mount in mounts() if mount.filesystem_type == "fusectl"), None)
    if place is not None:
        descriptor = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        context = _syscall(_FSOPEN, b"fusectl", _CLOEXEC)
        try:
            _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            descriptor = _syscall(_FSMOUNT, context, _CLOEXEC, 0)
        finally:
            os.close(context)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _syscall(number: int, *args: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fusectl")
    return result


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text
