"""Guest-virtual to guest-physical addresses, one at a time, as the MMU does it: see paging.py for the tables' forms."""

from __future__ import annotations

from dataclasses import dataclass

from imagefs.image import paging
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE, Geometry
from imagefs.image.vcpu import VcpuState

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
        self._form = paging.Form.of(vcpu)
        self._root = self._form.root(vcpu.cr3 or 0)
        self._memory = memory
        self._geometry = geometry
        self._tables: dict[int, bytes] = {}

    def translate(self, virtual: int) -> Translation:
        """Whatever the tables say, it ends after as many steps as there are levels, and raises nothing."""
        form = self._form
        if not form.levels:
            return Translation(virtual, (), virtual, PAGE_SIZE)
        if not self._is_canonical(virtual):
            return Translation(virtual, (), fault=f"no address of a guest with {form.levels} levels of page tables")
        steps: list[Step] = []
        table = self._root
        for level in range(form.levels, 0, -1):
            shift = form.shift(level)
            index = virtual >> shift & ((1 << form.index_bits) - 1)
            address = table + index * form.entry_size
            entry = self._entry(address)
            if entry is None:
                return Translation(
                    virtual, tuple(steps), fault=f"the {paging.KINDS[level]} at {table:#x} is not in RAM"
                )
            steps.append(Step(paging.KINDS[level], index, address, entry, not form.is_pae_root(level)))
            if not entry & paging.PRESENT:
                return Translation(virtual, tuple(steps), fault="not present")
            if form.is_reserved(level, entry):
                return Translation(virtual, tuple(steps), fault="a reserved bit is set")
            if form.is_page(level, entry):
                size = 1 << shift
                return Translation(virtual, tuple(steps), form.page(level, entry) | virtual & (size - 1), size)
            table = form.table(entry)
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
        levels = self._form.levels
        if levels <= 3:
            return 0 <= virtual < 1 << 32
        upper = virtual >> (47 if levels == 4 else 56)
        return upper in (0, (1 << (17 if levels == 4 else 8)) - 1)

    def _entry(self, address: int) -> int | None:
        frame, inside = divmod(address, PAGE_SIZE)
        table = self._tables.get(frame)
        if table is None:
            page = self._geometry.page_of_pfn(frame)
            if page is None:
                return None
            if len(self._tables) >= _KEPT_TABLES:
                self._tables.clear()
            table = self._tables[frame] = bytes(self._memory.read_at(page * PAGE_SIZE, PAGE_SIZE))
        return int.from_bytes(table[inside : inside + self._form.entry_size], "little")
