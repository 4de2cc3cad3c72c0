"""What a format reader hands to the writer: one captured VM, format-neutral.

Data flows formats -> image -> store. A reader consumes its source in one pass, spools what it must, and returns
a :class:`Capture`, whose parts the writer then reads by offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from imagefs.image.geometry import Geometry
from imagefs.image.native import NativeTemplate
from imagefs.image.native_files import NativeFile
from imagefs.image.vcpu import VcpuState


class ByteSource(Protocol):
    """Random-access bytes: a file, a spool, a literal in memory."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """``length`` bytes at ``offset``; fewer only at the end of the source. Holes read as zeros."""

    def next_data(self, offset: int) -> int:
        """The smallest offset >= ``offset`` that may hold a byte other than zero; ``size`` if there is none."""


@dataclass(frozen=True, slots=True)
class BytesSource:
    """A :class:`ByteSource` over bytes that are in memory anyway."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> memoryview:
        return memoryview(self.data)[offset : offset + length]

    def next_data(self, offset: int) -> int:
        return min(offset, len(self.data))


PAGE_TABLE_KINDS = ("pml5", "pml4", "pdpt", "pd", "pt")
"""From the root down."""
KERNEL_TEXT = "ktext"
PAGE_KINDS = (*PAGE_TABLE_KINDS, KERNEL_TEXT)


@dataclass(frozen=True, slots=True)
class PageKind:
    """``count`` pages from page number ``first`` of ``memory`` that are of one kind: see PAGE_KINDS."""

    first: int
    count: int
    kind: str


@dataclass(frozen=True)
class Capture:
    """One suspended VM as its format reader understood it.

    It owns nothing: its sources can be read as long as whoever made them keeps them open, which is what the context
    of :func:`imagefs.formats.open_capture` does.
    """

    source_format: str
    """The format's name, as ``--format`` takes it: ``qemu-migration``, ``raw``, …"""
    source_version: str
    geometry: Geometry
    memory: ByteSource
    native: NativeTemplate
    """How the split file is put together again from ``memory`` and literals, byte for byte."""
    state: ByteSource
    """What the VMM loads: its device state, without the pages; empty where the format has none."""
    config: Mapping[str, bytes] = field(default_factory=dict)
    """Whatever came along, by file name under ``config/``."""
    restore: Mapping[str, Any] = field(default_factory=dict)
    """What a restore needs to know (JSON values); ``{}`` for formats that can only be inspected."""
    vcpus: tuple[VcpuState, ...] = ()
    """What is known of the vCPUs, in the VMM's order."""
    essential: tuple[PageKind, ...] = ()
    """Page-table frames, which travel with the metadata, and kernel text. A reader leaves this empty, unless its source
    says itself which pages are page tables (as Xen's streams of PV guests do): otherwise they are found from ``vcpus``,
    see :mod:`imagefs.formats.structure`."""
    likely: tuple[range, ...] = ()
    """Runs of pages that the guest will probably touch first, the most wanted first. A reader leaves it empty, too."""
    native_files: tuple[NativeFile, ...] = ()
    """The files that ``native`` holds end to end, where a directory was split; empty where it is one file."""
