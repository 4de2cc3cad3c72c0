"""Regions out of ranges of guest-physical memory, as formats name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from imagefs.image.geometry import PAGE_SIZE, Region

MAX_RANGES = 16384
"""Ranges of physical memory. Firmware makes some tens."""
MAX_REGIONS = 256
"""Where more pieces of memory are left by ballooning, or by leaving pages out, the smallest gaps are filled with zero
pages."""


def place_range(regions: list[Region], address: int, length: int) -> int:
    """Where in memory a range goes; ``regions`` grow by the pages that it touches."""
    end = -(-(address + length) // PAGE_SIZE) * PAGE_SIZE
    first = address // PAGE_SIZE * PAGE_SIZE
    offset = 0
    if regions:
        before = regions[-1]
        offset = before.offset + before.size
        if first <= before.guest_address + before.size:  # it goes on where that ended, perhaps within one page
            regions[-1] = Region(before.name, before.guest_address, end - before.guest_address, before.offset)
            return before.offset + address - before.guest_address
    regions.append(Region(f"ram-{first:#x}", first, end - first, offset))
    return offset + address - first


def regions_of(runs: Callable[[], Iterable[tuple[int, int]]]) -> Iterator[Region]:
    """Of frames that are there, at most MAX_REGIONS. ``runs`` gives ``(first frame, count)``, ascending and apart, and
    is called twice."""
    gaps = [0] * 65  # how many there are, by their length in bits
    end = 0
    for pfn, count in runs():
        gaps[(pfn - end).bit_length()] += 1
        end = pfn + count
    bits = 0
    while sum(gaps[bits:]) > MAX_REGIONS:
        bits += 1
    smallest = 1 << bits >> 1
    number, offset = 0, 0
    first, end = 0, 0
    for pfn, count in runs():
        if end and pfn - end >= smallest:
            yield Region(f"ram{number}", first * PAGE_SIZE, (end - first) * PAGE_SIZE, offset)
            number += 1
            offset += (end - first) * PAGE_SIZE
            end = 0
        if not end:
            first = pfn
        end = pfn + count
    if end:
        yield Region(f"ram{number}", first * PAGE_SIZE, (end - first) * PAGE_SIZE, offset)
