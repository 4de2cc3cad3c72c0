"""A mounted image as the commands see it that look at the guest: its metadata and its memory, through plain files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from imagefs.errors import MountError, UsageError
from imagefs.image.document import Document, parse_document
from imagefs.image.translate import AddressSpace
from imagefs.image.vcpu import VcpuState
from imagefs.restore.mountpoint import METADATA, read_metadata


class MountedMemory:
    """``MOUNT/memory``, a ByteSource of which nothing is read but what is asked for, in whole pages."""

    def __init__(self, path: Path) -> None:
        """MountError where it cannot be opened."""
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(f"{path}: {error.strerror}") from error
        # Otherwise the kernel reads 128 KiB around each page, across the link.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        os.close(self._fd)

    def read_at(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise MountError(f"{self._path}: at {offset:#x}: {error.strerror}") from error

    def next_data(self, offset: int) -> int:
        return min(offset, self.size)


@dataclass(frozen=True)
class MountedGuest:
    mountpoint: Path
    document: Document
    memory: MountedMemory

    def address_space(self, args: argparse.Namespace) -> AddressSpace:
        """As the options of :func:`add_vcpu_options` want it. UsageError where the image does not know enough."""
        return AddressSpace(self.memory, self.document.geometry, self._vcpu(args.cpu, args.cr3))

    def _vcpu(self, number: int, cr3: int | None) -> VcpuState:
        vcpus = self.document.vcpus
        if number < len(vcpus):
            return vcpus[number] if cr3 is None else replace(vcpus[number], cr3=cr3)
        if vcpus:
            raise UsageError(f"--cpu {number}: the guest has {len(vcpus)} vCPUs, counted from 0")
        if cr3 is None:
            raise UsageError(
                f"{self.mountpoint}: the image does not tell where the guest's page tables are; say it with --cr3"
            )
        return VcpuState(cr3=cr3)


@contextmanager
def mounted_guest(mountpoint: str) -> Iterator[MountedGuest]:
    """Raises MountError where no image is mounted, CorruptObjectError for a ``metadata.json`` that is none."""
    path = Path(mountpoint)
    document = parse_document(read_metadata(path), key=METADATA, origin=mountpoint)
    memory = MountedMemory(path / "memory")
    try:
        yield MountedGuest(path, document, memory)
    finally:
        memory.close()


def add_vcpu_options(parser: argparse.ArgumentParser) -> None:
    """``--cpu`` and ``--cr3``."""
    parser.add_argument("--cpu", metavar="N", type=count, default=0, help="the vCPU whose page tables are walked (0)")
    parser.add_argument(
        "--cr3", metavar="ADDR", type=count, help="walk these page tables instead: another process's, for one"
    )


def count(text: str) -> int:
    """A number that is not negative, 0x… in hexadecimal. For argparse."""
    value = int(text, 0)
    if not 0 <= value < 1 << 64:
        raise ValueError
    return value


count.__name__ = "number"  # what argparse calls it in its messages
