"""Which RAM block of a QEMU machine is the guest's memory, and where the machine puts it.

A migration stream names the machine type and the RAM blocks with their sizes; where a block is mapped is the
machine's own knowledge. As in QEMU's hw/i386/pc_piix.c, pc_q35.c and microvm.c, checked against `info mtree -f` of
QEMU 7.2 (the rest of RAM begins at 4 GiB):

| machine             | RAM is split when it is      | bytes below 4 GiB then |
|---------------------|------------------------------|------------------------|
| pc-i440fx-2.0 on    | 0xe0000000 or more           | 0xc0000000             |
| pc-i440fx-1.x, isapc| 0xe0000000 or more           | 0xe0000000             |
| pc-q35-2.0 on       | 0xb0000000 or more           | 0x80000000             |
| microvm             | more than 0xc0000000         | 0xc0000000             |
| pseries, s390-ccw   | never, RAM begins at zero    |                        |
| virt-N.N (Arm)      | never, RAM begins at 1 GiB   |                        |

The address that an x-ignore-shared stream carries with each block does not help: it is the block's place inside its
container, zero for main memory, and says nothing of the hole below 4 GiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from imagefs.errors import UnsupportedInputError
from imagefs.image.geometry import Geometry, Region, flat_geometry

ABOVE_4G = 1 << 32
_SMALLEST_HOLE = 0x8000_0000
_HYPERTRANSPORT_HOLE = 0xFD_0000_0000

SECOND_BLOCK_LIMIT = 64 << 20
"""A block beside main memory that is at least this large is taken for guest memory as well."""

_DEVICE_MEMORY = re.compile(r"(^|[._-])(bios|rom|flash\d*|vram\w*|nvram|vgamem)$")
_DEFAULT_BLOCKS = frozenset(
    ("pc.ram", "microvm.ram", "mach-virt.ram", "ppc_spapr.ram", "s390.ram", "riscv_virt_board.ram")
)
"""What QEMU calls main memory where the user gives no memory backend (``default-ram-id`` of the machine)."""


def is_guest_memory(block: str) -> bool:
    """Whether a RAM block's name is that of a memory backend or of a machine's own main memory.

    Devices put their bus address before a slash (``0000:00:02.0/vga.vram``), firmware files are ``/rom@…``; backends
    are ``/objects/ID`` for machine types up to 3.1 and plain ``ID`` after that.
    """
    name = block.removeprefix("/objects/")
    return "/" not in name and not _DEVICE_MEMORY.search(name)


def main_block(blocks: Mapping[str, int], offset: int) -> str:
    """The block that is the guest's memory, out of names and sizes in bytes.

    It is the largest that :func:`is_guest_memory`, or the one that bears a machine's default name. Raises
    UnsupportedInputError, at the table's ``offset``, where there is none, or where a second one is too large to be
    anything but guest memory too: NUMA nodes with backends of their own, memory that was plugged in.
    """
    field = "RAM block table"
    candidates = sorted((name for name in blocks if is_guest_memory(name)), key=lambda name: -blocks[name])
    if not candidates:
        raise UnsupportedInputError(
            f"none of the blocks {', '.join(map(repr, blocks)) or '(none)'} looks like main memory",
            field=field,
            offset=offset,
        )
    main = next((name for name in candidates if name in _DEFAULT_BLOCKS), candidates[0])
    for other in candidates:
        if other != main and (blocks[other] >= SECOND_BLOCK_LIMIT or blocks[other] == blocks[main]):
            raise UnsupportedInputError(
                f"blocks {main!r} ({blocks[main]:,} bytes) and {other!r} ({blocks[other]:,} bytes) both look like guest"
                " memory; guests with several memory backends are not supported yet",
                field=field,
                offset=offset,
            )
    return main


def memory_layout(machine: str, size: int) -> tuple[Geometry, list[str]]:
    """Where ``size`` bytes of main memory are in guest-physical memory, and remarks on what had to be assumed."""
    notes = []
    low = _bytes_below_4g(machine, size)
    if low is None:
        if re.match(r"virt-\d", machine):
            return Geometry((Region("ram", 1 << 30, size, 0),)), ["taken for an Arm virt machine: RAM begins at 1 GiB"]
        if not re.match(r"pseries|s390-ccw", machine) and size > _SMALLEST_HOLE:
            notes.append(f"where machine {machine!r} puts its RAM is not known: addresses count from zero")
        return flat_geometry(size), notes
    if low == size:
        return flat_geometry(size), notes
    if ABOVE_4G + size - low > _HYPERTRANSPORT_HOLE:
        notes.append("on AMD CPUs QEMU moves RAM above 4 GiB to 1 TiB: addresses there may differ")
    regions = (Region("ram-below-4g", 0, low, 0), Region("ram-above-4g", ABOVE_4G, size - low, low))
    return Geometry(regions), notes


def _bytes_below_4g(machine: str, size: int) -> int | None:
    """None for machines without a hole below 4 GiB, or unknown ones. Assumes no max-ram-below-4g: not in the stream."""
    old = re.match(r"pc-((i440fx|q35)-)?[01]\.", machine) is not None
    if machine == "pc" or re.match(r"pc-(i440fx-|[01]\.)", machine):
        limit, low = 0xE000_0000, 0xE000_0000 if old else 0xC000_0000
    elif machine == "isapc":
        limit, low = 0xE000_0000, 0xE000_0000
    elif machine == "q35" or machine.startswith("pc-q35-"):
        limit, low = 0xB000_0000, 0xB000_0000 if old else 0x8000_0000
    elif machine == "microvm":
        limit, low = 0xC000_0000, 0xC000_0000
    else:
        return None
    return min(low, size) if size >= limit else size
