"""Guest-virtual to guest-physical addresses, one at a time, as the MMU does it: see paging.py for the tables' forms."""

from __future__ import annotations

from dataclasses import dataclass

from imagefs.image import paging
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.vcpu import CR4_PSE, VcpuState

_KEPT_TABLES = 64


@dataclass(frozen=True, slots=True)
class Step:
    """One entry on the way: number ``index`` of the table of that ``kind``, at a guest-physical ``address``."""

    kind: str
    index: int
    address: int
    entry: int
    has_rights: bool = True
    """Whether the entry has a say in what is permitted: those of a PAE root have none."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What became of a ``virtual`` address. Where it leads nowhere, ``fault`` says why, and the last step where."""

    virtual: int
    steps: tuple[Step, ...]
    physical: int = 0
    page_size: int = 0
    """Bytes; 0 where it leads nowhere."""
    fault: str = ""

    @property
    def writable(self) -> bool:
        return all(step.entry & paging.WRITABLE for step in self.steps if step.has_rights)

    @property
    def user(self) -> bool:
        """Whether code outside of the kernel may use it."""
        return all(step.entry & paging.USER for step in self.steps if step.has_rights)

    @property
    def executable(self) -> bool:
        return not any(step.entry & paging.NO_EXECUTE for step in self.steps if step.has_rights)

    @property
    def flags(self) -> tuple[str, ...]:
        """What else the page's own entry says: accessed, dirty, global."""
        named = {"accessed": paging.ACCESSED, "dirty": paging.DIRTY, "global": paging.GLOBAL}
        return tuple(name for name, bit in named.items() if self.steps and self.steps[-1].entry & bit)


class AddressSpace:
    """The guest's memory as one vCPU sees it, by virtual addresses. Few reads: tables that were read are kept."""

    def __init__(self, memory: ByteSource, geometry: Geometry, vcpu: VcpuState) -> None:
        self.levels = vcpu.levels
        self._memory = memory
        self._geometry = geometry
        self._root = vcpu.cr3 or 0
        self._large_pages = self.levels > 2 or vcpu.cr4 is None or bool(vcpu.cr4 & CR4_PSE)
        self._tables: dict[int, bytes] = {}

    def translate(self, virtual: int) -> Translation:
        """Whatever the tables say, it ends after as many steps as there are levels, and raises nothing."""
        if not self.levels:
            return Translation(virtual, (), virtual, PAGE_SIZE)
        if not self._is_canonical(virtual):
            return Translation(virtual, (), fault=f"no address of a guest with {self.levels} levels of page tables")
        steps: list[Step] = []
        table = self._root & (paging.ADDRESS if self.levels > 3 else paging.ADDRESS_32)
        if self.levels == 3:
            table = self._root & paging.PAE_ROOT
        width, bits = (8, 9) if self.levels > 2 else (4, 10)
        for level in range(self.levels, 0, -1):
            shift = 12 + bits * (level - 1)
            index = virtual >> shift & ((1 << bits) - 1)
            address = table + index * width
            entry = self._entry(address, width)
            if entry is None:
                return Translation(
                    virtual, tuple(steps), fault=f"the {paging.KINDS[level]} at {table:#x} is not in RAM"
                )
            steps.append(Step(paging.KINDS[level], index, address, entry, (self.levels, level) != (3, paging.PDPT)))
            if not entry & paging.PRESENT:
                return Translation(virtual, tuple(steps), fault="not present")
            if level == paging.PT or self._is_page(level, entry):
                size = 1 << shift
                return Translation(virtual, tuple(steps), self._page(level, entry, size) | virtual & (size - 1), size)
            if level >= paging.PML4 and entry & paging.LARGE:
                return Translation(virtual, tuple(steps), fault="a reserved bit is set")
            table = entry & (paging.ADDRESS if width == 8 else paging.ADDRESS_32)
        raise AssertionError("a pt has pages only")

    def read(self, virtual: int, length: int) -> bytes | None:
        """None where not all of it is mapped to RAM."""
        pieces = []
        while length:
            found = self.translate(virtual)
            page = self._geometry.page_of_pfn(found.physical // PAGE_SIZE) if found.page_size else None
            if page is None:
                return None
            inside = virtual % PAGE_SIZE
            count = min(length, PAGE_SIZE - inside)
            pieces.append(bytes(self._memory.read_at(page * PAGE_SIZE + inside, count)))
            virtual += count
            length -= count
        return b"".join(pieces)

    def _is_canonical(self, virtual: int) -> bool:
        if self.levels <= 3:
            return 0 <= virtual < 1 << 32
        upper = virtual >> (47 if self.levels == 4 else 56)
        return upper in (0, (1 << (17 if self.levels == 4 else 8)) - 1)

    def _is_page(self, level: int, entry: int) -> bool:
        if not entry & paging.LARGE:
            return False
        return (level == paging.PD and self._large_pages) or (level == paging.PDPT and self.levels > 3)

    def _page(self, level: int, entry: int, size: int) -> int:
        if self.levels > 2:
            return entry & paging.ADDRESS & -size
        high = (entry >> 13 & 0xFF) << 32 if level == paging.PD else 0
        return entry & paging.ADDRESS_32 & -size | high

    def _entry(self, address: int, width: int) -> int | None:
        frame, inside = divmod(address, PAGE_SIZE)
        table = self._tables.get(frame)
        if table is None:
            page = self._geometry.page_of_pfn(frame)
            if page is None:
                return None
            if len(self._tables) >= _KEPT_TABLES:
                self._tables.clear()
            table = self._tables[frame] = bytes(self._memory.read_at(page * PAGE_SIZE, PAGE_SIZE))
        return int.from_bytes(table[inside : inside + width], "little")
