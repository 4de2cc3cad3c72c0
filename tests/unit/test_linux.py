"""Kernel text is told of a Linux guest, and of nothing that only looks like one."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.linux import kernel_text
from imagefs.image.vcpu import VcpuState
from tests.unit.tables import NO_EXECUTE, PRESENT, USER, WRITABLE, Mapper, Ram, paging

IDT = 0xFFFF_FE00_0000_0000
TEXT = 0xFFFF_FFFF_9BA0_0000
TEXT_PAGES, RODATA_PAGES = 12, 4
FIRST = 40
"""Page of RAM with the first of the text."""
BANNER = b"Linux version 6.1.0 (somebody@somewhere)"


class Guest:
    """A kernel: text, then read-only data with a banner; an IDT with a handler for each vector."""

    def __init__(self, levels: int = 4, user: bool = False) -> None:
        self.ram = Ram(128, 64)
        self.mapper = Mapper(self.ram, levels, [2, *range(4, 30)])
        for page in range(TEXT_PAGES):
            self.map_text(page, self.ram.address(FIRST + page) | PRESENT)
        for page in range(TEXT_PAGES, TEXT_PAGES + RODATA_PAGES):
            self.map_text(page, self.ram.address(FIRST + page) | PRESENT | NO_EXECUTE)
        self.mapper.map(IDT, self.ram.address(33) | PRESENT | NO_EXECUTE)
        self.handlers = [TEXT + 0x800 + 8 * vector for vector in range(256)]
        self.write(FIRST + TEXT_PAGES + 1, 1000, BANNER)
        self.kind = 0x8E00
        self.vcpu = replace(paging(levels, self.mapper.root), idt_base=IDT, mode="long")

    def map_text(self, page: int, entry: int) -> None:
        self.mapper.map(TEXT + page * PAGE_SIZE, entry)

    def write(self, page: int, inside: int, data: bytes) -> None:
        at = page * PAGE_SIZE + inside
        self.ram.data[at : at + len(data)] = data

    def found(self, *vcpus: VcpuState) -> tuple[PageKind, ...]:
        for vector, handler in enumerate(self.handlers):
            gate = struct.pack("<HHHHII", handler & 0xFFFF, 0x10, self.kind, handler >> 16 & 0xFFFF, handler >> 32, 0)
            self.write(33, 16 * vector, gate if handler else bytes(16))
        return kernel_text(BytesSource(bytes(self.ram.data)), self.ram.geometry, vcpus or [self.vcpu])


WHOLE = (PageKind(FIRST, TEXT_PAGES, "ktext"),)


@pytest.mark.parametrize("levels", [4, 5])
def test_text_is_found(levels: int) -> None:
    assert Guest(levels).found() == WHOLE


def test_handlers_of_exceptions_that_no_cpu_has() -> None:
    """They stay in the part of the image that was discarded after the start."""
    guest = Guest()
    guest.handlers[18:32] = [0xFFFF_FFFF_9D04_E0A2 + 9 * number for number in range(14)]
    assert guest.found() == WHOLE


def test_vcpu_in_a_program() -> None:
    """Its page tables have the IDT and a page of the text; the kernel's own are in the frame before."""
    guest = Guest()
    user = Mapper(guest.ram, 4, [3, *range(80, 90)])
    user.map(IDT, guest.ram.address(33) | PRESENT)
    user.map(TEXT, guest.ram.address(FIRST) | PRESENT)
    vcpu = replace(guest.vcpu, cr3=user.root | 0x801)
    assert guest.found(vcpu) == WHOLE


def test_vcpus_that_were_not_started() -> None:
    guest = Guest()
    assert guest.found(paging(0, 0), replace(guest.vcpu, idt_base=None), guest.vcpu) == WHOLE


def no_banner(guest: Guest) -> None:
    guest.write(FIRST + TEXT_PAGES + 1, 1000, b"FreeBSD 14.0-RELEASE")


def elsewhere(guest: Guest) -> None:
    """As Windows has it."""
    guest.handlers = [handler - (1 << 40) for handler in guest.handlers]


def few_gates(guest: Guest) -> None:
    guest.handlers[10:] = [0] * 246


def many_outside(guest: Guest) -> None:
    guest.handlers[128:] = [TEXT + (TEXT_PAGES + 1) * PAGE_SIZE] * 128


def task_gates(guest: Guest) -> None:
    guest.kind = 0x8500


def no_table(guest: Guest) -> None:
    guest.vcpu = replace(guest.vcpu, idt_base=IDT + PAGE_SIZE)


def writable(guest: Guest) -> None:
    """While the kernel starts."""
    for page in range(TEXT_PAGES):
        guest.map_text(page, guest.ram.address(FIRST + page) | PRESENT | WRITABLE)


def for_users(guest: Guest) -> None:
    for page in range(TEXT_PAGES):
        guest.map_text(page, guest.ram.address(FIRST + page) | PRESENT | USER)


def not_executable(guest: Guest) -> None:
    for page in range(TEXT_PAGES):
        guest.map_text(page, guest.ram.address(FIRST + page) | PRESENT | NO_EXECUTE)


def outside_ram(guest: Guest) -> None:
    for page in range(TEXT_PAGES):
        guest.map_text(page, 0x7_0000_0000 + page * PAGE_SIZE | PRESENT)


@pytest.mark.parametrize(
    "change",
    [
        no_banner,
        elsewhere,
        few_gates,
        many_outside,
        task_gates,
        no_table,
        writable,
        for_users,
        not_executable,
        outside_ram,
    ],
)
def test_doubts(change: Callable[[Guest], None]) -> None:
    guest = Guest()
    change(guest)
    assert guest.found() == ()


def test_another_page_in_between(rng: random.Random) -> None:
    """The run ends where memory is not in one piece; where the handlers are beyond, nothing is told."""
    guest = Guest()
    hole = rng.randrange(2, TEXT_PAGES)
    guest.map_text(hole, guest.ram.address(FIRST - 5) | PRESENT)
    guest.write(FIRST + hole + 1, 0, BANNER)
    assert guest.found() == (PageKind(FIRST, hole, "ktext"),)
    guest.handlers = [TEXT + (hole + 1) * PAGE_SIZE, *[TEXT] * 255]
    assert guest.found() == ()


def test_text_that_is_partly_outside_ram() -> None:
    guest = Guest()
    for page in range(TEXT_PAGES):
        guest.map_text(page, 60 * PAGE_SIZE + page * PAGE_SIZE | PRESENT)
    guest.write(63, 2000, BANNER)
    assert guest.found() == ()


@pytest.mark.parametrize("seed", range(20))
def test_any_memory(seed: int, rng: random.Random) -> None:
    """Damage here and there: no error, and never a page outside of the memory."""
    guest = Guest()
    for _ in range(40):
        page = rng.choice([2, 4, 5, 6, 7, 8, 9, 33])
        guest.write(page, 8 * rng.randrange(512), rng.randbytes(8))
    found = kernel_text(BytesSource(bytes(guest.ram.data)), guest.ram.geometry, [guest.vcpu])
    assert all(run.first >= 0 and run.first + run.count <= 128 for run in found)
