"""Which block is the guest's memory, and where a machine puts it. Addresses as `info mtree -f` of QEMU 7.2 shows."""

from __future__ import annotations

import pytest

from imagefs.errors import UnsupportedInputError
from imagefs.formats.qemu_machine import main_block, memory_layout

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("machine", "size", "below"),
    [
        ("pc-i440fx-7.2", 1 * GIB, 1 * GIB),
        ("pc-i440fx-7.2", 3584 * MIB - 4096, 3584 * MIB - 4096),
        ("pc-i440fx-7.2", 3584 * MIB, 3 * GIB),
        ("pc-i440fx-7.2", 5 * GIB, 3 * GIB),
        ("pc-i440fx-2.0", 3800 * MIB, 3 * GIB),
        ("pc-i440fx-1.7", 3800 * MIB, 3584 * MIB),
        ("pc-i440fx-1.7", 3584 * MIB, 3584 * MIB),
        ("pc-i440fx-jammy", 3800 * MIB, 3 * GIB),
        ("pc-i440fx-10.0", 3800 * MIB, 3 * GIB),
        ("isapc", 3800 * MIB, 3584 * MIB),
        ("pc-q35-7.2", 1 * GIB, 1 * GIB),
        ("pc-q35-7.2", 2816 * MIB - 4096, 2816 * MIB - 4096),
        ("pc-q35-7.2", 2816 * MIB, 2 * GIB),
        ("pc-q35-2.4", 3800 * MIB, 2 * GIB),
        ("pc-q35-10.0", 5 * GIB, 2 * GIB),
        ("microvm", 2900 * MIB, 2900 * MIB),
        ("microvm", 3 * GIB, 3 * GIB),
        ("microvm", 3584 * MIB, 3 * GIB),
        ("pseries-7.2", 100 * GIB, 100 * GIB),
        ("s390-ccw-virtio-7.2", 100 * GIB, 100 * GIB),
        ("none-such", 2 * GIB, 2 * GIB),
    ],
)
def test_layout(machine: str, size: int, below: int) -> None:
    geometry, notes = memory_layout(machine, size)
    assert notes == []
    assert [(region.guest_address, region.size) for region in geometry.regions] == (
        [(0, size)] if below == size else [(0, below), (4 * GIB, size - below)]
    )
    assert geometry.size == size


def test_layouts_that_need_a_remark() -> None:
    geometry, notes = memory_layout("virt-7.2", 8 * GIB)
    assert geometry.regions[0].guest_address == GIB
    assert "Arm" in notes[0]
    geometry, notes = memory_layout("none-such", 3 * GIB)
    assert [(region.guest_address, region.size) for region in geometry.regions] == [(0, 3 * GIB)]
    assert "'none-such'" in notes[0]
    assert "1 TiB" in memory_layout("pc-q35-7.2", 2048 * GIB)[1][0]


DEVICES = {
    "0000:00:02.0/vga.vram": 256 * MIB,
    "/rom@etc/acpi/tables": 128 << 10,
    "pc.bios": 256 << 10,
    "pc.rom": 128 << 10,
    "vga.vram": 128 * MIB,
    "system.flash0": 64 * MIB,
    "virt.flash1": 64 * MIB,
}


@pytest.mark.parametrize(
    ("blocks", "main"),
    [
        ({"pc.ram": 64 * MIB, **DEVICES}, "pc.ram"),
        ({"ram": 64 * MIB, **DEVICES}, "ram"),
        ({"/objects/mem0": 64 * MIB, **DEVICES}, "/objects/mem0"),
        ({"ivshmem": 4 * MIB, "mem": GIB, **DEVICES}, "mem"),
        ({"hostmem": 16 * MIB, "pc.ram": 8 * MIB}, "pc.ram"),
        ({"my-ram.rom-like": 16 * MIB}, "my-ram.rom-like"),
    ],
)
def test_main_block(blocks: dict[str, int], main: str) -> None:
    assert main_block(blocks, 0) == main


@pytest.mark.parametrize(
    "blocks",
    [
        {"node0": 512 * MIB, "node1": 512 * MIB},
        {"pc.ram": 512 * MIB, "dimm0": 128 * MIB},
        {"mem": 64 * MIB, "dimm0": 128 * MIB},
        {"a": 16 * MIB, "b": 16 * MIB},
        DEVICES,
        {},
    ],
)
def test_no_single_main_block(blocks: dict[str, int]) -> None:
    with pytest.raises(UnsupportedInputError) as caught:
        main_block(blocks, 77)
    assert caught.value.offset == 77
