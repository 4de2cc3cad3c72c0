"""How guest memory is laid out in the flat ``memory`` file, in pages, windows and guest frames.

``memory`` holds the guest's RAM regions end to end. A *page number* counts pages of that file; a *page frame
number* (pfn) counts pages of guest-physical address space. A *window* is a fixed run of ``chunk_pages`` pages
of a stream: the unit that is compressed, digested and fetched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

PAGE_SIZE = 4096
"""Bytes of a page: the only size that format version 1 knows."""

DEFAULT_CHUNK_PAGES = 16
"""64 KiB. On a genuine 256 MiB guest 64 KiB windows store 1.007 x what one zstd -3 stream takes."""


@dataclass(frozen=True, slots=True)
class Region:
    """One contiguous piece of guest-physical RAM. All fields but ``name`` in bytes, multiples of a page."""

    name: str
    guest_address: int
    size: int
    offset: int
    """Where the region begins in the flat ``memory`` file."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The flat memory of one image: regions sorted by ``offset``, end to end, without gaps in the file."""

    regions: tuple[Region, ...]

    def __post_init__(self) -> None:
        end = 0
        for region in self.regions:
            if region.offset != end or region.size <= 0:
                raise ValueError(f"region {region.name!r} does not begin where the one before it ends")
            if region.size % PAGE_SIZE or region.guest_address % PAGE_SIZE:
                raise ValueError(f"region {region.name!r} is not made of whole pages")
            end += region.size
        spans = sorted((r.guest_address, r.guest_address + r.size, r.name) for r in self.regions)
        for (_, stop, name), (start, _, other) in pairwise(spans):
            if start < stop:
                raise ValueError(f"regions {name!r} and {other!r} overlap in guest-physical memory")

    @property
    def size(self) -> int:
        """Bytes of the flat ``memory`` file."""
        return sum(region.size for region in self.regions)

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE

    def page_of_pfn(self, pfn: int) -> int | None:
        """Page number in ``memory`` of a guest page frame, or None where the guest has no RAM there."""
        address = pfn * PAGE_SIZE
        for region in self.regions:
            if region.guest_address <= address < region.guest_address + region.size:
                return (region.offset + address - region.guest_address) // PAGE_SIZE
        return None

    def pfn_of_page(self, page: int) -> int:
        """Guest page frame number of a page of ``memory``; IndexError past its end."""
        offset = page * PAGE_SIZE
        index = bisect_right([region.offset for region in self.regions], offset) - 1
        if index < 0 or offset >= self.regions[index].offset + self.regions[index].size:
            raise IndexError(f"page {page} is beyond the memory's {self.pages} pages")
        region = self.regions[index]
        return (region.guest_address + offset - region.offset) // PAGE_SIZE

    def pfn_runs(self) -> Iterator[tuple[int, int]]:
        """``(first pfn, count)`` of each region, by guest-physical address."""
        for region in sorted(self.regions, key=lambda r: r.guest_address):
            yield region.guest_address // PAGE_SIZE, region.size // PAGE_SIZE


def flat_geometry(size: int, name: str = "ram") -> Geometry:
    """One region at guest-physical address zero, for memory of which nothing more is known."""
    return Geometry((Region(name, 0, size, 0),))
