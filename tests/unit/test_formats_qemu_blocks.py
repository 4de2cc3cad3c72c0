"""Migration streams of guests with several memory backends, XBZRLE deltas, and mapped-ram files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.formats.gather import JoinedSource
from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE, Region
from tests.unit.streams import (
    Built,
    Mapped,
    Options,
    Record,
    build,
    build_mapped,
    counted,
    page_of,
    u16,
    u64,
)
from tests.unit.test_formats_qemu import captured, check, content

NODES = {"node1": 4 * PAGE_SIZE, "node0": 4 * PAGE_SIZE, "vga.vram": PAGE_SIZE}
TWO = Options(blocks=NODES, main="node1", more_main=["node0"])


def refusal(data: bytes, directory: Path) -> UnsupportedInputError:
    with (
        pytest.raises(UnsupportedInputError) as caught,
        open_capture(io.BytesIO(data), spool_dir=directory, format="qemu-migration"),
    ):
        pass
    return caught.value


@pytest.mark.parametrize("piped", [0, 5000])
def test_numa_nodes(piped: int) -> None:
    """Runs end with their block, though the next block goes on in the flat memory."""
    sections = [
        [Record("page", "node1", page, page_of(page)) for page in range(4)],
        [Record("page", "node0", page, page_of(10 + page)) for page in range(4)],
        [Record("fill", "node1", 2, b"\0"), Record("fill", "node1", 3, b"\0"), Record("fill", "node0", 0, b"\0")],
        [Record("page", "vga.vram", 0, page_of(20)), Record("zlib", "node0", 3, page_of(21))],
    ]
    built = build(sections, TWO)
    with captured(built.data, piped) as capture:
        check(built, capture)
        assert capture.geometry.regions == (
            Region("node1", 4 * PAGE_SIZE, 4 * PAGE_SIZE, 0),
            Region("node0", 0, 4 * PAGE_SIZE, 4 * PAGE_SIZE),
        )
        assert capture.restore["ram_block"] == "node0"
        assert capture.restore["ram_bytes"] == 8 * PAGE_SIZE
        assert capture.restore["ram_blocks"] == {"node0": 4 * PAGE_SIZE, "node1": 4 * PAGE_SIZE}
        assert capture.restore["plugged_blocks"] == {}
        assert capture.restore["other_blocks"] == {"vga.vram": PAGE_SIZE}
        assert "node0, node1" in capture.restore["notes"][0]


def test_node_that_is_missing(tmp_path: Path) -> None:
    error = refusal(build([[Record("page", "node0", 0, page_of(1))]], TWO).data, tmp_path)
    assert "no page of block 'node1'" in str(error)


def test_one_memory_file_a_node(tmp_path: Path) -> None:
    """In the order of the guest's addresses, which such a stream tells."""
    options = Options(
        blocks=NODES,
        main="node1",
        more_main=["node0"],
        capabilities=["x-ignore-shared"],
        addresses={"node1": 0, "node0": 4 * PAGE_SIZE},
    )
    built = build([[Record("page", "vga.vram", 0, page_of(1))]], options)
    files = []
    for number in range(2):
        files.append(tmp_path / f"ram{number}")
        files[-1].write_bytes(page_of(number) + bytes(2 * PAGE_SIZE) + page_of(number + 5))
    with captured(built.data, memory_files=files) as capture:
        assert content(capture.memory) == files[0].read_bytes() + files[1].read_bytes()
        assert [region.guest_address for region in capture.geometry.regions] == [0, 4 * PAGE_SIZE]
        assert content(capture.state) == built.state
        assert "notes" not in capture.restore
    with (
        pytest.raises(UsageError, match="one RAM file for each of 'node1', 'node0'"),
        captured(built.data, memory_files=files[:1]),
    ):
        pass
    assert "for each block" in str(refusal(built.data, tmp_path))


def test_joined_sources() -> None:
    parts = [b"", b"ab\0\0", b"", b"\0\0cd", b"\0"]
    joined = JoinedSource([BytesSource(part) for part in parts])
    flat = b"".join(parts)
    assert joined.size == len(flat)
    for offset in range(len(flat) + 2):
        assert offset <= joined.next_data(offset) or offset > len(flat)
        for length in range(len(flat) + 2):
            assert joined.read_at(offset, length) == flat[offset : offset + length]


def changed(seed: int, *places: int) -> bytes:
    page = bytearray(page_of(seed))
    for place in places:
        page[place] ^= 0xFF
    return bytes(page)


@pytest.mark.parametrize("piped", [0, 5000])
def test_deltas(piped: int) -> None:
    """To a plain page, to a zero page, to a deflated one, to a delta; in guest memory and in other blocks."""
    sections = [
        [Record("page", "pc.ram", 0, page_of(1)), Record("fill", "pc.ram", 1, b"\0")],
        [Record("zlib", "pc.ram", 2, page_of(2)), Record("page", "vga.vram", 0, page_of(3))],
        [Record("fill", "vga.vram", 1, b"\0"), Record("page", "pc.ram", 3, page_of(4))],
        [Record("xbzrle", "pc.ram", 0, changed(1, 0)), Record("xbzrle", "pc.ram", 1, page_of(0))],
        [Record("xbzrle", "pc.ram", 2, changed(2, 1, 2, 3000, 4095)), Record("xbzrle", "vga.vram", 0, changed(3, 9))],
        [Record("xbzrle", "vga.vram", 1, page_of(0)), Record("xbzrle", "pc.ram", 0, changed(1, 0, 200))],
        [Record("xbzrle", "vga.vram", 0, changed(3, 9, 10)), Record("page", "pc.ram", 3, page_of(5))],
    ]
    built = build(sections)
    with captured(built.data, piped) as capture:
        check(built, capture)
        assert capture.native.superseded.size == 2 * PAGE_SIZE


@pytest.mark.parametrize("block", ["pc.ram", "vga.vram"])
def test_delta_without_a_copy_before_it(block: str, tmp_path: Path) -> None:
    built = build([[Record("page", "pc.ram", 0, page_of(1)), Record("xbzrle", block, 1, page_of(2))]])
    error = refusal(built.data, tmp_path)
    assert (error.field, error.offset) == ("RAM record flags", built.records[1][0])
    assert "XBZRLE" in str(error)


@pytest.mark.parametrize(
    "delta",
    [
        b"",
        b"\0",
        b"\0\0",
        b"\0\2x",
        b"\x80",
        b"\x80\x80\1x",
        b"\0\1x\0\1x",
        b"\xff\x1f\2xy",
        b"\x80\x20\1x",
        b"\0\1x\5",
        b"\0\xff\x7f" + bytes(100),
    ],
)
def test_delta_that_is_none(delta: bytes, tmp_path: Path) -> None:
    built = build([[Record("page", "pc.ram", 0, page_of(1)), Record("xbzrle", "pc.ram", 0, changed(1, 0))]])
    at = built.records[1][0] + 8
    good = b"\1" + u16(3) + b"\0\1" + changed(1, 0)[:1]
    assert built.data[at : at + len(good)] == good
    error = refusal(built.data[:at] + b"\1" + u16(len(delta)) + delta + built.data[at + len(good) :], tmp_path)
    assert error.field == ("RAM page delta" if delta else "header of RAM page delta")
    assert error.offset == at + (3 if delta else 0)
    for header in (b"\2" + u16(3), b"\1" + u16(0x1001)):
        error = refusal(built.data[:at] + header + built.data[at + 3 :], tmp_path)
        assert (error.field, error.offset) == ("header of RAM page delta", at)


BLOCKS = {
    "pc.ram": Mapped(
        1030 * PAGE_SIZE,
        {page: page_of(page) for page in (0, 1, 2, 63, 64, 511, 512, 700, 1029)} | {9: bytes(PAGE_SIZE)},
        {3: page_of(1), 600: page_of(2)},
    ),
    "vga.vram": Mapped(5 * PAGE_SIZE, {1: page_of(3), 2: bytes(PAGE_SIZE)}, {4: page_of(4)}),
    "empty.rom": Mapped(0),
    "pc.bios": Mapped(PAGE_SIZE, {0: page_of(5)}),
}


@pytest.mark.parametrize("piped", [0, 5000, 1 << 20])
def test_mapped_ram(piped: int) -> None:
    """Pages without a bit are zero, whatever is in their place; and that is in the native file all the same."""
    built = build_mapped(BLOCKS, ["pc.ram"])
    with captured(built.data, piped) as capture:
        check(built, capture)
        assert capture.native.literals.size < 20 * PAGE_SIZE
        assert capture.native.entries.size // 40 < 30


def test_mapped_ram_of_numa_nodes() -> None:
    nodes = {name: Mapped(4 * PAGE_SIZE, {number: page_of(number)}) for number, name in enumerate(["b", "a"])}
    built = build_mapped(nodes, ["a", "b"])
    with captured(built.data) as capture:
        check(built, capture)
        assert [region.guest_address for region in capture.geometry.regions] == [4 * PAGE_SIZE, 0]


def test_mapped_ram_that_is_not_what_it_seemed(tmp_path: Path) -> None:
    """QEMU sorts blocks by size, so a backend before a smaller ``pc.ram`` cannot be placed in one pass."""
    blocks = {"hostmem": Mapped(8 * PAGE_SIZE), "pc.ram": Mapped(4 * PAGE_SIZE, {1: page_of(1)})}
    assert "not the guest's memory, as it seemed" in str(refusal(build_mapped(blocks, ["pc.ram"]).data, tmp_path))


SMALL = {"pc.ram": Mapped(3 * PAGE_SIZE, {1: page_of(1)}), "pc.bios": Mapped(PAGE_SIZE, {0: page_of(2)})}


def test_every_truncation_of_mapped_ram(tmp_path: Path) -> None:
    built = build_mapped(SMALL, ["pc.ram"])
    interesting = (
        set(range(0, len(built.data), 97)) | set(range(200)) | set(range(built.devices_at - 60, len(built.data)))
    )
    for length in sorted(interesting - {built.eof_at + 1, len(built.data)}):
        error = refusal(built.data[:length], tmp_path)
        assert error.offset is not None
        assert error.offset <= length
        assert error.field
    check_accepts(built)


def check_accepts(built: Built) -> None:
    with captured(built.data) as capture:
        check(built, capture)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"version": 2}, "mapped-ram version"),
        ({"page_size": 16384}, "mapped-ram page size"),
        ({"bitmap_at": 0}, "mapped-ram bitmap offset"),
        ({"bitmap_at": 2**64 - 1}, "mapped-ram pages offset"),
        ({"bitmap_at": 2**62, "pages_at": 2**63}, "mapped-ram bitmap"),
        ({"pages_at": 0}, "mapped-ram pages offset"),
        ({"pages_at": 2**64 - 1}, "mapped-ram pages"),
    ],
)
def test_fields_of_mapped_ram(header: dict[str, int], field: str, tmp_path: Path) -> None:
    error = refusal(build_mapped(SMALL, ["pc.ram"], b"", **header).data, tmp_path)
    assert error.field == field
    assert error.offset is not None


@pytest.mark.parametrize("size", [2**46 + PAGE_SIZE, 2**64 - PAGE_SIZE])
def test_too_much_memory(size: int, tmp_path: Path) -> None:
    built = build([[Record("page", "pc.ram", 0, page_of(1))]])
    table = built.data.index(u64(10 * PAGE_SIZE | 4))
    error = refusal(built.data[:table] + u64(size | 4) + built.data[table + 8 :], tmp_path)
    assert (error.field, error.offset) == ("RAM block table", table)
    assert counted("pc.ram") in built.data
