"""Which RAM blocks of a QEMU machine are the guest's memory, and where the machine puts them.

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

Several blocks are guest memory where NUMA nodes have backends of their own: then RAM is the nodes one after the other,
split as above. And where memory was plugged in (pc-dimm): from the first GiB boundary behind RAM on (4 GiB at least),
each module at the next multiple of 2 MiB, unless its ``addr`` was given by hand. The block table tells nodes from
modules as little as their order; so a backend is a module if its name says ``dimm`` or if the machine has a block of
its own (``pc.ram``), unless that contradicts what the firmware was told (qemu_cmos.py); and the order is that of the
names, the numbers in them counted as numbers (libvirt: ``ram-node0``, …; ``memdimm0``, …). Only x-ignore-shared streams
carry an address with each block, its place in RAM as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from imagefs.errors import UnsupportedInputError
from imagefs.image.geometry import Geometry, Region

ABOVE_4G = 1 << 32
_SMALLEST_HOLE = 0x8000_0000
_HYPERTRANSPORT_HOLE = 0xFD_0000_0000
_MODULES_ALIGNED, _MODULE_ALIGNED = 1 << 30, 2 << 20

SECOND_BLOCK_LIMIT = 64 << 20
"""Bytes. A backend beside main memory that is at least this large, or as large as that, is guest memory as well; a
smaller one only by its name."""

_DEVICE_MEMORY = re.compile(r"(^|[._-])(bios|rom|flash\d*|vram\w*|nvram|vgamem)$")
DEFAULT_BLOCKS = frozenset(
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


def may_be_guest_memory(name: str, size: int, before: Mapping[str, int]) -> bool:
    """Whether a block is guest memory, as far as its name, its size in bytes and the memory ``before`` it tell."""
    if not is_guest_memory(name):
        return False
    if name in DEFAULT_BLOCKS or not before or size >= SECOND_BLOCK_LIMIT or size == max(before.values()):
        return True
    return "dimm" in name.lower() or _without_numbers(name) in map(_without_numbers, before)


def guest_memory(blocks: Mapping[str, int], offset: int) -> list[str]:
    """The blocks that are the guest's memory, out of names and sizes in bytes; in their order.

    That is a machine's own block or the largest backend, and those beside it that :func:`may_be_guest_memory`.
    Raises UnsupportedInputError, at the table's ``offset``, where there is none.
    """
    candidates = sorted((name for name in blocks if is_guest_memory(name)), key=lambda name: -blocks[name])
    if not candidates:
        raise UnsupportedInputError(
            f"none of the blocks {', '.join(map(repr, blocks)) or '(none)'} looks like main memory",
            field="RAM block table",
            offset=offset,
        )
    main = next((name for name in candidates if name in DEFAULT_BLOCKS), candidates[0])
    chosen = {main: blocks[main]}
    for other in candidates:
        if may_be_guest_memory(other, blocks[other], chosen):
            chosen[other] = blocks[other]
    return [name for name in blocks if name in chosen]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of guest memory are. ``ram`` makes up what ``-m`` said, by guest-physical address; ``plugged``
    are memory modules, likewise; ``notes`` say what had to be assumed."""

    geometry: Geometry
    ram: tuple[str, ...]
    plugged: tuple[str, ...]
    notes: tuple[str, ...]


def memory_layout(
    machine: str, blocks: Mapping[str, int], places: Mapping[str, int] | None = None, told: int | None = None
) -> Layout:
    """Where ``blocks``, names and sizes in bytes in the order of the flat memory, are in guest-physical memory.

    ``places`` are the addresses of an x-ignore-shared stream, ``told`` the bytes of RAM that the firmware knows of.
    Raises ValueError for modules in a machine of which it is not known where they go.
    """
    plugged = _by_number(name for name in blocks if len(blocks) > 1 and _is_module(name, blocks))
    ram = _by_number(name for name in blocks if name not in plugged) or [plugged.pop(0)]
    notes = []
    if len(blocks) > 1 and told is not None and sum(blocks[name] for name in ram) != told:
        for some in (list(blocks), *([name] for name in blocks)):
            if sum(blocks[name] for name in some) == told:
                ram, plugged = _by_number(some), _by_number(name for name in blocks if name not in some)
                break
        else:
            notes.append(f"the firmware knows of {told:,} bytes of RAM, which these blocks do not make up")
    if len(ram) > 1:
        if places and len({places.get(name, 0) for name in ram}) == len(ram):
            ram.sort(key=lambda name: places.get(name, 0))
        else:
            notes.append(f"taken for NUMA nodes in the order of their names: {', '.join(ram)}")
    spans, end, remarks = _ram_spans(machine, sum(blocks[name] for name in ram))
    notes += remarks
    regions = _cut(ram, blocks, spans)
    if plugged:
        regions += _modules(machine, plugged, blocks, end)
        notes.append(f"taken for memory modules, plugged in in the order of their names: {', '.join(plugged)}")
    offsets = dict(zip(blocks, accumulate(blocks.values(), initial=0), strict=False))
    placed = (Region(name, at, size, offsets[block] + start) for block, start, name, at, size in regions)
    geometry = Geometry(tuple(sorted(placed, key=lambda region: region.offset)))
    return Layout(geometry, tuple(ram), tuple(plugged), tuple(notes))


_Piece = tuple[str, int, str, int, int]
"""Block, offset in it, name of the region, guest-physical address, size."""


def _ram_spans(machine: str, size: int) -> tuple[list[tuple[str, int, int]], int, list[str]]:
    """RAM of ``size`` bytes as names, addresses and sizes; where modules may begin; and remarks."""
    low = _bytes_below_4g(machine, size)
    if low is None:
        if re.match(r"virt-\d", machine):
            return [("ram", 1 << 30, size)], 0, ["taken for an Arm virt machine: RAM begins at 1 GiB"]
        notes = []
        if not re.match(r"pseries|s390-ccw", machine) and size > _SMALLEST_HOLE:
            notes = [f"where machine {machine!r} puts its RAM is not known: addresses count from zero"]
        return [("ram", 0, size)], 0, notes
    if low == size:
        return [("ram", 0, size)], ABOVE_4G, []
    notes = []
    if ABOVE_4G + size - low > _HYPERTRANSPORT_HOLE:
        notes = ["on AMD CPUs QEMU moves RAM above 4 GiB to 1 TiB: addresses there may differ"]
    return [("ram-below-4g", 0, low), ("ram-above-4g", ABOVE_4G, size - low)], ABOVE_4G + size - low, notes


def _cut(ram: Sequence[str], blocks: Mapping[str, int], spans: Sequence[tuple[str, int, int]]) -> list[_Piece]:
    """The blocks one after the other, cut where RAM is."""
    pieces: list[_Piece] = []
    begin = 0
    for block in ram:
        stop = begin + blocks[block]
        at = 0
        for span, address, size in spans:
            first, last = max(begin, at), min(stop, at + size)
            if first < last:
                name = span if len(ram) == 1 else block + span.removeprefix("ram")
                pieces.append((block, first - begin, name, address + first - at, last - first))
            at += size
        begin = stop
    return pieces


def _modules(machine: str, plugged: Sequence[str], blocks: Mapping[str, int], end: int) -> list[_Piece]:
    if not re.match(r"pc-(i440fx|q35)-|pc$|q35$", machine):
        raise ValueError(f"where machine {machine!r} puts plugged memory ({', '.join(plugged)}) is not known")
    pieces: list[_Piece] = []
    at = _align(end, _MODULES_ALIGNED)
    for block in plugged:
        at = _align(at, _MODULE_ALIGNED)
        pieces.append((block, 0, block, at, blocks[block]))
        at += blocks[block]
    return pieces


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _align(address: int, unit: int) -> int:
    return (address + unit - 1) // unit * unit


def _is_module(name: str, blocks: Mapping[str, int]) -> bool:
    return name not in DEFAULT_BLOCKS and ("dimm" in name.lower() or not DEFAULT_BLOCKS.isdisjoint(blocks))


def _by_number(names: Iterable[str]) -> list[str]:
    """``node2`` before ``node10``."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


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
