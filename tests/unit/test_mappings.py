"""The list of what is mapped: what a builder of page tables mapped, and what single translations say."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE, flat_geometry
from imagefs.image.mappings import Half, MappedPage, mapped_pages
from imagefs.image.translate import AddressSpace
from imagefs.image.vcpu import VcpuState
from tests.unit.tables import NO_EXECUTE, PRESENT, USER, WRITABLE, Mapper, Ram, paging

ACCESSED, DIRTY = 0x20, 0x40


def listed(ram: Ram, vcpu: VcpuState, limit: int = 1 << 16) -> list[MappedPage]:
    return list(mapped_pages(BytesSource(bytes(ram.data)), ram.geometry, vcpu, limit=limit))


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_what_was_mapped(levels: int, rng: random.Random) -> None:
    ram = Ram(256, 256 if levels == 2 else 128)
    mapper = Mapper(ram, levels, range(1, 128))
    bits = {2: 32, 3: 32, 4: 47, 5: 56}[levels]
    mapped = {}
    for _ in range(20):
        virtual = rng.getrandbits(bits) & -PAGE_SIZE
        if levels > 3 and rng.random() < 0.5:
            virtual += (1 << 64) - (1 << bits)
        if virtual not in mapped:
            mapped[virtual] = ram.address(rng.randrange(128, 256)) | rng.choice([0, ACCESSED, ACCESSED | DIRTY])
            mapper.map(virtual, mapped[virtual] | PRESENT)
    found = listed(ram, paging(levels, mapper.root | 0x18))
    assert [page.virtual for page in found] == sorted(mapped)
    for page in found:
        entry = mapped[page.virtual]
        assert (page.physical, page.size) == (entry & -PAGE_SIZE, PAGE_SIZE)
        assert (page.accessed, page.dirty) == (bool(entry & ACCESSED), bool(entry & DIRTY))


def test_halves() -> None:
    ram = Ram(256, 128)
    mapper = Mapper(ram, 4, range(1, 128))
    for virtual in (0x1000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000):
        mapper.map(virtual, ram.address(200) | PRESENT)
    vcpu, memory = paging(4, mapper.root), BytesSource(bytes(ram.data))
    lower, upper = (list(mapped_pages(memory, ram.geometry, vcpu, half=half)) for half in (Half.LOWER, Half.UPPER))
    assert [page.virtual for page in lower] == [0x1000, 0x7FFF_FFFF_F000]
    assert [page.virtual for page in upper] == [0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000]
    assert lower + upper == listed(ram, vcpu)
    assert list(mapped_pages(memory, ram.geometry, vcpu, half=Half.UPPER, limit=4)) == upper[:1], "and no warning"


def test_tables_that_lead_to_themselves_are_listed_once_in_a_half() -> None:
    ram = Ram(64, 64)
    root = 3 * PAGE_SIZE
    for index in range(512):
        ram.set(root, index, root | PRESENT)
    found = list(mapped_pages(BytesSource(bytes(ram.data)), ram.geometry, paging(4, root), half=Half.LOWER))
    assert len(found) == 512
    assert {page.physical for page in found} == {root}


def test_rights_and_large_pages() -> None:
    ram = Ram()
    mapper = Mapper(ram, 4, range(1, 30))
    mapper.map(0x40_0000, ram.address(40) | PRESENT | WRITABLE | USER)
    mapper.map(0x4000_0000, 0x8000_0000 | PRESENT | NO_EXECUTE | ACCESSED, large_at=2)
    mapper.map(0x80_0000_0000, 0x4000_0000 | PRESENT | USER | DIRTY, large_at=3)
    small, large, huge = listed(ram, paging(4, mapper.root))
    assert small == MappedPage(0x40_0000, ram.address(40), PAGE_SIZE, True, True, True, False, False)
    assert large == MappedPage(0x4000_0000, 0x8000_0000, 2 << 20, False, False, False, True, False)
    assert huge == MappedPage(0x80_0000_0000, 0x4000_0000, 1 << 30, False, True, True, False, True)
    ram.set(mapper.root, 0, ram.get(mapper.root, 0) & ~(USER | WRITABLE) | NO_EXECUTE)
    small, large, huge = listed(ram, paging(4, mapper.root))
    assert (small.writable, small.user, small.executable) == (False, False, False)
    assert (huge.user, huge.executable) == (True, True)


def test_no_paging() -> None:
    assert listed(Ram(), paging(0, 0x1000)) == []


@pytest.mark.expect_log("ends after 100 page tables")
def test_tables_that_lead_to_themselves() -> None:
    ram = Ram()
    for index in range(512):
        ram.set(0x1000, index, 0x1000 | PRESENT)
    found = listed(ram, paging(4, 0x1000), limit=100)
    # The root, two on the way down, and the rest as page tables.
    assert len(found) == 97 * 512
    assert {page.physical for page in found} == {0x1000}


@pytest.mark.expect_log("ends after 50 page tables")
@given(st.binary(max_size=16), st.sampled_from([2, 3, 4, 5]))
def test_any_tables(seed: bytes, levels: int) -> None:
    """As single translations have it, in order, each address once."""
    source = random.Random(seed)
    pages = 8
    data = bytearray(pages * PAGE_SIZE)
    for _ in range(60):
        entry = (
            source.randrange(pages + 1) << 12 | source.choice([1, 3, 7, 0x81, 0x63]) | source.choice([0, NO_EXECUTE])
        )
        at = source.randrange(pages * 512) * 8
        data[at : at + 8] = entry.to_bytes(8, "little")
    memory, geometry, vcpu = (
        BytesSource(bytes(data)),
        flat_geometry(len(data)),
        paging(levels, source.randrange(pages) << 12),
    )
    space = AddressSpace(memory, geometry, vcpu)
    found = list(mapped_pages(memory, geometry, vcpu, limit=50))
    assert all(page.virtual + page.size <= after.virtual for page, after in pairwise(found))
    for page in found[:200]:
        one = space.translate(page.virtual)
        assert (one.physical, one.page_size) == (page.physical, page.size)
        assert (one.writable, one.user, one.executable) == (page.writable, page.user, page.executable)
        assert set(one.flags) - {"global"} == {name for name in ("accessed", "dirty") if getattr(page, name)}
