"""The test guest itself: a check that could not fail would prove nothing."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import pytest
from support.debian import GuestError
from support.guest import Guest, build_guest, cache_directory
from support.vm import PATIENCE, Vm, VmError

PAGE = 4096
PATTERN_PAGE = 12345
SPOILED_BYTE = 2000


def test_boots_fills_and_answers(guest: Guest) -> None:
    with Vm(guest, memory_mib=192, smp=2) as vm:
        ready = vm.expect(r"^READY nonce=([0-9a-f]{16}) vcpus=(\d)$")
        pages = int(vm.expect(r"^FILLED pages=(\d+)$")[1])
        assert (ready[2], pages) == ("2", guest.fill_mib << 8)
        nonce, count = vm.ping()
        assert nonce == ready[1]
        assert vm.ask("vcpus") == "2"
        assert vm.ask("check") == f"ok pages={pages} writes=0 nonce={nonce}"
        assert vm.ask("write 500 3") == "ok pages=500 writes=500"
        assert vm.ask("touch 500 4") == "ok pages=500 writes=500"
        assert vm.ask("check") == f"ok pages={pages} writes=500 nonce={nonce}"
        vm.expect(r"^tick \d+0$")
        assert vm.ping()[1] > count
        with pytest.raises(VmError, match="unknown dance"):
            vm.ask("dance")
        directory = vm.directory
    assert not directory.exists()
    assert vm.process.returncode is not None


def test_boots_anew_with_another_nonce_and_finds_a_wrong_page(tmp_path: Path) -> None:
    """Two boots of one machine; in the second, a byte of the pattern is spoilt behind the guest's back."""
    guest = build_guest(fill_mib=64, kind="random")
    with Vm(guest, memory_mib=192, backend="file", ram_file=tmp_path / "ram") as vm:
        first = vm.expect(r"^READY nonce=([0-9a-f]{16})")[1]
        vm.qmp.execute("system_reset")
        # Under -no-reboot a reset ends QEMU.
        assert vm.wait() == 0
    with Vm(guest, memory_mib=192, backend="file", ram_file=tmp_path / "ram") as vm:
        assert vm.expect(r"^READY nonce=([0-9a-f]{16})")[1] != first
        vm.expect("FILLED")
        assert vm.ask("check").startswith("ok pages=16384")
        spoil(tmp_path / "ram")
        assert vm.ask("check").startswith(f"BAD page={PATTERN_PAGE} generation=0")


def spoil(ram: Path) -> None:
    """Change one byte of the pattern's page PATTERN_PAGE, found by the number and generation that it begins with."""
    head = struct.pack("<QQ", PATTERN_PAGE, 0)
    with open(ram, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        places = [at for at in range(0, len(memory), PAGE) if memory[at : at + len(head)] == head]
        assert len(places) == 1
        memory[places[0] + SPOILED_BYTE] ^= 1


def test_modules_are_loaded_in_order() -> None:
    guest = build_guest(modules=["virtio_pci", "virtio_balloon"])
    with Vm(guest, memory_mib=192, extra=("-device", "virtio-balloon")) as vm:
        vm.expect("READY")
        vm.qmp.execute("balloon", {"value": 128 << 20})
        deadline = time.monotonic() + PATIENCE
        while vm.qmp.execute("query-balloon")["actual"] != 128 << 20:
            assert time.monotonic() < deadline, vm.said()
            vm.ping()


def test_module_that_does_not_exist() -> None:
    with pytest.raises(GuestError, match="no module 'virtio_nonesuch'"):
        build_guest(modules=["virtio_nonesuch"])


def test_initramfs_is_the_same_wherever_it_is_built(guest: Guest, tmp_path: Path) -> None:
    kernel = guest.kernel.parents[1]
    (tmp_path / kernel.name).symlink_to(kernel)
    again = build_guest(cache=tmp_path)
    assert again.initramfs.parent == tmp_path
    assert again.initramfs.read_bytes() == (cache_directory() / again.initramfs.name).read_bytes()


def test_qemu_that_does_not_start(guest: Guest) -> None:
    with (
        pytest.raises(VmError, match=r"ended with status 1\n(.|\n)*unsupported machine type"),
        Vm(guest, machine="nonesuch"),
    ):
        pass


def test_guest_that_dies(guest: Guest) -> None:
    with Vm(guest, memory_mib=192, extra=("-S",)) as vm:
        assert vm.status == "prelaunch"
        os.kill(vm.process.pid, 9)
        with pytest.raises(VmError, match=r"QEMU ended \(status -9\) before 'READY'"):
            vm.expect("READY")
