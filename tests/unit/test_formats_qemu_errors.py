"""QEMU migration streams that must be refused: truncated, damaged, or with pages that are not in them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError
from imagefs.formats import open_capture
from imagefs.image.capture import Capture
from imagefs.image.geometry import PAGE_SIZE
from tests.unit.streams import DEVICES, Built, Kind, Options, Record, build, counted, page_of, subsection, u32, u64

SMALL = [
    [Record("zlib", "pc.ram", 0, page_of(1)), Record("fill", "pc.ram", 1, b"\0")],
    [
        Record("page", "pc.ram", 2, page_of(2)),
        Record("page", "pc.ram", 3, page_of(3)),
        Record("fill", "vga.vram", 0, b"\0"),
    ],
    [Record("zlib", "vga.vram", 1, page_of(4)), Record("fill", "pc.ram", 4, b"\0"), Record("fill", "pc.ram", 5, b"\7")],
    [Record("page", "pc.ram", 2, page_of(5)), Record("fill", "pc.ram", 3, b"\0")],
]
FULL = Options(uuid=bytes(16), page_bits=12, commands=[(1, b""), (2, bytes(4))], late_commands=[(11, b"")])


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], UnsupportedInputError]:
    def refused(data: bytes) -> UnsupportedInputError:
        """The error that a stream is refused with, alike from a file and from a pipe."""
        errors = []
        path = tmp_path / "save"
        path.write_bytes(data)
        for source in (path, io.BytesIO(data)):
            with (
                pytest.raises(UnsupportedInputError) as caught,
                open_capture(source, spool_dir=tmp_path, format="qemu-migration"),
            ):
                pass
            errors.append(caught.value)
        assert str(errors[0]) == str(errors[1])
        assert "\n" not in str(errors[0])
        return errors[0]

    return refused


def accepted(data: bytes, directory: Path) -> Capture:
    with open_capture(io.BytesIO(data), spool_dir=directory) as capture:
        return capture


def page_bodies(built: Built) -> set[int]:
    """Offsets inside the bytes of plain pages, most of which need no test of their own."""
    inside: set[int] = set()
    for at, record in built.records:
        if record.kind == "page":
            start = built.data.index(record.content, at)
            inside |= set(range(start + 1, start + PAGE_SIZE - 1)) - set(range(start, start + PAGE_SIZE, 509))
    return inside


@pytest.mark.parametrize("options", [FULL, replace(FULL, description=False), replace(FULL, footers=False)])
def test_every_truncation(options: Options, tmp_path: Path) -> None:
    built = build(SMALL, options)
    accepted(built.data, tmp_path)
    skipped = page_bodies(built)
    # Cut just behind EOF, a stream is one without a description, and nothing of the guest is missing.
    whole = {built.eof_at + 1} if options.footers else set()
    for length in range(len(built.data)):
        if length in skipped:
            continue
        if length in whole:
            accepted(built.data[:length], tmp_path)
            continue
        with (
            pytest.raises(UnsupportedInputError, match=r"the stream ends|is empty") as caught,
            open_capture(io.BytesIO(built.data[:length]), spool_dir=tmp_path, format="qemu-migration"),
        ):
            pytest.fail(f"accepted although cut at {length}")
        assert caught.value.offset is not None, length
        assert caught.value.offset <= length
        assert caught.value.field


def test_truncated_file(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(SMALL, FULL)
    at, _ = built.records[2]
    error = refused(built.data[: at + 3000])
    assert error.field == "RAM page"
    assert f"{at:#x}" in str(error)
    error = refused(built.data[: built.devices_at + 30])
    assert error.field == "device state"
    assert error.offset == built.devices_at + 30
    error = refused(built.data[:-3])
    assert error.field == "vmdescription"
    assert error.offset == built.eof_at


def test_every_flag_flipped(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(SMALL, FULL)
    for at, _ in built.records:
        (header,) = struct.unpack_from(">Q", built.data, at)
        for bit in range(12):
            flipped = bytearray(built.data)
            struct.pack_into(">Q", flipped, at, header ^ 1 << bit)
            assert refused(bytes(flipped)).offset is not None


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (0x44, "no known combination"),
        (0x80, "RDMA"),
        (0x200, "multifd"),
        (0x01, "2009"),
        (0x04, "second block table"),
        (0x400, "no known combination"),
        (0x0A, "no known combination"),
        (0x30, "no known combination"),
        (0x00, "no known combination"),
    ],
)
def test_refused_flags(flags: int, reason: str, refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(SMALL, FULL)
    at, _ = built.records[3]
    error = refused(built.data[:at] + u64(0x1000 | flags) + built.data[at + 8 :])
    assert reason in str(error)
    assert error.field == "RAM record flags"
    assert error.offset == at


def patched(built: Built, old: bytes, new: bytes) -> bytes:
    assert built.data.count(old) == 1
    return built.data.replace(old, new)


FOOTER = b"\x7e" + u32(2)
PAGES = [[Record("page", "pc.ram", 1, page_of(1))]]


@pytest.mark.parametrize(
    ("built", "old", "new", "field", "reason"),
    [
        (build(PAGES), b"QEVM", b"QEVN", "magic", "5145564e"),
        (build(PAGES), b"QEVM\0\0\0\3", b"QEVM\0\0\0\2", "version", "2 is not 3"),
        (build(PAGES), b"\7\0\0\0\x0d", b"\7\1\0\0\x0d", "length of machine type", "16777229 bytes"),
        (build(PAGES), b"i440fx", b"i440f\0", "machine type", "not printable"),
        (build(PAGES), u64(10 * PAGE_SIZE | 4), u64(8), "RAM block table", "not with MEM_SIZE"),
        (build(PAGES), b"vga.vram" + u64(2 * PAGE_SIZE), b"vga.vram" + u64(3 * PAGE_SIZE), "RAM block size", "0x3000"),
        (build(PAGES), b"vga.vram" + u64(2 * PAGE_SIZE), b"vga.vram" + u64(100), "RAM block size", "0x64"),
        (build(PAGES), u64(0x1008) + counted("pc.ram"), u64(0x1008) + counted("pc.rum"), "RAM block name", "pc.rum"),
        (build(PAGES), u64(0x1008) + counted("pc.ram"), u64(0x1028), "RAM record flags", "no record before"),
        (build(PAGES), u64(0x1008), u64(0x8008), "RAM page offset", "0x8000 is beyond block 'pc.ram' of 0x8000"),
        (build(PAGES), u64(0x1008), u64((1 << 63) | 8), "RAM page offset", "beyond"),
        (build(PAGES), FOOTER, b"\x7e" + u32(3), "section id in footer", "0x3"),
        (build([*PAGES, []]), b"\3" + u32(2) + u64(0x10) + FOOTER, b"\3" + u32(2) + u64(0x10) + b"\x7f" + u32(2),
         "section footer", "0x7f"),
        (build([*PAGES, []]), b"\3" + u32(2), b"\3" + u32(9), "section id", "0x9 was not started"),
        (build([*PAGES, []]), b"\3" + u32(2), b"\x0b" + u32(2), "section type", "0x0b"),
        (build([*PAGES, []]), b"\3" + u32(2) + u64(0x10) + FOOTER,
         b"\3" + u32(2) + u64(0x10) + FOOTER + b"\2" + u32(2), "section type", "after its end"),
        (build([*PAGES, []]), b"\3" + u32(2), b"\1" + u32(3) + counted("ram") + u32(0) + u32(4), "section name",
         "a second section"),
        (build(PAGES), counted("ram") + u32(0) + u32(4), counted("block") + u32(0) + u32(1), "section name", "'block'"),
        (build(PAGES), counted("ram") + u32(0) + u32(4), counted("ram") + u32(0) + u32(3), "section version", "3 of"),
        (build(PAGES, Options(page_bits=14)), b"unused", b"", "target page bits", "14"),
        (build(PAGES, Options(capabilities=["x-new"])), b"unused", b"", "capability", "'x-new'"),
        (build(PAGES, Options(extra_subsection=subsection("configuration/new", b""))), b"unused", b"",
         "configuration subsection", "configuration/new"),
        (build(PAGES, Options(uuid=bytes(16))), b"uuid" + u32(1), b"uuid" + u32(2), "configuration subsection",
         "version 2"),
        (build(PAGES, Options(commands=[(3, bytes(16))])), b"unused", b"", "command", "POSTCOPY_ADVISE"),
        (build(PAGES, Options(commands=[(7, bytes(4))])), b"unused", b"", "command", "PACKAGED"),
        (build(PAGES, Options(commands=[(8, b"")])), b"unused", b"", "command", "ENABLE_COLO"),
        (build(PAGES, Options(commands=[(12, b"")])), b"unused", b"", "command", "12"),
        (build(PAGES, Options(commands=[(2, bytes(5))])), b"unused", b"", "length of command", "5 is not 4"),
        (build(PAGES, Options(page_size=16384)), b"unused", b"", "vmdescription", "16384"),
        (build(PAGES, Options(blocks={"pc.ram": 0, "vga.vram": 8192})), b"unused", b"", "RAM block table", "empty"),
        (build([[]], Options(blocks={"0/vga.vram": 8192})), b"unused", b"", "RAM block table", "main memory"),
        (build([[]]), b"unused", b"", "RAM block table", "multifd"),
    ],
)  # fmt: skip
def test_damaged_or_not_supported(
    built: Built, old: bytes, new: bytes, field: str, reason: str, refused: Callable[[bytes], UnsupportedInputError]
) -> None:
    data = built.data if old == b"unused" else patched(built, old, new)
    error = refused(data)
    assert error.field == field
    assert reason in str(error)
    if field != "RAM block table" and field != "vmdescription":
        assert error.offset is not None


def zlib_record(packed: bytes, length: int | None = None) -> Built:
    built = build([[Record("zlib", "pc.ram", 0, page_of(1))]])
    at, record = built.records[0]
    body = at + 8 + 1 + len(record.block)
    (old,) = struct.unpack_from(">I", built.data, body)
    data = built.data[:body] + u32(len(packed) if length is None else length) + packed + built.data[body + 4 + old :]
    return replace(built, data=data)


def test_zlib_that_is_no_page(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    good = zlib.compress(page_of(1))
    broken = good[:-1] + bytes([good[-1] ^ 1])  # the checksum
    for packed in (
        zlib.compress(page_of(1)[:-1]),
        zlib.compress(page_of(1) + b"x"),
        good[:-1],
        good + b"x",
        broken,
        b"x",
    ):
        error = refused(zlib_record(packed).data)
        assert error.field == "compressed RAM page"
        assert error.offset is not None
    bomb = zlib.compress(bytes(4 << 20), 9)
    assert "does not inflate" in str(refused(zlib_record(bomb[:4100]).data))
    for length in (0, 4111, 2**32 - 1):
        assert refused(zlib_record(good, length).data).field == "length of compressed RAM page"


@pytest.mark.parametrize("kind", ["page", "fill"])
def test_run_that_leaves_its_block(kind: Kind, refused: Callable[[bytes], UnsupportedInputError]) -> None:
    """The pages of a run up to the block's end are good, the next one is refused where it begins."""
    records = [Record(kind, "pc.ram", page, page_of(page) if kind == "page" else b"\0") for page in range(5, 10)]
    built = build([records])
    error = refused(built.data)
    assert error.field == "RAM page offset"
    assert error.offset == built.records[3][0]


def test_block_table_twice_the_name(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(PAGES, Options(blocks={"pc.ram": 8 * PAGE_SIZE, "pc.rom": PAGE_SIZE}))
    assert "twice" in str(refused(patched(built, counted("pc.rom"), counted("pc.ram"))))


def test_endless_block_table(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    blocks = {"pc.ram": PAGE_SIZE} | {f"b{number}.rom": 0 for number in range(5000)} | {"last.rom": PAGE_SIZE}
    assert "more than 4096 blocks" in str(refused(build(PAGES, Options(blocks=blocks)).data))


def test_device_before_ram(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(PAGES)
    start = built.data.index(b"\1" + u32(2))
    device = b"\4" + u32(1) + counted("0000:00:03.0/virtio-mem-early") + u32(0) + u32(1)
    error = refused(built.data[:start] + device + built.data[start:])
    assert "virtio-mem-early" in str(error)
    assert error.offset is not None


def test_no_ram_at_all(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    assert "without a section 'ram'" in str(refused(b"QEVM\0\0\0\3\0"))


def test_bytes_after_the_end(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    built = build(SMALL, FULL)
    error = refused(built.data + bytes(10))
    assert "10 bytes follow" in str(error)
    assert error.offset == len(built.data)


def test_cut_behind_what_looks_like_the_end(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    """Without a description the last footer must be of a section that there is."""
    looks = b"\x7e" + u32(99) + b"\0"
    built = build(PAGES, Options(devices=[*DEVICES, ("fake", 0, looks + b"rest")], description=False))
    error = refused(built.data[: built.data.index(looks) + len(looks)])
    assert error.field == "device state"


def test_device_data_that_looks_like_a_description(tmp_path: Path) -> None:
    """Whatever devices save: the end decides."""
    tricky = b"\0\6" + u32(5) + b'{"page_size": 1}'
    options = Options(devices=[("virtio-blk", 0, tricky * 3), *DEVICES])
    accepted(build(PAGES, options).data, tmp_path)
    accepted(build(PAGES, replace(options, description=False)).data, tmp_path)
