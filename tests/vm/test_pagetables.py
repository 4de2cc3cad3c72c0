"""The page tables of a running Linux are found, measured by what QEMU's own MMU says of the same guest.

``info tlb`` lists every mapping of a vCPU. Each must be translated with nothing but the frames that were found, and
what was found beyond these frames must be tables that lead nowhere yet, or the other half of a page-table isolation.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.guest import build_guest
from support.vm import Vm

from imagefs.formats import open_capture
from imagefs.formats.qemu_cpu import find_paging
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.pagetables import PagingState
from imagefs.restore.suspend import suspended

VCPUS = 2
PRESENT, LARGE = 0x01, 0x80
ADDRESS = 0x000F_FFFF_FFFF_F000
KINDS = ("", "pt", "pd", "pdpt", "pml4", "pml5")


@dataclass(frozen=True)
class Seen:
    """What QEMU's monitor says of a stopped guest."""

    paging: list[PagingState]
    mappings: list[dict[int, int]]
    """Of each vCPU: guest-physical by guest-virtual address."""


def look(vm: Vm) -> Seen:
    def ask(command: str, vcpu: int) -> str:
        return str(vm.qmp.execute("human-monitor-command", {"command-line": command, "cpu-index": vcpu}))

    paging = []
    for vcpu in range(VCPUS):
        values = dict(re.findall(r"\b(CR0|CR3|CR4|EFER)=([0-9a-f]+)", ask("info registers", vcpu)))
        paging.append(PagingState(*(int(values[name], 16) for name in ("CR0", "CR3", "CR4", "EFER"))))
    lines = [
        re.findall(r"^([0-9a-f]{16}): ([0-9a-f]{16}) ", ask("info tlb", vcpu), re.MULTILINE) for vcpu in range(VCPUS)
    ]
    return Seen(paging, [{int(at, 16): int(to, 16) for at, to in found} for found in lines])


class Tables:
    """A walk of single addresses that takes nothing for a table but frames that were found to be one."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.kinds = {page: run.kind for run in capture.essential for page in range(run.first, run.first + run.count)}
        self.used: set[int] = set()

    def page(self, address: int) -> int | None:
        return self.capture.geometry.page_of_pfn(address // PAGE_SIZE)

    def entries(self, page: int) -> list[int]:
        return list(struct.unpack("<512Q", self.capture.memory.read_at(page * PAGE_SIZE, PAGE_SIZE)))

    def translate(self, paging: PagingState, virtual: int) -> int:
        address = paging.cr3 & ADDRESS
        for level in range(paging.levels, 0, -1):
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


def registers(capture: Capture) -> list[PagingState]:
    """As the device state has them."""
    description = json.loads(capture.config["qemu-vmdesc.json"])
    first = description["devices"][0]["name"].encode()
    state = bytes(capture.state.read_at(0, capture.state.size))
    (start,) = (found.start() for found in re.finditer(rb"\x04[\x00-\xff]{4}%c%b\0{4}" % (len(first), first), state))
    return find_paging(capture.state, start, description)


def check(seen: Seen, capture: Capture, levels: int, isolated: bool) -> None:
    assert registers(capture) == seen.paging
    tables = Tables(capture)
    assert {paging.levels for paging in seen.paging} == {levels}
    for paging, mappings in zip(seen.paging, seen.mappings, strict=True):
        assert len(mappings) > 1000
        for virtual, physical in mappings.items():
            assert tables.translate(paging, virtual) == physical
    *_, last = capture.geometry.regions
    assert any(page >= last.offset // PAGE_SIZE for page in tables.used)
    roots = {tables.page(paging.cr3 & ADDRESS) for paging in seen.paging}
    # Even where one vCPU is in the kernel and another in user mode, and both of a pair are roots.
    assert any(root is not None and tables.kinds.get(root ^ 1) == KINDS[levels] for root in roots) == isolated
    twins = {page for page, kind in tables.kinds.items() if kind == KINDS[levels]} - roots
    spare = set(tables.kinds) - tables.used - set().union(*map(tables.reachable, twins))
    for page in spare:
        below = {tables.page(entry & ADDRESS) for entry in tables.entries(page) if entry & PRESENT}
        assert below <= spare if tables.kinds[page] != "pt" else not below
