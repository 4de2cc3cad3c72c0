"""The forms of x86 page tables, as in the Intel SDM, volume 3A, chapter "Paging" (AMD64: volume 2, chapter 5).

An entry points to the next table if its bit 0 (present) is set and its bit 7 (page size) is not; tables have 4 KiB:

| levels | in force with              | root in CR3      | entries     | address in an entry | kinds                   |
|-------:|----------------------------|------------------|-------------|---------------------|-------------------------|
|      5 | CR4.LA57 and EFER.LMA      | bits 51–12       | 512 x 8     | bits 51–12          | pml5 pml4 pdpt pd pt    |
|      4 | EFER.LMA                   | bits 51–12       | 512 x 8     | bits 51–12          | pml4 pdpt pd pt         |
|      3 | CR4.PAE                    | bits 31–5: 4 x 8 | 512 x 8     | bits 51–12          | pdpt pd pt              |
|      2 | otherwise, if CR0.PG       | bits 31–12       | 1024 x 4    | bits 31–12          | pd pt; bit 7 if CR4.PSE |

Bit 7 makes an entry a large page in a pd (2 MiB, 4 MiB with two levels) and, with four levels and more, in a pdpt
(1 GiB). With two levels bits 20–13 of a large page are bits 39–32 of its address (PSE-36).
"""

from __future__ import annotations

from dataclasses import dataclass

from imagefs.image.vcpu import CR4_PSE, VcpuState

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, LARGE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
NO_EXECUTE = 1 << 63

ADDRESS = 0x000F_FFFF_FFFF_F000
ADDRESS_32 = 0xFFFF_F000
PAE_ROOT = 0xFFFF_FFE0

PT, PD, PDPT, PML4, PML5 = range(1, 6)
"""Levels, counted from the page up."""
KINDS = {PT: "pt", PD: "pd", PDPT: "pdpt", PML4: "pml4", PML5: "pml5"}


@dataclass(frozen=True, slots=True)
class Form:
    """How the tables of one vCPU are to be read: a line of the module's table."""

    levels: int
    large_pages: bool
    """Whether bit 7 makes a pd's entry a page."""

    @classmethod
    def of(cls, vcpu: VcpuState) -> Form:
        return cls(vcpu.levels, vcpu.levels > 2 or vcpu.cr4 is None or bool(vcpu.cr4 & CR4_PSE))

    @property
    def entry_size(self) -> int:
        return 8 if self.levels > 2 else 4

    @property
    def index_bits(self) -> int:
        return 9 if self.levels > 2 else 10

    def shift(self, level: int) -> int:
        """Bits of a virtual address below the index into a table of that level."""
        return 12 + self.index_bits * (level - 1)

    def entries(self, level: int) -> int:
        return 4 if self.is_pae_root(level) else 1 << self.index_bits

    def is_pae_root(self, level: int) -> bool:
        """Whether these are the four entries that CR3 leads to, which have no say in what is permitted."""
        return (self.levels, level) == (3, PDPT)

    def root(self, cr3: int) -> int:
        return cr3 & (ADDRESS if self.levels > 3 else PAE_ROOT if self.levels == 3 else ADDRESS_32)

    def table(self, entry: int) -> int:
        """The next table's address."""
        return entry & (ADDRESS if self.levels > 2 else ADDRESS_32)

    def is_page(self, level: int, entry: int) -> bool:
        """Whether a present entry is a page's, not a table's."""
        if level == PT or not entry & LARGE:
            return level == PT
        return (level == PD and self.large_pages) or (level == PDPT and self.levels > 3)

    def is_reserved(self, level: int, entry: int) -> bool:
        """Whether a present entry is neither a page's nor a table's."""
        return level >= PML4 and bool(entry & LARGE)

    def page(self, level: int, entry: int) -> int:
        """The page's address."""
        whole = -(1 << self.shift(level))
        if self.levels > 2:
            return entry & ADDRESS & whole
        return entry & ADDRESS_32 & whole | ((entry >> 13 & 0xFF) << 32 if level == PD else 0)
