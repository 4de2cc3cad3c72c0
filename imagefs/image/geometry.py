"""How guest memory is laid out in the flat ``memory`` file, in pages, windows and guest frames.

``memory`` holds the guest's RAM regions end to end. A *page number* counts pages of that file; a *page frame
number* (pfn) counts pages of guest-physical address space. A *window* is a fixed run of ``chunk_pages`` pages
of a stream: the unit that is compressed, digested and fetched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """The flat memory of one image: regions sorted by ``offset``, end to end, without gaps in the file.

    There may be thousands of them (CRIU's), and each request to a mount asks: what is asked for is computed once.
    """

    regions: tuple[Region, ...]
    size: int = field(init=False, compare=False, repr=False)
    """Bytes of the flat ``memory`` file."""
    _offsets: tuple[int, ...] = field(init=False, compare=False, repr=False)
    _by_address: tuple[Region, ...] = field(init=False, compare=False, repr=False)
    _addresses: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        end = 0
        for region in self.regions:
            if region.offset != end or region.size <= 0:
                raise ValueError(f"region {region.name!r} does not begin where the one before it ends")
            if region.size % PAGE_SIZE or region.guest_address % PAGE_SIZE:
                raise ValueError(f"region {region.name!r} is not made of whole pages")
            end += region.size
        by_address = tuple(sorted(self.regions, key=lambda region: region.guest_address))
        for before, after in pairwise(by_address):
            if after.guest_address < before.guest_address + before.size:
                raise ValueError(f"regions {before.name!r} and {after.name!r} overlap in guest-physical memory")
        object.__setattr__(self, "size", end)
        object.__setattr__(self, "_offsets", tuple(region.offset for region in self.regions))
        object.__setattr__(self, "_by_address", by_address)
        object.__setattr__(self, "_addresses", tuple(region.guest_address for region in by_address))

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE

    def page_of_pfn(self, pfn: int) -> int | None:
        """Page number in ``memory`` of a guest page frame, or None where the guest has no RAM there."""
        address = pfn * PAGE_SIZE
        index = bisect_right(self._addresses, address) - 1
        if index < 0 or address >= self._addresses[index] + self._by_address[index].size:
            return None
        region = self._by_address[index]
        return (region.offset + address - region.guest_address) // PAGE_SIZE

    def pfn_of_page(self, page: int) -> int:
        """Guest page frame number of a page of ``memory``; IndexError past its end."""
        offset = page * PAGE_SIZE
        index = bisect_right(self._offsets, offset) - 1
        if index < 0 or offset >= self.regions[index].offset + self.regions[index].size:
            raise IndexError(f"page {page} is beyond the memory's {self.pages} pages")
        region = self.regions[index]
        return (region.guest_address + offset - region.offset) // PAGE_SIZE

    def pfn_runs(self) -> Iterator[tuple[int, int]]:
        """``(first pfn, count)`` of each region, by guest-physical address."""
        for region in self._by_address:
            yield region.guest_address // PAGE_SIZE, region.size // PAGE_SIZE


def flat_geometry(size: int, name: str = "ram") -> Geometry:
    """One region at guest-physical address zero, for memory of which nothing more is known."""
    return Geometry((Region(name, 0, size, 0),))
