"""What QEMU's dump-guest-memory writes is read, and put together again byte for byte: ELF and kdump-compressed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest
from support.guest import build_guest
from support.vm import Vm

from imagefs.formats import open_capture
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.restore.qmp import Qmp
from tests.vm.machines import MEMORY, check_native, content, firmware, split_and_mounted

VCPUS = 2


def dump(qmp: Qmp, path: Path, **options: object) -> Path:
    qmp.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{path}", **options})
    return path


def check_pipe(path: Path, spool_dir: Path, expected: Capture) -> None:
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        stream: BinaryIO = cat.stdout  # type: ignore[assignment]
        with open_capture(stream, spool_dir=spool_dir) as capture:
            check_native(capture, path)
            assert capture.geometry == expected.geometry
            assert content(capture.memory) == content(expected.memory)


def check_memory(capture: Capture, flat: bytes) -> None:
    """As pmemsave has it, where RAM is not hidden by devices and ROMs."""
    for region in capture.geometry.regions:
        data = content(capture.memory)[region.offset : region.offset + region.size]
        for at in range(0, region.size, PAGE_SIZE):
            address = region.guest_address + at
            if address < len(flat) and not 0xA0000 <= address < 0x100000:
                assert data[at : at + PAGE_SIZE] == flat[address : address + PAGE_SIZE], hex(address)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_firmware(machine: str, tmp_path: Path, imagefs: list[str]) -> None:
    """Both forms of a dump have the same memory, and the same vCPUs."""
    with firmware(tmp_path / "source", machine, None, "-smp", "2") as vm:
        vm.qmp.execute("stop")
        elf = dump(vm.qmp, tmp_path / "elf")
        kdump = dump(vm.qmp, tmp_path / "kdump", format="kdump-zlib")
        flat = vm.memory()
    with open_capture(elf, spool_dir=tmp_path) as capture, open_capture(kdump, spool_dir=tmp_path) as packed:
        assert (capture.source_format, packed.source_format) == ("elf-core", "kdump")
        assert packed.source_version == "6 flattened"
        check_native(capture, elf)
        check_native(packed, kdump)
        check_memory(capture, flat)
        assert sum(region.size for region in capture.geometry.regions if region.guest_address < MEMORY) > MEMORY * 0.99
        assert content(packed.memory) == content(capture.memory)
        places = [[(r.guest_address, r.size) for r in each.geometry.regions] for each in (capture, packed)]
        assert places[0] == places[1]
        assert packed.vcpus == capture.vcpus
        assert len(capture.vcpus) == VCPUS
        assert capture.restore == {}
        check_pipe(elf, tmp_path, capture)
        check_pipe(kdump, tmp_path, packed)
        for path, held in ((elf, capture), (kdump, packed)):
            with split_and_mounted(path, tmp_path / f"mounted-{path.name}", imagefs) as mountpoint:
                assert (mountpoint / "memory").read_bytes() == content(held.memory)


def test_linux(tmp_path: Path) -> None:
    """A running kernel's registers and page tables; with paging, segments are its mappings."""
    with Vm(build_guest(fill_mib=16), memory_mib=160, smp=VCPUS) as vm:
        vm.expect("FILLED")
        vm.qmp.execute("stop")
        seen = [
            str(vm.qmp.execute("human-monitor-command", {"command-line": "info registers", "cpu-index": number}))
            for number in range(VCPUS)
        ]
        dumps = {
            "elf": dump(vm.qmp, tmp_path / "elf"),
            "paging": dump(vm.qmp, tmp_path / "paging", paging=True),
            "kdump": dump(vm.qmp, tmp_path / "kdump", format="kdump-zlib"),
        }
    registers = [{name: int(value, 16) for name, value in re.findall(r"\b(CR\d|R\w\w)=([0-9a-f]+)", t)} for t in seen]
    kinds: dict[str, Counter[str]] = {}
    for name, path in dumps.items():
        with open_capture(path, spool_dir=tmp_path) as capture:
            check_native(capture, path)
            for vcpu, known in zip(capture.vcpus, registers, strict=True):
                found = (vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.rip, vcpu.rsp)
                assert found == tuple(known[register] for register in ("CR0", "CR3", "CR4", "RIP", "RSP"))
                assert vcpu.mode == "long"
            kinds[name] = Counter()
            for run in capture.essential:
                kinds[name][run.kind] += run.count
    with (
        open_capture(dumps["elf"], spool_dir=tmp_path) as whole,
        open_capture(dumps["paging"], spool_dir=tmp_path) as mapped,
    ):
        assert mapped.geometry.size > 64 << 20
        for region in mapped.geometry.regions:
            page = whole.geometry.page_of_pfn(region.guest_address // PAGE_SIZE)
            assert page is not None
            data = bytes(mapped.memory.read_at(region.offset, region.size))
            assert data == whole.memory.read_at(page * PAGE_SIZE, region.size), hex(region.guest_address)
    assert kinds["elf"]["pt"] > 10
    assert kinds["kdump"] == kinds["elf"]
    assert kinds["paging"]["pml4"] == kinds["elf"]["pml4"]
