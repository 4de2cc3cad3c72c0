"""Which blocks are the guest's memory, and where a machine puts them. As `info mtree -f` of QEMU 7.2 shows."""

from __future__ import annotations

import pytest

from imagefs.errors import UnsupportedInputError
from imagefs.formats.qemu_cmos import ram_told
from imagefs.formats.qemu_machine import guest_memory, memory_layout
from imagefs.image.capture import BytesSource

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
    layout = memory_layout(machine, {"ram": size})
    geometry = layout.geometry
    assert (layout.notes, layout.ram, layout.plugged) == ((), ("ram",), ())
    assert [(region.guest_address, region.size) for region in geometry.regions] == (
        [(0, size)] if below == size else [(0, below), (4 * GIB, size - below)]
    )
    assert geometry.size == size


def test_layouts_that_need_a_remark() -> None:
    layout = memory_layout("virt-7.2", {"mach-virt.ram": 8 * GIB})
    assert layout.geometry.regions[0].guest_address == GIB
    assert "Arm" in layout.notes[0]
    layout = memory_layout("none-such", {"ram": 3 * GIB})
    assert [(region.guest_address, region.size) for region in layout.geometry.regions] == [(0, 3 * GIB)]
    assert "'none-such'" in layout.notes[0]
    assert "1 TiB" in memory_layout("pc-q35-7.2", {"ram": 2048 * GIB}).notes[0]


Regions = list[tuple[str, int, int]]


def regions_of(machine: str, blocks: dict[str, int], places: dict[str, int] | None = None) -> Regions:
    regions = memory_layout(machine, blocks, places).geometry.regions
    assert [region.offset for region in regions] == [sum(r.size for r in regions[:at]) for at in range(len(regions))]
    return [(region.name, region.guest_address, region.size) for region in regions]


def test_numa_nodes() -> None:
    """One after the other in guest memory, by the numbers in their names; in the flat memory in the stream's order."""
    nodes = {f"node{number}": MIB for number in (10, 9, 2)}
    assert regions_of("pc-i440fx-7.2", nodes) == [
        ("node10", 2 * MIB, MIB),
        ("node9", 1 * MIB, MIB),
        ("node2", 0, MIB),
    ]
    assert memory_layout("pc-i440fx-7.2", nodes).ram == ("node2", "node9", "node10")
    assert "node2, node9, node10" in memory_layout("pc-i440fx-7.2", nodes).notes[0]


def test_nodes_around_the_hole() -> None:
    assert regions_of("pc-q35-7.2", {"b": 2 * GIB, "a": GIB, "c": GIB}) == [
        ("b-below-4g", GIB, GIB),
        ("b-above-4g", 4 * GIB, GIB),
        ("a-below-4g", 0, GIB),
        ("c-above-4g", 5 * GIB, GIB),
    ]


def test_nodes_whose_places_are_known() -> None:
    layout = memory_layout("pc-i440fx-7.2", {"a": MIB, "b": MIB}, {"a": MIB, "b": 0})
    assert layout.ram == ("b", "a")
    assert layout.notes == ()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ({"pc.ram": GIB, "x": 128 * MIB}, [("ram", 0, GIB), ("x", 4 * GIB, 128 * MIB)]),
        (
            {"mem": 5 * GIB, "dimm1": 3 * MIB, "dimm0": 129 * MIB},
            [
                ("ram-below-4g", 0, 3 * GIB),
                ("ram-above-4g", 4 * GIB, 2 * GIB),
                ("dimm1", 6 * GIB + 130 * MIB, 3 * MIB),
                ("dimm0", 6 * GIB, 129 * MIB),
            ],
        ),
        (
            {"ram-node0": GIB, "memdimm0": GIB, "ram-node1": 64 * MIB},
            [("ram-node0", 0, GIB), ("memdimm0", 4 * GIB, GIB), ("ram-node1", GIB, 64 * MIB)],
        ),
        ({"dimm0": GIB}, [("ram", 0, GIB)]),
        ({"dimm1": GIB, "dimm0": GIB}, [("dimm1", 4 * GIB, GIB), ("ram", 0, GIB)]),
    ],
)
def test_modules(blocks: dict[str, int], expected: Regions) -> None:
    assert regions_of("pc-i440fx-7.2", blocks) == expected


@pytest.mark.parametrize(
    ("blocks", "told", "ram", "plugged"),
    [
        ({"b": GIB, "a": 128 * MIB}, GIB + 128 * MIB, ["a", "b"], []),
        ({"b": GIB, "a": 128 * MIB}, GIB, ["b"], ["a"]),
        ({"b": GIB, "a": 128 * MIB}, 128 * MIB, ["a"], ["b"]),
        ({"dimm0": GIB, "dimm1": GIB}, 2 * GIB, ["dimm0", "dimm1"], []),
        ({"dimm0": GIB, "dimm1": GIB}, None, ["dimm0"], ["dimm1"]),
        ({"pc.ram": GIB, "x": GIB}, GIB, ["pc.ram"], ["x"]),
    ],
)
def test_what_the_firmware_was_told_decides(
    blocks: dict[str, int], told: int | None, ram: list[str], plugged: list[str]
) -> None:
    layout = memory_layout("pc-q35-7.2", blocks, told=told)
    assert (list(layout.ram), list(layout.plugged)) == (ram, plugged)


def test_firmware_was_told_something_else() -> None:
    assert "4,096 bytes" in memory_layout("pc-q35-7.2", {"a": GIB, "b": GIB}, told=4096).notes[0]


def cmos_section(below: int, above: int, instance: int = 0) -> bytes:
    cmos = bytearray(range(128))
    cmos[0x34:0x36] = below.to_bytes(2, "little")
    cmos[0x5B:0x5E] = above.to_bytes(3, "little")
    return b"\4\0\0\0\7\x0bmc146818rtc" + instance.to_bytes(4, "big") + b"\0\0\0\3" + cmos


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (b"", None),
        (b"xx" + cmos_section(256, 0), 32 * MIB),
        (cmos_section(0x7F00, 0x4000), 3 * GIB),
        (cmos_section(0xBF00, 0x10000), 7 * GIB),
        (cmos_section(0, 0), None),
        (cmos_section(256, 0) * 2, None),
        (cmos_section(256, 0)[:-1], None),
    ],
)
def test_what_the_firmware_was_told(state: bytes, told: int | None) -> None:
    assert ram_told(BytesSource(b"pc" + state), 2) == told


def test_modules_of_another_machine() -> None:
    with pytest.raises(ValueError, match="dimm0"):
        memory_layout("virt-7.2", {"mach-virt.ram": GIB, "dimm0": GIB})


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
def test_one_block_is_memory(blocks: dict[str, int], main: str) -> None:
    assert guest_memory(blocks, 0) == [main]


@pytest.mark.parametrize(
    ("blocks", "memory"),
    [
        ({"node0": 512 * MIB, "node1": 512 * MIB}, ["node0", "node1"]),
        ({"pc.ram": 512 * MIB, "dimm0": 128 * MIB}, ["pc.ram", "dimm0"]),
        ({"dimm0": 128 * MIB, **DEVICES, "mem": 64 * MIB}, ["dimm0", "mem"]),
        ({"a": 16 * MIB, "b": 16 * MIB, "c": 4 * MIB}, ["a", "b"]),
        ({"node1": 96 * MIB, "node0": 32 * MIB, "nodes": MIB}, ["node1", "node0"]),
        ({"pc.ram": 96 * MIB, "DIMM-a": 32 * MIB}, ["pc.ram", "DIMM-a"]),
    ],
)
def test_several_blocks_are_memory(blocks: dict[str, int], memory: list[str]) -> None:
    assert guest_memory(blocks, 0) == memory


@pytest.mark.parametrize("blocks", [DEVICES, {}])
def test_no_block_is_memory(blocks: dict[str, int]) -> None:
    with pytest.raises(UnsupportedInputError) as caught:
        guest_memory(blocks, 77)
    assert caught.value.offset == 77
