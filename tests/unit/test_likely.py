"""What is likely to be touched first: told by registers and page tables as an operating system builds them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from imagefs.formats.structure import with_structure
from imagefs.image import likely
from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.likely import groups, likely_pages
from imagefs.image.linux import USER_TABLES
from imagefs.image.vcpu import VcpuState
from tests.unit.captures import capture_of
from tests.unit.tables import NO_EXECUTE, PRESENT, USER, WRITABLE, Mapper, Ram, paging

ACCESSED = 0x20
IMAGE = 0xFFFF_FFFF_8100_0000
LINEAR = 0xFFFF_8880_0000_0000
STACKS = 0xFFFF_C900_0000_0000
PROGRAM = 0x0000_5555_5555_0000
HEAP = PROGRAM + (64 << 20)
TEXT, DATA, STACK, CODE, FAR = range(400, 410), range(420, 424), range(300, 304), range(500, 502), range(600, 608)


class Kernel:
    """Text and data in one piece, memory mapped as a whole, stacks by single pages, and a program with a heap."""

    def __init__(self) -> None:
        self.ram = Ram(1024, 512)
        self.mapper = Mapper(self.ram, 4, [2, *range(4, 200)])
        self.map(IMAGE, TEXT, PRESENT | ACCESSED)
        self.map(IMAGE + (TEXT[-1] + 1 - TEXT[0]) * PAGE_SIZE, DATA, PRESENT | WRITABLE | ACCESSED | NO_EXECUTE)
        self.map(STACKS, STACK, PRESENT | WRITABLE | ACCESSED | NO_EXECUTE)
        self.map(LINEAR, range(512), PRESENT | WRITABLE | ACCESSED | NO_EXECUTE)
        self.map(PROGRAM, CODE[:1], PRESENT | USER | ACCESSED)
        self.map(PROGRAM + likely.CLOSE, CODE[1:], PRESENT | USER | WRITABLE | NO_EXECUTE)
        self.map(HEAP, FAR, PRESENT | USER | WRITABLE | ACCESSED | NO_EXECUTE)
        self.kinds = [PageKind(TEXT.start, len(TEXT), "ktext")]
        self.vcpu = replace(paging(4, self.mapper.root), rip=IMAGE + 0x123, rsp=STACKS + 0x2FF8, mode="long")

    def map(self, virtual: int, pages: Iterable[int], flags: int) -> None:
        for number, page in enumerate(pages):
            self.mapper.map(virtual + number * PAGE_SIZE, self.ram.address(page) | flags)

    def source(self) -> BytesSource:
        return BytesSource(bytes(self.ram.data))

    def likely(self, *vcpus: VcpuState) -> tuple[range, ...]:
        return likely_pages(self.source(), self.ram.geometry, vcpus or [self.vcpu], self.kinds)

    def groups(self, *vcpus: VcpuState) -> dict[str, list[int]]:
        found = groups(self.source(), self.ram.geometry, vcpus or [self.vcpu], self.kinds)
        return {name: sorted(pages) for name, pages in found.items()}


def test_each_group_has_its_pages() -> None:
    found = Kernel().groups()
    assert list(found) == ["registers", "mappings", "data", "text", "program"]
    # RIP is at the first page of the text, from where data are reached, too; of RSP both sides are stacks.
    assert found["registers"] == sorted([*STACK, *TEXT, *DATA])
    # Those of the image are single pages as well. The linear map is none of it.
    assert found["mappings"] == sorted([*STACK, *TEXT, *DATA])
    assert found["data"] == list(DATA)
    assert found["text"] == list(TEXT)
    assert found["program"] == list(CODE), "what lies close to code, not the heap"


def test_runs_are_disjoint_and_in_order() -> None:
    kernel = Kernel()
    kernel.vcpu = replace(kernel.vcpu, rip=PROGRAM)
    runs = kernel.likely()
    pages = [page for run in runs for page in run]
    assert len(pages) == len(set(pages))
    assert {*STACK, *TEXT, *DATA, *CODE} <= set(pages)
    # Around the registers, then the image.
    assert set(STACK) <= {page for run in runs[:2] for page in run}
    assert not set(FAR) & set(pages)


def test_nothing_is_known_of_a_guest_without_paging() -> None:
    kernel = Kernel()
    kernel.kinds = []
    assert kernel.likely(VcpuState(cr0=0x11, mode="real")) == ()
    assert kernel.likely(VcpuState()) == ()


def test_data_are_told_only_with_a_linux_kernels_text() -> None:
    kernel = Kernel()
    kernel.kinds = []
    assert kernel.groups()["data"] == []


def test_a_vcpu_in_a_program_has_the_kernels_tables_in_the_frame_before() -> None:
    """Page-table isolation: bit 12 of CR3 leads to tables with next to nothing of the kernel."""
    kernel = Kernel()
    user = Mapper(kernel.ram, 4, [3, *range(200, 220)])
    user.map(PROGRAM, kernel.ram.address(CODE[0]) | PRESENT | USER)
    assert user.root == kernel.mapper.root | USER_TABLES
    found = kernel.groups(replace(kernel.vcpu, cr3=user.root))
    assert found["data"] == list(DATA)
    assert found["program"] == list(CODE[:1])


def test_what_is_found_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(likely, "MAX_GROUP", 3)
    assert sum(map(len, kernel.likely())) <= 5 * 3
    monkeypatch.setattr(likely, "MAX_RUNS", 1)
    assert len(kernel.likely()) == 1


def test_tables_of_rubbish(rng: random.Random) -> None:
    ram = Ram(64, 64)
    ram.data[:] = rng.randbytes(len(ram.data))
    vcpu = replace(paging(4, 0x3000), rip=IMAGE, rsp=STACKS, gdt_base=0, idt_base=1 << 63)
    for run in likely_pages(BytesSource(bytes(ram.data)), ram.geometry, [vcpu], [PageKind(5, 3, "ktext")]):
        assert 0 <= run.start < run.stop <= 64


def test_a_capture_gets_it_unless_its_source_knows_better() -> None:
    kernel = Kernel()
    memory = bytes(kernel.ram.data)
    capture = capture_of(memory, geometry=kernel.ram.geometry, vcpus=(kernel.vcpu,))
    assert set(STACK) <= {page for run in with_structure(capture).likely for page in run}
    assert with_structure(replace(capture, essential=(PageKind(1, 1, "pml4"),))).likely == ()
