"""Where a 64-bit Linux kernel's text is, if the guest is one and it can be told beyond doubt.

The interrupt descriptor table leads there (Intel SDM, volume 3A, section 6.14: 256 gates of 16 bytes), and Linux maps
its image at 0xffffffff80000000 to 0xffffffffc0000000 (Documentation/arch/x86/x86_64/mm.rst), physically in one piece,
its text read-only and executable once it has booted. It is told only if

1. at least MIN_GATES gates are present, and all of them lead into that range;
2. the first and at least three quarters of them lead into one run of pages there that is mapped without a gap, for the
   kernel only, executable, not writable, and to physical memory in one piece (a dozen exceptions that no CPU has keep
   handlers that were in the discarded part of the image);
3. the kernel's banner, "Linux version ", is in the image behind that run: FreeBSD is at the same addresses.

A vCPU that runs a program may be on page tables that lead to little of the kernel (page-table isolation): those that
Linux keeps for the kernel are in the frame before, so they are tried first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace

from imagefs.image.capture import KERNEL_TEXT, ByteSource, PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.translate import AddressSpace
from imagefs.image.vcpu import VcpuState

IMAGE_START, IMAGE_END = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000
MIN_GATES = 20
"""An x86-64 kernel has a handler for each exception of the architecture; Linux has one for every vector."""
MAX_TEXT = 64 << 20
"""Bytes; Debian's kernel has 14 MiB of text."""
BANNER = b"Linux version "
BANNER_WITHIN = 32 << 20
"""Bytes behind the text; it is among the read-only data, which come next."""

_GATE = struct.Struct("<HHHHII")
_GATES = 256
_PRESENT, _TYPE, _INTERRUPT, _TRAP = 1 << 15, 0xF << 8, 0xE << 8, 0xF << 8
USER_TABLES = 0x1000
"""The bit of CR3 that is set while page tables are in force that have little of the kernel, if the guest has such."""
_PIECE = 1 << 20


def kernel_text(memory: ByteSource, geometry: Geometry, vcpus: Iterable[VcpuState]) -> tuple[PageKind, ...]:
    """The kernel's text as runs of pages of ``memory``; empty where it cannot be told. Raises nothing for the memory's
    contents."""
    for vcpu in vcpus:
        if vcpu.levels < 4 or vcpu.cr3 is None or vcpu.idt_base is None:
            continue
        for cr3 in sorted({vcpu.cr3 & ~USER_TABLES, vcpu.cr3}):
            space = AddressSpace(memory, geometry, replace(vcpu, cr3=cr3))
            found = _text(space, _handlers(space, vcpu.idt_base))
            if found is not None:
                start, stop, physical = found
                if _has_banner(memory, geometry, physical + stop - start):
                    return tuple(_pages(geometry, physical, stop - start))
    return ()


def _handlers(space: AddressSpace, idt: int) -> list[int]:
    """Where the gates lead; empty unless they are those of Linux."""
    table = space.read(idt, _GATES * _GATE.size)
    handlers = []
    for low, _, kind, middle, high, _ in _GATE.iter_unpack(table or b""):
        if kind & _PRESENT:
            address = low | middle << 16 | high << 32
            if kind & _TYPE not in (_INTERRUPT, _TRAP) or not IMAGE_START <= address < IMAGE_END:
                return []
            handlers.append(address)
    return handlers if len(handlers) >= MIN_GATES else []


def _text(space: AddressSpace, handlers: list[int]) -> tuple[int, int, int] | None:
    """Start and end of the run that has the handlers, and its physical address."""
    if not handlers:
        return None
    anchor = _text_page(space, handlers[0])
    if anchor is None:
        return None
    start, stop, physical = anchor
    while (
        stop - start < MAX_TEXT
        and (before := _text_page(space, start - 1))
        and physical - before[2] == start - before[0]
    ):
        start, physical = before[0], before[2]
    while stop - start < MAX_TEXT and (after := _text_page(space, stop)) and after[2] - physical == stop - start:
        stop = after[1]
    inside = sum(start <= handler < stop for handler in handlers)
    return (start, stop, physical) if 4 * inside >= 3 * len(handlers) else None


def _text_page(space: AddressSpace, virtual: int) -> tuple[int, int, int] | None:
    """Start, end and physical address of the page there, if it may be one of the text."""
    if not IMAGE_START <= virtual < IMAGE_END:
        return None
    found = space.translate(virtual)
    if not found.page_size or not found.executable or found.writable or found.user:
        return None
    start = virtual & -found.page_size
    return start, start + found.page_size, found.physical & -found.page_size


def _has_banner(memory: ByteSource, geometry: Geometry, physical: int) -> bool:
    for at in range(physical, physical + BANNER_WITHIN, _PIECE):
        page = geometry.page_of_pfn(at // PAGE_SIZE)
        if page is None:
            return False
        if BANNER in bytes(memory.read_at(page * PAGE_SIZE, _PIECE + len(BANNER) - 1)):
            return True
    return False


def _pages(geometry: Geometry, physical: int, size: int) -> Iterable[PageKind]:
    """Of RAM that may be in several regions; nothing of what is outside."""
    for region in geometry.regions:
        first = max(physical, region.guest_address)
        end = min(physical + size, region.guest_address + region.size)
        if first < end:
            offset = region.offset + first - region.guest_address
            yield PageKind(offset // PAGE_SIZE, (end - first) // PAGE_SIZE, KERNEL_TEXT)
