"""Single addresses through the page tables, against tables whose builder knows the answer, and against any tables."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE, flat_geometry
from imagefs.image.translate import AddressSpace, Translation
from imagefs.image.vcpu import VcpuState
from tests.unit.tables import LARGE, NO_EXECUTE, PG, PRESENT, USER, WRITABLE, Mapper, Ram, paging

ACCESSED, DIRTY, GLOBAL = 0x20, 0x40, 0x100
MIB = 1 << 20


def space(ram: Ram, vcpu: VcpuState) -> AddressSpace:
    return AddressSpace(BytesSource(bytes(ram.data)), ram.geometry, vcpu)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_pages_of_a_guest(levels: int, rng: random.Random) -> None:
    ram = Ram(256, 256 if levels == 2 else 128)
    tables = list(range(128))
    rng.shuffle(tables)
    mapper = Mapper(ram, levels, tables)
    lower, upper = {2: (32, 0), 3: (32, 0), 4: (47, 0xFFFF << 48), 5: (56, 0xFE << 56)}[levels]
    mapped = {}
    for _ in range(20):
        virtual = rng.getrandbits(lower) & -PAGE_SIZE
        if upper and rng.random() < 0.5:
            virtual = (1 << 64) - (1 << lower) + virtual
        mapped[virtual] = ram.address(rng.randrange(128, 256))
        mapper.map(virtual, mapped[virtual] | PRESENT | WRITABLE)
    guest = space(ram, paging(levels, mapper.root))
    for virtual, physical in mapped.items():
        inside = rng.randrange(PAGE_SIZE)
        found = guest.translate(virtual + inside)
        assert (found.physical, found.page_size, found.fault) == (physical + inside, PAGE_SIZE, "")
        assert [step.kind for step in found.steps] == ["pml5", "pml4", "pdpt", "pd", "pt"][-levels:]
        assert [ram.get(step.address, 0, 4 if levels == 2 else 8) for step in found.steps] == [
            step.entry for step in found.steps
        ]


@pytest.mark.parametrize(
    ("levels", "large_at", "size"),
    [(2, 2, 4 * MIB), (3, 2, 2 * MIB), (4, 2, 2 * MIB), (4, 3, 1024 * MIB), (5, 3, 1024 * MIB)],
)
def test_large_pages(levels: int, large_at: int, size: int) -> None:
    ram = Ram(32)
    mapper = Mapper(ram, levels, range(32))
    virtual, physical = 0x8000_0000, 3 * size
    mapper.map(virtual, physical | PRESENT | GLOBAL | 0x1000 * (levels > 2), large_at)  # bit 12 is of no address: PAT
    found = space(ram, paging(levels, mapper.root)).translate(virtual + 0x12345)
    assert (found.physical, found.page_size, found.flags) == (physical + 0x12345, size, ("global",))


def test_large_pages_of_36_bits() -> None:
    ram = Ram(32)
    ram.set(0x1000, 1, 5 << 13 | 0x40_0000 | LARGE | PRESENT, 4)
    found = space(ram, paging(2, 0x1000)).translate(0x40_0123)
    assert found.physical == 5 << 32 | 0x40_0123
    without = VcpuState(PG | 1, 0x1000, 0, 0)
    assert "not in RAM" in space(ram, without).translate(0x40_0123).fault


def test_rights_and_flags() -> None:
    """Every level has a say in what is permitted, the page's own entry in what was done."""
    ram = Ram()
    mapper = Mapper(ram, 4, range(1, 20))
    mapper.map(0x40_0000, ram.address(40) | PRESENT | WRITABLE | USER | ACCESSED)
    mapper.map(0x40_1000, ram.address(41) | PRESENT | NO_EXECUTE | ACCESSED | DIRTY)

    def rights(virtual: int) -> tuple[bool, bool, bool, tuple[str, ...]]:
        found = space(ram, paging(4, mapper.root)).translate(virtual)
        return found.writable, found.user, found.executable, found.flags

    assert rights(0x40_0000) == (True, True, True, ("accessed",))
    assert rights(0x40_1000) == (False, False, False, ("accessed", "dirty"))
    pml4 = ram.get(mapper.root, 0)
    ram.set(mapper.root, 0, pml4 & ~WRITABLE)
    assert rights(0x40_0000)[:3] == (False, True, True)
    ram.set(mapper.root, 0, pml4 & ~USER | NO_EXECUTE)
    assert rights(0x40_0000)[:3] == (True, False, False)


def test_rights_of_a_pae_root() -> None:
    """Its entries have none: the bits are reserved."""
    ram = Ram()
    mapper = Mapper(ram, 3, range(1, 20))
    mapper.map(0x40_0000, ram.address(40) | PRESENT | WRITABLE | USER)
    ram.set(mapper.root, 0, ram.get(mapper.root, 0) & ~(WRITABLE | USER))
    found = space(ram, paging(3, mapper.root)).translate(0x40_0000)
    assert (found.writable, found.user) == (True, True)


def test_where_it_ends() -> None:
    ram = Ram()
    mapper = Mapper(ram, 4, range(1, 20))
    mapper.map(0x40_0000, ram.address(40) | PRESENT)
    ram.set(mapper.root, 1, 0x7_0000_0000 | PRESENT)
    ram.set(mapper.root, 2, ram.get(mapper.root, 0) | LARGE)
    guest = space(ram, paging(4, mapper.root))

    def end(virtual: int) -> tuple[str, list[str]]:
        found = guest.translate(virtual)
        assert found.page_size == 0
        return found.fault, [step.kind for step in found.steps]

    assert end(0x40_1000) == ("not present", ["pml4", "pdpt", "pd", "pt"])
    assert end(0x60_0000) == ("not present", ["pml4", "pdpt", "pd"])
    assert end(0x4000_0000) == ("not present", ["pml4", "pdpt"])
    assert end(0x80_0000_0000) == ("the pdpt at 0x700000000 is not in RAM", ["pml4"])
    assert end(0x100_0000_0000) == ("a reserved bit is set", ["pml4"])
    assert end(0x8000_0000_0000) == ("no address of a guest with 4 levels of page tables", [])
    assert (
        space(ram, paging(2, 0x1000)).translate(1 << 32).fault == "no address of a guest with 2 levels of page tables"
    )
    assert space(ram, paging(4, 0x7_0000_0000)).translate(0).fault == "the pml4 at 0x700000000 is not in RAM"


def test_without_paging() -> None:
    assert space(Ram(), paging(0, 0)).translate(0x1234) == Translation(0x1234, (), 0x1234, PAGE_SIZE)


def test_read_across_pages() -> None:
    ram = Ram()
    mapper = Mapper(ram, 4, range(1, 20))
    mapper.map(0x40_0000, ram.address(40) | PRESENT)
    mapper.map(0x40_1000, ram.address(30) | PRESENT)
    mapper.map(0x40_3000, 0x7_0000_0000 | PRESENT)
    ram.data[41 * PAGE_SIZE - 3 : 41 * PAGE_SIZE] = b"abc"
    ram.data[30 * PAGE_SIZE : 30 * PAGE_SIZE + 3] = b"def"
    guest = space(ram, paging(4, mapper.root))
    assert guest.read(0x40_1000 - 3, 6) == b"abcdef"
    assert guest.read(0x40_1000, 0) == b""
    assert guest.read(0x40_1000, PAGE_SIZE + 1) is None
    assert guest.read(0x40_3000, 1) is None


@given(
    st.binary(max_size=32),
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4),
    st.sampled_from([0, 2, 3, 4, 5]),
)
def test_any_bytes(seed: bytes, virtual: int, registers: list[int], levels: int) -> None:
    """Tables full of anything, that lead to themselves too: it ends, within the tables' levels."""
    source = random.Random(seed)
    pages = 16
    data = bytearray(source.randbytes(pages * PAGE_SIZE))
    for at in range(0, len(data), 8 * source.randrange(1, 9)):
        entry = source.randrange(pages) << 12 | source.getrandbits(12) & ~0x80 | PRESENT
        data[at : at + 8] = entry.to_bytes(8, "little")
    cr0, cr3, cr4, efer = registers
    known = paging(levels, cr3 % len(data))
    for vcpu in (VcpuState(cr0, cr3, cr4, efer), known, replace(known, cr4=None, mode="long")):
        guest = AddressSpace(BytesSource(bytes(data)), flat_geometry(len(data)), vcpu)
        found = guest.translate(virtual)
        assert len(found.steps) <= vcpu.levels
        assert bool(found.page_size) != bool(found.fault)
        guest.read(virtual, 3 * PAGE_SIZE)
