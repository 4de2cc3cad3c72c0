"""The walk from CR3: what a builder of page tables has built is found, and hostile tables end."""

from __future__ import annotations

import logging
import random
import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.chunks import Codec
from imagefs.image.fields import canonical_json
from imagefs.image.geometry import PAGE_SIZE, flat_geometry
from imagefs.image.metadata import MAX_DOCUMENT_SIZE
from imagefs.image.pagetables import MAX_FRAMES, walk
from imagefs.image.vcpu import VcpuState
from tests.unit.tables import ABOVE, KINDS, LARGE, NO_EXECUTE, PE, PG, PRESENT, PSE, USER, WRITABLE, Mapper, Ram, paging


def walked(ram: Ram, *vcpus: VcpuState, limit: int = MAX_FRAMES) -> dict[int, str]:
    return by_page(walk(BytesSource(bytes(ram.data)), ram.geometry, vcpus, limit=limit))


def by_page(found: Sequence[PageKind]) -> dict[int, str]:
    """Checks the form of the answer too: ascending, disjoint, joined."""
    for run, after in pairwise(found):
        assert run.first + run.count < after.first or (
            run.first + run.count == after.first and run.kind != after.kind
        ), (run, after)
    return {page: run.kind for run in found for page in range(run.first, run.first + run.count)}


@pytest.mark.expect_log("1 of the guest's page tables are not in its RAM and passed over: the first at 0xfee00000")
@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_tables_of_a_guest(levels: int, rng: random.Random) -> None:
    """Exactly the frames that hold tables, wherever they are; large pages, swapped-out pages and devices are none."""
    low, pages = (64, 64) if levels == 2 else (32, 64)
    ram = Ram(pages, low)
    order = list(range(low)) if levels == 3 else list(range(pages))
    rng.shuffle(order)
    mapper = Mapper(ram, levels, order)
    bits = 32 if levels <= 3 else 48 if levels == 4 else 57
    for _ in range(8):
        virtual = rng.getrandbits(bits)
        if rng.random() < 0.7:
            mapper.map(virtual, ram.address(rng.randrange(pages)) | PRESENT | USER)
        else:
            mapper.map(virtual, rng.randrange(64) << 22 | PRESENT, large_at=2)
    # Not present, whatever else is in it; and a device's register window, outside RAM.
    free = [index for index in range(512) if not ram.get(mapper.root, index, 4 if levels == 2 else 8)]
    if levels != 3:
        ram.set(mapper.root, free[0], ram.address(order[-1]) | WRITABLE, 4 if levels == 2 else 8)
        ram.set(mapper.root, free[1], 0xFEE0_0000 | PRESENT, 4 if levels == 2 else 8)
    assert walked(ram, paging(levels, mapper.root | 0x18)) == mapper.tables


def test_huge_pages_at_every_level() -> None:
    ram = Ram()
    mapper = Mapper(ram, 4, range(10, 60))
    mapper.map(0x0000_0000_0000, 0x4000 | PRESENT, large_at=3)
    mapper.map(0x7F00_0000_0000, 0x4000 | PRESENT, large_at=3)
    mapper.map(0x7F00_4000_0000, 0x4000 | PRESENT, large_at=2)
    assert sorted(mapper.tables.values()) == ["pd", "pdpt", "pdpt", "pml4"]
    assert walked(ram, paging(4, mapper.root)) == mapper.tables


def test_flags_beside_the_address() -> None:
    """No-execute and the protection key above the address, PCID below it in CR3."""
    ram = Ram()
    mapper = Mapper(ram, 4, [33, 34, 35, 36])
    mapper.map(0, PRESENT)
    for page in (33, 34, 35):
        table = ram.address(page)
        ram.set(table, 0, ram.get(table, 0) | NO_EXECUTE | 0x7FF << 52 | 0xE68)
    assert walked(ram, paging(4, mapper.root | 0xABC)) == mapper.tables


def test_large_pages_of_32_bits_need_pse() -> None:
    ram = Ram(32)
    ram.set(0x1000, 0, 0x2000 | PRESENT | LARGE, 4)
    with_pse = VcpuState(PG | PE, 0x1000, PSE, 0)
    without = VcpuState(PG | PE, 0x1000, 0, 0)
    assert walked(ram, with_pse) == {1: "pd"}
    assert walked(ram, without) == {1: "pd", 2: "pt"}


def test_pae_roots_share_a_frame() -> None:
    """32 bytes each: two vCPUs' in one frame lead to different directories."""
    ram = Ram()
    ram.set(0x1000 + 0x20, 3, 0x2000 | PRESENT)
    ram.set(0x1000 + 0xFE0, 0, 0x3000 | PRESENT)
    ram.set(0x1000 + 0x40, 0, 0x4000 | PRESENT)
    states = [paging(3, 0x1020), paging(3, 0x1FE0)]
    assert walked(ram, *states) == {1: "pdpt", 2: "pd", 3: "pd"}


def test_several_vcpus() -> None:
    """Different processes with the kernel's tables in common; one vCPU has not been started."""
    ram = Ram()
    kernel = Mapper(ram, 4, range(1, 10))
    kernel.map(0xFFFF_8000_0000_0000, PRESENT)
    users = []
    for frames in (range(10, 20), range(40, 50)):
        user = Mapper(ram, 4, frames)
        ram.set(user.root, 256, ram.get(kernel.root, 256))
        user.map(0x40_0000, PRESENT)
        users.append(user)
    shared = {page: kind for page, kind in kernel.tables.items() if kind != "pml4"}
    states = [*(paging(4, user.root) for user in users), paging(0, kernel.root)]
    assert walked(ram, *states) == shared | users[0].tables | users[1].tables


def test_vcpus_with_different_levels() -> None:
    """One is on its way into 5-level paging, with the same root: both readings of it are followed."""
    ram = Ram()
    mapper = Mapper(ram, 5, range(8, 20))
    mapper.map(0x40_0000, PRESENT)
    for states in ([paging(4, mapper.root), paging(5, mapper.root)], [paging(5, mapper.root), paging(4, mapper.root)]):
        assert walked(ram, *states) == mapper.tables


def test_no_paging() -> None:
    ram = Ram()
    ram.set(0, 0, 0x1000 | PRESENT)
    assert walked(ram) == walked(ram, paging(0, 0)) == {}


@pytest.mark.expect_log("1 of the guest's page tables are not in its RAM")
@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("root", [0x0010_0000, 0xFFFF_F000, 0xF_FFFF_FFFF_F000])
def test_root_outside_ram(levels: int, root: int) -> None:
    ram = Ram(32)
    assert walked(ram, paging(levels, root)) == {}


@pytest.mark.expect_log("not in its RAM")
def test_many_tables_outside_ram(caplog: pytest.LogCaptureFixture) -> None:
    """They are remembered up to a limit, since each frame can name 512 of them."""
    ram = Ram(32)
    for number in range(3):
        table = (number + 1) * PAGE_SIZE
        ram.set(0, number, table | PRESENT)
        for index in range(512):
            ram.set(table, index, (0x100 + 512 * number + index) * PAGE_SIZE | PRESENT)
    assert walked(ram, paging(4, 0)) == {0: "pml4", 1: "pdpt", 2: "pdpt", 3: "pdpt"}
    assert [record.getMessage() for record in caplog.records] == [
        "1024 or more of the guest's page tables are not in its RAM and passed over: the first at 0x100000"
    ]


# Page-table isolation: the kernel's PGD and the user's in one aligned pair of pages.


@pytest.fixture
def isolated() -> tuple[Ram, Mapper, Mapper]:
    ram = Ram()
    kernel = Mapper(ram, 4, [4, *range(6, 20)])
    kernel.map(0x40_0000, PRESENT)
    kernel.map(0xFFFF_8000_0000_0000, PRESENT)
    user = Mapper(ram, 4, [5, *range(40, 50)])
    ram.set(user.root, 0, ram.get(kernel.root, 0))
    user.map(0xFFFF_FE00_0000_0000, PRESENT)
    ram.set(kernel.root, 0, ram.get(kernel.root, 0) | NO_EXECUTE | 0x20)
    return ram, kernel, user


@pytest.mark.parametrize("cr3", [0x4000, 0x5000])
def test_both_of_an_isolated_pair(isolated: tuple[Ram, Mapper, Mapper], cr3: int) -> None:
    ram, kernel, user = isolated
    assert walked(ram, paging(4, cr3 | 0x801)) == kernel.tables | user.tables


def test_other_neighbours_are_no_pair(isolated: tuple[Ram, Mapper, Mapper]) -> None:
    """Another process' tables, or the user half of a kernel thread: empty."""
    ram, kernel, user = isolated
    for entry in (0x1F000 | PRESENT | USER, 0):
        ram.set(user.root, 0, entry)
        assert walked(ram, paging(4, kernel.root)) == kernel.tables
    ram.set(kernel.root, 0, 0)
    assert 5 not in walked(ram, paging(4, kernel.root))


# Hostile tables.


def oracle(ram: Ram, levels: int, root: int) -> dict[int, str]:
    """Every path from the root, depth first; the highest role of each frame. Knows no page-table isolation."""
    roles: set[tuple[int, int]] = set()

    def visit(address: int, level: int) -> None:
        page = ram.geometry.page_of_pfn(address // PAGE_SIZE)
        if page is None or (page, level) in roles:
            return
        roles.add((page, level))
        if level == 1:
            return
        form, mask = ("<1024I", 0xFFFF_F000) if levels == 2 else ("<512Q", 0x000F_FFFF_FFFF_F000)
        data = bytes(ram.data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
        entries: Sequence[int] = struct.unpack(form, data)
        if (levels, level) == (3, 3):
            entries = [entry & ~LARGE for entry in entries[address % PAGE_SIZE // 8 :][:4]]
        for entry in entries:
            if entry & PRESENT and not entry & LARGE:
                visit(entry & mask, level - 1)

    visit(root, levels)
    return {page: KINDS[max(level for other, level in roles if other == page)] for page, _ in roles}


FLAGS = st.sampled_from([0, PRESENT, PRESENT, PRESENT | USER, PRESENT | LARGE, PRESENT | NO_EXECUTE])


@pytest.mark.expect_log("not in its RAM", "ends at")
@given(st.data(), st.sampled_from([2, 3, 4, 5]))
def test_any_tables(data: st.DataObject, levels: int) -> None:
    """Loops, self-references, frames in many roles, frames outside RAM: what the naive walk finds, and no more."""
    width = 4 if levels == 2 else 8
    ram = Ram(12, 6)
    targets = [ram.address(page) for page in range(12)]
    if levels == 2:
        targets = targets[:6]
    outside = [7 * PAGE_SIZE, 0xFFFF_F000] + ([ABOVE + 6 * PAGE_SIZE, 0xF_FFFF_FFFF_F000] if width == 8 else [])
    for _ in range(data.draw(st.integers(0, 40))):
        table = ram.address(data.draw(st.integers(0, 11)))
        index = data.draw(st.sampled_from([0, 1, 2, 3, 255, 256, 510, 511]))
        flags = data.draw(FLAGS) & ((1 << 8 * width) - 1)
        ram.set(table, index, data.draw(st.sampled_from(targets + outside)) | flags, width)
    root = ram.address(data.draw(st.integers(0, 5)))
    if levels >= 4:
        # Its neighbour has another user half: no pair.
        ram.set(root ^ PAGE_SIZE, 100, 0x1F000 | PRESENT)
        ram.set(root, 100, 0)
    elif levels == 3:
        # Its frame is no directory as well.
        for index in range(4):
            if ram.get(root, index) & ~(PAGE_SIZE - 1 | NO_EXECUTE) == root:
                ram.set(root, index, 0)
    expected = oracle(ram, levels, root)
    assert walked(ram, paging(levels, root)) == expected
    limit = data.draw(st.integers(0, 12))
    some = walked(ram, paging(levels, root), limit=limit)
    assert len(some) == min(limit, len(expected))
    assert some.items() <= expected.items()
    # Higher levels come first.
    left = [KINDS.index(kind) for page, kind in expected.items() if page not in some]
    if some and left:
        assert min(KINDS.index(kind) for kind in some.values()) >= max(left)


@pytest.mark.expect_log("not in its RAM")
@given(st.binary(min_size=0, max_size=64), st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
def test_any_bytes(seed: bytes, registers: list[int]) -> None:
    data = random.Random(seed).randbytes(4 * PAGE_SIZE)
    cr0, cr3, cr4, efer = registers
    states = [VcpuState(cr0, cr3, cr4, efer), VcpuState(cr0 | PG, cr3 & 0x3FFF, cr4, efer)]
    found = by_page(walk(BytesSource(data), flat_geometry(len(data)), states))
    assert all(0 <= page < 4 for page in found)


def test_windows_self_map() -> None:
    """The PML4 is in one of its own entries; then every table is mapped, and nothing else becomes one."""
    ram = Ram()
    mapper = Mapper(ram, 4, range(2, 30))
    for virtual in (0x1000, 0x40_0000, 0x7FF0_0000_0000, 0xFFFF_F800_0000_0000):
        mapper.map(virtual, ram.address(50) | PRESENT)
    ram.set(mapper.root, 0x1ED, mapper.root | PRESENT | WRITABLE)
    assert walked(ram, paging(4, mapper.root)) == mapper.tables


class Counting:
    """Counts reads by page."""

    def __init__(self, data: bytes) -> None:
        self._source = BytesSource(data)
        self.size = len(data)
        self.reads: list[int] = []

    def read_at(self, offset: int, length: int) -> memoryview:
        assert offset % PAGE_SIZE == 0
        assert length == PAGE_SIZE
        self.reads.append(offset // PAGE_SIZE)
        return self._source.read_at(offset, length)

    def next_data(self, offset: int) -> int:
        return self._source.next_data(offset)


def test_page_tables_proper_are_not_read() -> None:
    ram = Ram()
    mapper = Mapper(ram, 4, range(1, 60))
    for number in range(40):
        mapper.map(number << 21, PRESENT)
    source = Counting(bytes(ram.data))
    assert by_page(walk(source, ram.geometry, [paging(4, mapper.root)])) == mapper.tables
    # The root once more, beside its neighbour, to see whether they are a pair.
    assert sorted(source.reads) == [0, 1, 1, 2, 3]


@pytest.mark.expect_log("ends at 600 frames")
def test_limit(caplog: pytest.LogCaptureFixture) -> None:
    """Every frame is a table full of tables: the walk ends after so many frames, and says so."""
    pages = 1024
    entries = [
        struct.pack("<512Q", *((page * 7 + n) % pages * PAGE_SIZE | PRESENT for n in range(512)))
        for page in range(pages)
    ]
    source = Counting(b"".join(entries))
    caplog.set_level(logging.INFO, "imagefs")
    found = by_page(walk(source, flat_geometry(source.size), [paging(5, 0)], limit=600))
    assert len(found) == 600
    assert len(source.reads) <= 602
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the walk of the guest's page tables ends at 600 frames")
    ]
    source.reads.clear()
    caplog.clear()
    assert len(by_page(walk(source, flat_geometry(source.size), [paging(5, 0)]))) == pages
    assert len(source.reads) <= pages + 2
    assert not caplog.records


def test_list_of_frames_fits_into_the_metadata(rng: random.Random) -> None:
    """Of a guest of 64 GiB, each table by itself: small beside the object's 768 KiB."""
    pages = sorted(rng.sample(range(16 << 20), MAX_FRAMES))
    document = canonical_json({"page_tables": [[page, 1, "pdpt"] for page in pages]})
    assert len(document) < MAX_DOCUMENT_SIZE / 8
    assert len(Codec().compress(document)) < 80_000
