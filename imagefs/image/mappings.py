"""Everything that one vCPU's page tables map, page by page: what is executable, what was accessed, what was written.

The MMU sets an entry's accessed bit when it uses it, and a page's dirty bit when it writes; operating systems clear
them when they look for pages that are not in use. Pages whose bit is set are those that the guest has used lately.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from imagefs.image import paging
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.vcpu import VcpuState

log = logging.getLogger(__name__)

MAX_TABLES = 1 << 16
"""Tables that are read, one as often as it is reached: 128 GiB in pages of 4 KiB. Tables that lead to themselves are
read again and again: all of them would be 512 to the power of the levels."""

_RIGHTS = paging.WRITABLE | paging.USER
_UPPER_HALF = 256


@dataclass(frozen=True, slots=True)
class MappedPage:
    """A page, or a large one, of ``size`` bytes: at ``virtual`` for the guest, at guest-physical ``physical``."""

    virtual: int
    physical: int
    size: int
    writable: bool
    user: bool
    executable: bool
    accessed: bool
    dirty: bool


class Half(Enum):
    """Of the address space of a 64-bit guest: programs are in the lower one, the kernel is in the upper one."""

    LOWER = range(_UPPER_HALF)
    UPPER = range(_UPPER_HALF, 2 * _UPPER_HALF)


class _LimitReachedError(Exception):
    pass


def mapped_pages(
    memory: ByteSource, geometry: Geometry, vcpu: VcpuState, *, limit: int = MAX_TABLES, half: Half | None = None
) -> Iterator[MappedPage]:
    """By virtual address, ascending as an unsigned number. Nothing while paging is off.

    Also what is mapped to no RAM: devices. After ``limit`` tables it ends, with a warning; tables outside RAM are
    passed over. Raises nothing for the memory's contents.

    Of one ``half`` alone it is a sample, without a warning: what one table maps in several places is listed in the
    first, so tables that lead to themselves are soon done with.
    """
    form = paging.Form.of(vcpu)
    if not form.levels:
        return
    reader = _Reader(memory, geometry, form, limit, half)
    try:
        yield from reader.below(form.root(vcpu.cr3 or 0), form.levels, 0, _RIGHTS)
    except _LimitReachedError:
        if half is None:
            log.warning("the list of what the guest has mapped ends after %d page tables", limit)


class _Reader:
    def __init__(
        self, memory: ByteSource, geometry: Geometry, form: paging.Form, limit: int, half: Half | None
    ) -> None:
        self._memory = memory
        self._geometry = geometry
        self._form = form
        self._left = limit
        self._once = half is not None
        self._seen: set[tuple[int, int]] = set()
        self._wanted = range(form.entries(form.levels)) if half is None else half.value

    def below(self, table: int, level: int, virtual: int, rights: int) -> Iterator[MappedPage]:
        """``rights``: what the levels above leave of writable and user, and no-execute if one of them has it."""
        form = self._form
        shift = form.shift(level)
        for index, entry in enumerate(self._entries(table, level)):
            if not entry & paging.PRESENT or form.is_reserved(level, entry):
                continue
            if level == form.levels and index not in self._wanted:
                continue
            at = virtual | index << shift
            if level == form.levels >= paging.PML4 and index >= _UPPER_HALF:
                at |= (1 << 64) - (1 << shift + form.index_bits)  # canonical
            here = rights
            if not form.is_pae_root(level):
                here = rights & entry & _RIGHTS | (rights | entry) & paging.NO_EXECUTE
            if form.is_page(level, entry):
                yield _page(at, form.page(level, entry), 1 << shift, entry, here)
            else:
                yield from self.below(form.table(entry), level - 1, at, here)

    def _entries(self, table: int, level: int) -> tuple[int, ...]:
        page = self._geometry.page_of_pfn(table // PAGE_SIZE)
        if page is None:
            return ()
        if self._once and (table, level) in self._seen:
            return ()
        if not self._left:
            raise _LimitReachedError
        if self._once:
            self._seen.add((table, level))
        self._left -= 1
        count, size = self._form.entries(level), self._form.entry_size
        data = self._memory.read_at(page * PAGE_SIZE + table % PAGE_SIZE, count * size)
        return struct.unpack(f"<{len(data) // size}{'Q' if size == 8 else 'I'}", data)


def _page(virtual: int, physical: int, size: int, entry: int, rights: int) -> MappedPage:
    return MappedPage(
        virtual,
        physical,
        size,
        bool(rights & paging.WRITABLE),
        bool(rights & paging.USER),
        not rights & paging.NO_EXECUTE,
        bool(entry & paging.ACCESSED),
        bool(entry & paging.DIRTY),
    )
