"""Pages that a resumed guest will probably touch first, by what its registers and page tables say.

In the order in which they are worth fetching, which ``scripts/simulate`` has found (docs/decisions.md):

1. around where RIP, RSP and the bases of the GDT and IDT point: the stack, the per-CPU area, the handlers;
2. what the kernel has mapped page by page elsewhere than where it maps all memory: stacks, per-CPU areas, modules,
   if it was accessed;
3. the kernel's data, and
4. its text, where :mod:`imagefs.image.linux` has found it;
5. the programs that run: their executable pages, and what lies close to those.

A guess only: of no consequence but for what is fetched sooner. Bounded in time and size, whatever the memory holds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

from imagefs.image.capture import KERNEL_TEXT, ByteSource, PageKind
from imagefs.image.geometry import DEFAULT_CHUNK_PAGES, PAGE_SIZE, Geometry
from imagefs.image.linux import IMAGE_END, IMAGE_START, USER_TABLES
from imagefs.image.mappings import Half, MappedPage, mapped_pages
from imagefs.image.translate import AddressSpace
from imagefs.image.vcpu import VcpuState

AROUND = 16
"""Pages on either side of where a register points."""
CLOSE = 256 << 10
"""Bytes between a program's executable pages and others of the same file, or its data."""
MAX_GROUP = 8192
"""Pages of each of the five groups: 32 MiB. Debian's kernel has 3600 of text and 4100 of data."""
MAX_RUNS = 2048
"""Runs in all: some 10 KB of the metadata object."""
MAX_TABLES = 512
"""Page tables read of each half of an address space: 1 GiB in pages of 4 KiB, half a second."""
MAX_SPACES = 4
"""Address spaces that are read: the vCPUs of a large guest may be in so many programs."""


def likely_pages(
    memory: ByteSource, geometry: Geometry, vcpus: Sequence[VcpuState], kinds: Iterable[PageKind]
) -> tuple[range, ...]:
    """Disjoint runs of page numbers of ``memory``, the most wanted first. Raises nothing for the memory's contents."""
    seen: set[int] = set()
    runs: list[range] = []
    for group in groups(memory, geometry, vcpus, kinds).values():
        fresh = set(islice(group, MAX_GROUP)) - seen
        seen |= fresh
        runs += _runs(fresh)
    return tuple(runs[:MAX_RUNS])


def groups(
    memory: ByteSource, geometry: Geometry, vcpus: Sequence[VcpuState], kinds: Iterable[PageKind]
) -> dict[str, Iterator[int]]:
    """Page numbers of each of the module's groups, by name, in order."""
    long = list({vcpu.cr3: vcpu for vcpu in vcpus if vcpu.levels >= 4}.values())[:MAX_SPACES]
    text = [range(kind.first, kind.first + kind.count) for kind in kinds if kind.kind == KERNEL_TEXT]
    kernel = _kernel(memory, geometry, long, text)
    data = (page for page in kernel if text and page.writable and IMAGE_START <= page.virtual < IMAGE_END)
    programs = chain.from_iterable(_program(memory, geometry, vcpu) for vcpu in long)
    return {
        "registers": _around_registers(memory, geometry, vcpus),
        "mappings": _numbers(geometry, _kernel_mappings(kernel)),
        "data": _numbers(geometry, data),
        "text": chain.from_iterable(text),
        "program": _numbers(geometry, programs),
    }


def _around_registers(memory: ByteSource, geometry: Geometry, vcpus: Iterable[VcpuState]) -> Iterator[int]:
    for vcpu in vcpus:
        space = AddressSpace(memory, geometry, vcpu)
        for register in (vcpu.rip, vcpu.rsp, vcpu.idt_base, vcpu.gdt_base):
            for page in range(-AROUND, AROUND + 1) if register is not None else ():
                found = space.translate((register or 0) + page * PAGE_SIZE)
                number = geometry.page_of_pfn(found.physical // PAGE_SIZE) if found.page_size else None
                if number is not None:
                    yield number


def _kernel(
    memory: ByteSource, geometry: Geometry, vcpus: Iterable[VcpuState], text: Sequence[range]
) -> list[MappedPage]:
    """What the kernel has mapped. With page-table isolation its tables are in the frame before; its text is in them."""
    mapped: list[MappedPage] = []
    for vcpu in vcpus:
        for cr3 in sorted({(vcpu.cr3 or 0) & ~USER_TABLES, vcpu.cr3 or 0}):
            mapped = list(mapped_pages(memory, geometry, replace(vcpu, cr3=cr3), limit=MAX_TABLES, half=Half.UPPER))
            executable = (geometry.page_of_pfn(page.physical // PAGE_SIZE) for page in mapped if page.executable)
            if mapped and (not text or text[0].start in executable):
                return mapped
    return mapped


def _kernel_mappings(kernel: Sequence[MappedPage]) -> Iterator[MappedPage]:
    # Where all memory is mapped, most pages are equally far above their physical address.
    distances: Counter[int] = Counter()
    for page in kernel:
        distances[page.virtual - page.physical] += page.size
    linear = max(distances, key=distances.__getitem__, default=0)
    for page in kernel:
        if page.size == PAGE_SIZE and page.accessed and not page.user and page.virtual - page.physical != linear:
            yield page


def _program(memory: ByteSource, geometry: Geometry, vcpu: VcpuState) -> Iterator[MappedPage]:
    mapped = mapped_pages(memory, geometry, vcpu, limit=MAX_TABLES, half=Half.LOWER)
    small = [page for page in mapped if page.size == PAGE_SIZE and page.user]
    code = [page.virtual for page in small if page.executable]
    for page in small:
        at = bisect_left(code, page.virtual)
        if any(abs(virtual - page.virtual) <= CLOSE for virtual in code[max(0, at - 1) : at + 1]):
            yield page


def _numbers(geometry: Geometry, mapped: Iterable[MappedPage]) -> Iterator[int]:
    for page in mapped:
        for physical in range(page.physical, page.physical + page.size, PAGE_SIZE):
            number = geometry.page_of_pfn(physical // PAGE_SIZE)
            if number is not None:
                yield number


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Ascending; those in the same window, or in windows side by side, as one."""
    run = range(0)
    for number in sorted(numbers):
        if run and number - run.stop < DEFAULT_CHUNK_PAGES:
            run = range(run.start, number + 1)
            continue
        if run:
            yield run
        run = range(number, number + 1)
    if run:
        yield run
