"""Page tables as an operating system builds them, in a guest's memory with a hole, for tests of whoever reads them."""

from __future__ import annotations

from collections.abc import Iterable

from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.vcpu import VcpuState

PRESENT, WRITABLE, USER, LARGE = 0x01, 0x02, 0x04, 0x80
NO_EXECUTE = 1 << 63
KINDS = ("", "pt", "pd", "pdpt", "pml4", "pml5")

PG, PE = 1 << 31, 1
PSE, PAE, LA57 = 1 << 4, 1 << 5, 1 << 12
LMA = 1 << 10
ABOVE = 4 << 30


def paging(levels: int, root: int) -> VcpuState:
    """As firmware and kernels set the registers; ``root`` may have CR3's low bits too."""
    cr4 = {0: 0, 2: PSE, 3: PAE, 4: PAE | PSE, 5: PAE | LA57}[levels]
    return VcpuState(PE | (PG if levels else 0), root, cr4, (LMA | 0x901) if levels >= 4 else 0)


class Ram:
    """Guest memory in two regions with a hole between them, as a flat file; addresses are guest-physical."""

    def __init__(self, pages: int = 64, low: int = 32) -> None:
        regions = [Region("low", 0, low * PAGE_SIZE, 0)]
        if pages > low:
            regions.append(Region("high", ABOVE, (pages - low) * PAGE_SIZE, low * PAGE_SIZE))
        self.geometry = Geometry(tuple(regions))
        self.data = bytearray(self.geometry.size)

    def page(self, address: int) -> int:
        page = self.geometry.page_of_pfn(address // PAGE_SIZE)
        assert page is not None
        return page

    def address(self, page: int) -> int:
        return self.geometry.pfn_of_page(page) * PAGE_SIZE

    def set(self, table: int, index: int, entry: int, width: int = 8) -> None:
        at = self.page(table) * PAGE_SIZE + table % PAGE_SIZE + index * width
        self.data[at : at + width] = entry.to_bytes(width, "little")

    def get(self, table: int, index: int, width: int = 8) -> int:
        at = self.page(table) * PAGE_SIZE + table % PAGE_SIZE + index * width
        return int.from_bytes(self.data[at : at + width], "little")


class Mapper:
    """Builds tables as an operating system does, and notes the frames it takes for them."""

    def __init__(self, ram: Ram, levels: int, frames: Iterable[int], root: int | None = None) -> None:
        self.ram = ram
        self.levels = levels
        self.frames = iter(frames)
        self.tables: dict[int, str] = {}
        self.root = self.table(levels) if root is None else root

    def table(self, level: int) -> int:
        page = next(self.frames)
        self.tables[page] = KINDS[level]
        return self.ram.address(page)

    def map(self, virtual: int, entry: int, large_at: int = 0) -> None:
        """Put ``entry`` into the table of level 1, or the level at which a large page is mapped."""
        bits, width = (10, 4) if self.levels == 2 else (9, 8)
        table = self.root
        for level in range(self.levels, 0, -1):
            index = virtual >> (12 + bits * (level - 1)) & ((1 << (2 if (self.levels, level) == (3, 3) else bits)) - 1)
            if level == max(large_at, 1):
                self.ram.set(table, index, entry | (LARGE if large_at else 0), width)
                return
            if not self.ram.get(table, index, width) & PRESENT:
                self.ram.set(table, index, self.table(level - 1) | PRESENT | WRITABLE | USER, width)
            table = self.ram.get(table, index, width) & (0xFFFF_F000 if width == 4 else 0x000F_FFFF_FFFF_F000)
