"""The guest's page-table frames, found as the MMU finds them: from CR3 down.

Their forms are in paging.py.

Each frame is read once, and page tables proper (pt), which are nearly all of them, never: their addresses are in the
tables above. What is found is a hint about which pages are wanted first; nothing depends on its being complete.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Iterator, Mapping

from imagefs.image.capture import ByteSource, PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.paging import (
    ADDRESS,
    ADDRESS_32,
    KINDS,
    LARGE,
    PAE_ROOT,
    PD,
    PDPT,
    PML4,
    PML5,
    PRESENT,
    PT,
)
from imagefs.image.vcpu import CR4_PSE, VcpuState

log = logging.getLogger(__name__)

MAX_FRAMES = 16384
"""Page tables for 32 GiB in pages of 4 KiB. If all are scattered their list takes 70 KB of the metadata object."""
MAX_OUTSIDE = 1024
"""Tables outside RAM that are told apart: hostile tables name 512 in each frame."""

_LONG_ENTRIES = struct.Struct("<512Q")
_SHORT_ENTRIES = struct.Struct("<1024I")
_PAE_ROOT_ENTRIES = struct.Struct("<4Q")
_USER_HALF = 256
_TWIN = 0x1000


def walk(
    memory: ByteSource, geometry: Geometry, vcpus: Iterable[VcpuState], *, limit: int = MAX_FRAMES
) -> tuple[PageKind, ...]:
    """The page-table frames of all vCPUs as runs of page numbers of ``memory``: ascending, disjoint, joined.

    A frame in several roles, as Windows' self-map makes them, gets the kind of the highest level. At most ``limit``
    frames: roots first, then level by level. Tables outside RAM are passed over; no content of memory is an error, but
    either of these is worth a warning, since no operating system makes them.

    Linux with page-table isolation has the kernel's PGD and the user's side by side in 8 KiB, and CR3 names one of
    them. The other one is walked too if their user halves lead to the same tables, because a vCPU that was stopped in
    user mode reaches nearly nothing of the kernel's.
    """
    walker = _Walker(memory, geometry, limit)
    try:
        walker.walk([vcpu for vcpu in vcpus if vcpu.levels])
    except _LimitReachedError:
        log.warning("the walk of the guest's page tables ends at %d frames", limit)
    if walker.outside:
        log.warning(
            "%d%s of the guest's page tables are not in its RAM and passed over: the first at %#x",
            len(walker.outside),
            " or more" if len(walker.outside) == MAX_OUTSIDE else "",
            min(walker.outside),
        )
    return tuple(_runs(walker.found))


class _LimitReachedError(Exception):
    pass


class _Walker:
    """``found``: the level by page number. A frame that is in it is not visited again, so loops end.
    ``outside``: addresses of tables that are not in RAM, the first MAX_OUTSIDE.

    Levels are finished from the top down, so a frame is visited in its highest role. That role finds whatever a
    lower one would: the same entries lead to the same frames, from which there are more levels to go. (Of a PAE root
    32 bytes are read, so there it holds for guests that do not use the rest of its frame as another table.)
    """

    def __init__(self, memory: ByteSource, geometry: Geometry, limit: int) -> None:
        self.found: dict[int, int] = {}
        self.outside: set[int] = set()
        self._memory = memory
        self._geometry = geometry
        self._limit = limit

    def walk(self, vcpus: Iterable[VcpuState]) -> None:
        pages: dict[int, list[int]] = {level: [] for level in KINDS}
        short: dict[int, int] = {}  # 32-bit page directories, and which bits lead past them
        roots = {(vcpu.levels, vcpu.cr3 or 0, (vcpu.cr4 or 0) & CR4_PSE) for vcpu in vcpus}
        for levels, cr3, large in sorted(roots, key=lambda root: (-root[0], *root[1:])):
            if levels >= 4:
                pages[levels] += self._long_roots(levels, cr3)
            elif levels == 3:
                pages[PD] += self._pae_directories(cr3)
            else:
                mask = PRESENT | (LARGE if large else 0)
                short.update((page, mask) for page in self._take([cr3 & ADDRESS_32], PD))
        for level in (PML5, PML4, PDPT, PD):
            for page in pages[level]:
                entries = self._read(_LONG_ENTRIES, page * PAGE_SIZE)
                addresses = [entry & ADDRESS for entry in entries if entry & (PRESENT | LARGE) == PRESENT]
                pages[level - 1] += self._take(addresses, level - 1)
        for page, mask in short.items():
            entries = self._read(_SHORT_ENTRIES, page * PAGE_SIZE)
            self._take([entry & ADDRESS_32 for entry in entries if entry & mask == PRESENT], PT)

    def _long_roots(self, levels: int, cr3: int) -> list[int]:
        address = cr3 & ADDRESS
        roots = self._take([address], levels)
        twin = self._geometry.page_of_pfn((address ^ _TWIN) // PAGE_SIZE)
        if roots and twin is not None:
            here, there = (
                [entry & ADDRESS if entry & PRESENT else None for entry in entries[:_USER_HALF]]
                for entries in (self._read(_LONG_ENTRIES, page * PAGE_SIZE) for page in (roots[0], twin))
            )
            if here == there and any(address is not None for address in here):
                roots += self._take([address ^ _TWIN], levels)
        return roots

    def _pae_directories(self, cr3: int) -> list[int]:
        self._take([cr3 & ADDRESS_32], PDPT)
        page = self._geometry.page_of_pfn((cr3 & ADDRESS_32) // PAGE_SIZE)
        if page is None:
            return []
        # Of 32 bytes, so several processes' may share a frame, and each is read.
        entries = self._read(_PAE_ROOT_ENTRIES, page * PAGE_SIZE + (cr3 & PAE_ROOT) % PAGE_SIZE)
        return self._take([entry & ADDRESS for entry in entries if entry & PRESENT], PD)

    def _take(self, addresses: Iterable[int], level: int) -> list[int]:
        """The page numbers of those frames that are in RAM and new."""
        pages = []
        for address in addresses:
            page = self._geometry.page_of_pfn(address // PAGE_SIZE)
            if page is None:
                if len(self.outside) < MAX_OUTSIDE:
                    self.outside.add(address)
            elif page not in self.found:
                if len(self.found) >= self._limit:
                    raise _LimitReachedError
                self.found[page] = level
                pages.append(page)
        return pages

    def _read(self, form: struct.Struct, offset: int) -> tuple[int, ...]:
        data = self._memory.read_at(offset, form.size)
        return form.unpack(data) if len(data) == form.size else ()


def _runs(levels: Mapping[int, int]) -> Iterator[PageKind]:
    """Neighbours of the same kind as one."""
    first, count, kind = 0, 0, 0
    for page, level in sorted(levels.items()):
        if page != first + count or level != kind:
            if count:
                yield PageKind(first, count, KINDS[kind])
            first, count, kind = page, 0, level
        count += 1
    if count:
        yield PageKind(first, count, KINDS[kind])
