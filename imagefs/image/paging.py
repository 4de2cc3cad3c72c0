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

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, LARGE, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
NO_EXECUTE = 1 << 63

ADDRESS = 0x000F_FFFF_FFFF_F000
ADDRESS_32 = 0xFFFF_F000
PAE_ROOT = 0xFFFF_FFE0

PT, PD, PDPT, PML4, PML5 = range(1, 6)
"""Levels, counted from the page up."""
KINDS = {PT: "pt", PD: "pd", PDPT: "pdpt", PML4: "pml4", PML5: "pml5"}
