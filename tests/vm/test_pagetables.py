"""The page tables of a running Linux are found, measured by what QEMU's own MMU says of the same guest.

``info tlb`` lists every mapping of a vCPU. Each must be translated with nothing but the frames that were found, and
what was found beyond these frames must be tables that lead nowhere yet, or the other half of a page-table isolation.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.guest import build_guest
from support.vm import Vm

from imagefs.formats import open_capture
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.mappings import mapped_pages
from imagefs.image.translate import AddressSpace, Translation
from imagefs.image.vcpu import VcpuState
from imagefs.restore.suspend import suspended

VCPUS = 2
PRESENT, LARGE = 0x01, 0x80
ADDRESS = 0x000F_FFFF_FFFF_F000
LARGE_PAGE = 2 << 20
KINDS = ("", "pt", "pd", "pdpt", "pml4", "pml5")


@dataclass(frozen=True)
class Seen:
    """What QEMU's monitor says of a stopped guest."""

    vcpus: list[VcpuState]
    mappings: list[dict[int, tuple[int, str]]]
    """Of each vCPU: guest-physical address and flags by guest-virtual address."""


def look(vm: Vm) -> Seen:
    def ask(command: str, vcpu: int) -> str:
        return str(vm.qmp.execute("human-monitor-command", {"command-line": command, "cpu-index": vcpu}))

    vcpus = [registers(ask("info registers", vcpu)) for vcpu in range(VCPUS)]
    lines = [
        re.findall(r"^([0-9a-f]{16}): ([0-9a-f]{16}) (\S{9})\s*$", ask("info tlb", vcpu), re.MULTILINE)
        for vcpu in range(VCPUS)
    ]
    return Seen(vcpus, [{int(at, 16): (int(to, 16), flags) for at, to, flags in found} for found in lines])


def registers(text: str) -> VcpuState:
    """Out of ``info registers``, where a segment has its selector, base, limit, flags and kind."""
    values = {name: int(value, 16) for name, value in re.findall(r"\b(\w+) *=([0-9a-f]+)", text)}
    bases = {name: int(base, 16) for name, base in re.findall(r"^(GDT|IDT)= +([0-9a-f]+)", text, re.MULTILINE)}
    ((selector, kind),) = re.findall(r"^CS =([0-9a-f]{4}) .* (\w+) \[", text, re.MULTILINE)
    assert kind == "CS64"
    return VcpuState(
        cr0=values["CR0"],
        cr3=values["CR3"],
        cr4=values["CR4"],
        efer=values["EFER"],
        rip=values["RIP"],
        rsp=values["RSP"],
        cs=int(selector, 16),
        gdt_base=bases["GDT"],
        idt_base=bases["IDT"],
        mode="long",
    )


class Tables:
    """A walk of single addresses that takes nothing for a table but frames that were found to be one."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.kinds = {
            page: run.kind
            for run in capture.essential
            if run.kind in KINDS
            for page in range(run.first, run.first + run.count)
        }
        self.used: set[int] = set()

    def page(self, address: int) -> int | None:
        return self.capture.geometry.page_of_pfn(address // PAGE_SIZE)

    def entries(self, page: int) -> list[int]:
        return list(struct.unpack("<512Q", self.capture.memory.read_at(page * PAGE_SIZE, PAGE_SIZE)))

    def translate(self, vcpu: VcpuState, virtual: int) -> int:
        address = root_of(vcpu)
        for level in range(vcpu.levels, 0, -1):
            page = self.page(address)
            assert page is not None
            assert self.kinds.get(page) == KINDS[level], f"{KINDS[level]} at {address:#x} for {virtual:#x}"
            self.used.add(page)
            shift = 12 + 9 * (level - 1)
            entry = self.entries(page)[virtual >> shift & 511]
            assert entry & PRESENT
            address = entry & ADDRESS
            if level in (2, 3) and entry & LARGE:
                return address & -(1 << shift)
        return address

    def reachable(self, page: int) -> set[int]:
        """Tables below one, itself too."""
        found = {page}
        if self.kinds[page] != "pt":
            for entry in self.entries(page):
                if entry & (PRESENT | LARGE) == PRESENT and (below := self.page(entry & ADDRESS)) is not None:
                    found |= self.reachable(below)
        return found


@pytest.mark.parametrize(
    ("options", "append", "levels"),
    [
        # Tables above the hole below 4 GiB, where Linux takes its memory from first.
        ({"machine": "q35", "memory_mib": 3000, "extra": ("-cpu", "qemu64")}, "", 4),
        ({"machine": "pc", "memory_mib": 128, "extra": ("-cpu", "qemu64")}, "pti=on", 4),
        ({"machine": "pc", "memory_mib": 128, "extra": ("-cpu", "max")}, "", 5),
    ],
    ids=["above-4g", "isolated", "5-levels"],
)
def test_tables_of_linux(options: dict[str, Any], append: str, levels: int, tmp_path: Path) -> None:
    guest = build_guest(fill_mib=16, append=append)
    with Vm(guest, smp=VCPUS, **options) as vm:
        vm.expect("FILLED")
        vm.qmp.execute("stop")
        seen = look(vm)
        with suspended(vm.qmp_socket) as source, open_capture(source.stream, spool_dir=tmp_path) as capture:
            check(seen, capture, levels, isolated=bool(append))


def check_translation(found: Translation, physical: int, flags: str) -> None:
    """The monitor shows the flags of the page's own entry: X (no execute), G, P (large), D, A, C, T, U, W."""
    assert found.physical == physical
    assert (found.page_size > PAGE_SIZE) == ("P" in flags)
    assert set(found.flags) == {{"G": "global", "D": "dirty", "A": "accessed"}[flag] for flag in "GDA" if flag in flags}
    assert "X" in flags or found.executable or found.steps[0].entry >> 63
    assert found.writable <= ("W" in flags)
    assert found.user <= ("U" in flags)


def check_kernel_text(seen: Seen, capture: Capture) -> None:
    """What Linux has mapped executable and read-only where its image is, below its modules."""
    expected = set()
    for mappings in seen.mappings:
        for virtual, (physical, flags) in mappings.items():
            if 0xFFFF_FFFF_8000_0000 <= virtual < 0xFFFF_FFFF_C000_0000 and not set("XWU") & set(flags):
                expected |= set(range(physical, physical + (LARGE_PAGE if "P" in flags else PAGE_SIZE), PAGE_SIZE))
    text = [run for run in capture.essential if run.kind == "ktext"]
    found = {
        capture.geometry.pfn_of_page(page) * PAGE_SIZE
        for run in text
        for page in range(run.first, run.first + run.count)
    }
    assert len(found) * PAGE_SIZE > 8 << 20
    assert found == expected


def root_of(vcpu: VcpuState) -> int:
    assert vcpu.cr3 is not None
    return vcpu.cr3 & ADDRESS


def check(seen: Seen, capture: Capture, levels: int, isolated: bool) -> None:
    assert list(capture.vcpus) == seen.vcpus
    tables = Tables(capture)
    assert {vcpu.levels for vcpu in seen.vcpus} == {levels}
    for vcpu, mappings in zip(seen.vcpus, seen.mappings, strict=True):
        assert len(mappings) > 1000
        listed = {page.virtual: page for page in mapped_pages(capture.memory, capture.geometry, vcpu)}
        assert listed.keys() == mappings.keys()
        space = AddressSpace(capture.memory, capture.geometry, vcpu)
        for virtual, (physical, flags) in mappings.items():
            assert tables.translate(vcpu, virtual) == physical
            check_translation(space.translate(virtual), physical, flags)
            one = listed[virtual]
            assert (one.physical, one.accessed, one.dirty) == (physical, "A" in flags, "D" in flags)
    check_kernel_text(seen, capture)
    *_, last = capture.geometry.regions
    assert any(page >= last.offset // PAGE_SIZE for page in tables.used)
    roots = {tables.page(root_of(vcpu)) for vcpu in seen.vcpus}
    # Even where one vCPU is in the kernel and another in user mode, and both of a pair are roots.
    assert any(root is not None and tables.kinds.get(root ^ 1) == KINDS[levels] for root in roots) == isolated
    twins = {page for page, kind in tables.kinds.items() if kind == KINDS[levels]} - roots
    spare = set(tables.kinds) - tables.used - set().union(*map(tables.reachable, twins))
    for page in spare:
        below = {tables.page(entry & ADDRESS) for entry in tables.entries(page) if entry & PRESENT}
        assert below <= spare if tables.kinds[page] != "pt" else not below
