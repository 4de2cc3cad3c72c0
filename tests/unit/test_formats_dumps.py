"""ELF cores and kdump-compressed dumps, built from their descriptions."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.capture import ByteSource, Capture
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_reader import NativeReader
from tests.unit.dumps import (
    EM_386,
    EM_AARCH64,
    Load,
    Page,
    elf_core,
    flatten,
    kdump,
    note,
    page_of,
    pages_of,
    prstatus_note,
    qemu_note,
)

piped = pytest.mark.parametrize("piped", [False, True])


def content(source: ByteSource) -> bytes:
    return bytes(source.read_at(0, source.size))


@contextmanager
def captured(data: bytes, directory: Path, *, piped: bool = False) -> Iterator[Capture]:
    path = directory / "dump"
    path.write_bytes(data)
    with open_capture(io.BytesIO(data) if piped else path, spool_dir=directory) as capture:
        assert content(NativeReader(capture.native, capture.memory)) == data
        assert capture.restore == {}
        assert capture.state.size == 0
        yield capture


def regions(capture: Capture) -> dict[int, bytes]:
    return {r.guest_address: bytes(capture.memory.read_at(r.offset, r.size)) for r in capture.geometry.regions}


def refused(data: bytes, directory: Path, format: str) -> UnsupportedInputError:
    path = directory / "dump"
    path.write_bytes(data)
    with pytest.raises(UnsupportedInputError) as caught, open_capture(path, spool_dir=directory, format=format):
        pass
    assert "\n" not in str(caught.value)
    return caught.value


@piped
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("gap", [b"", b"not memory"])
def test_elf(bits: int, gap: bytes, piped: bool, tmp_path: Path) -> None:
    low, high = pages_of(0, 5), bytes(PAGE_SIZE) + pages_of(9, 2)
    loads = [Load(0xFD000000, high), Load(0, low), Load(0xC0000, pages_of(20, 1), more=PAGE_SIZE)]
    notes = prstatus_note() + qemu_note(0x2000, cr0=0x50033) + note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n")
    with captured(elf_core(loads, notes, bits=bits, gap=gap), tmp_path, piped=piped) as capture:
        assert capture.source_format == "elf-core"
        assert regions(capture) == {0: low, 0xC0000: pages_of(20, 1), 0xFD000000: high}
        assert list(regions(capture)) == [0, 0xC0000, 0xFD000000]
        assert capture.config == {"vmcoreinfo": b"OSRELEASE=6.1\n"}
        assert capture.native.literals.size < 2000
        (vcpu,) = capture.vcpus
        assert (vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer) == (0x50033, 0x2000, 0x6F0, None)
        assert (vcpu.rip, vcpu.rsp, vcpu.cs) == (0xFFFFFFFF81C01ABC, 0xFFFFC90000013EC8, 0x10)
        assert (vcpu.gdt_base, vcpu.idt_base) == (0xFFFFFE0000001000, 0xFFFFFE0000000000)
        assert vcpu.mode == "long"


def tables() -> bytes:
    """Frames 2 to 5 lead from a PML4 to a page table."""
    after = {2: 3, 3: 4, 4: 5}
    return b"".join(
        struct.pack("<Q", after.get(pfn, 0) << 12 | (pfn in after)).ljust(PAGE_SIZE, b"\0") for pfn in range(8)
    )


def test_page_tables_are_found(tmp_path: Path) -> None:
    with captured(elf_core([Load(0, tables())], qemu_note(0x2000)), tmp_path) as capture:
        assert [(kind.first, kind.kind) for kind in capture.essential] == [
            (2, "pml4"),
            (3, "pdpt"),
            (4, "pd"),
            (5, "pt"),
        ]
    dump = kdump([Page(pfn, tables()[pfn * PAGE_SIZE :][:PAGE_SIZE]) for pfn in range(8)], notes=qemu_note(0x2000))
    with captured(dump, tmp_path) as capture:
        assert [(kind.first, kind.kind) for kind in capture.essential] == [
            (2, "pml4"),
            (3, "pdpt"),
            (4, "pd"),
            (5, "pt"),
        ]


@pytest.mark.parametrize(
    ("notes", "machine", "modes"),
    [
        (qemu_note(0, cr0=0x80000011, cs_flags=0xCF9B00), EM_386, ["protected"]),
        (qemu_note(0, cr0=0x10, cs_flags=0x9B00), 62, ["real"]),
        (qemu_note(0, cr0=0x11, cs_flags=0xCF9B00), 62, ["protected"]),
        (qemu_note(0, cs_flags=0xCF9B00), 62, ["compatibility"]),
        (qemu_note(0, version=2), 62, []),
        (qemu_note(0), EM_AARCH64, []),
        (prstatus_note() * 2, 62, [None, None]),
        (prstatus_note(), EM_AARCH64, []),
        (note(b"QEMU", 0, bytes(100)) + note(b"LINUX", 9, b"?"), 62, []),
    ],
)
@pytest.mark.expect_log("")
def test_vcpus(notes: bytes, machine: int, modes: list[str | None], tmp_path: Path) -> None:
    with captured(elf_core([Load(0, bytes(PAGE_SIZE))], notes, machine=machine), tmp_path) as capture:
        assert [vcpu.mode for vcpu in capture.vcpus] == modes


def test_more_headers_than_the_elf_header_can_say(tmp_path: Path) -> None:
    loads = [Load(number * 2 * PAGE_SIZE, page_of(number)) for number in range(20)]
    for bits in (64, 32):
        with captured(elf_core(loads, many=True, bits=bits), tmp_path) as capture:
            assert len(capture.geometry.regions) == 20


@piped
def test_same_memory_several_times(piped: bool, tmp_path: Path) -> None:
    """With ``paging=on`` segments are mappings, of the same bytes of the file; /proc/vmcore has bytes twice."""
    loads = [
        Load(0x10000, pages_of(0, 8), virtual=0xFFFF888000010000),
        Load(0x10000, pages_of(0, 4), virtual=0x400000, at=0),
        Load(0x14000, pages_of(4, 6), virtual=0xFFFFFFFF81000000),
        Load(0x40000, pages_of(0, 3), at=0),
    ]
    with captured(elf_core(loads), tmp_path, piped=piped) as capture:
        assert regions(capture) == {0x10000: pages_of(0, 10), 0x40000: pages_of(0, 3)}


def test_parts_of_pages(tmp_path: Path) -> None:
    loads = [Load(0x1000, b"a" * 5000), Load(0x1000 + 5000, b"b" * 9000), Load(0x9800, b"c" * 100)]
    with captured(elf_core(loads), tmp_path) as capture:
        data = b"a" * 5000 + b"b" * 9000
        assert regions(capture) == {
            0x1000: data.ljust(4 * PAGE_SIZE, b"\0"),
            0x9000: (bytes(0x800) + b"c" * 100).ljust(PAGE_SIZE, b"\0"),
        }


ONE = [Load(0, page_of(0))]


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"\x7fELG" + bytes(60), "magic", "7f454c47"),
        (elf_core(ONE, order=2), "ELF data", "little-endian"),
        (elf_core(ONE, kind=2), "e_type", "no core"),
        (elf_core([]), "program headers", "dump-core"),
        (elf_core([], note(b"X", 1, b"")), "program headers", "dump-core"),
        (
            elf_core([Load(0, page_of(1), virtual=0x400000), Load(0, page_of(2), virtual=0x7F0000)]),
            "p_paddr",
            "process",
        ),
        (elf_core([Load(1 << 52, page_of(0))]), "program header 0", "52 bits"),
        (elf_core(ONE)[:-1], "program header 0", "beyond the end"),
        (elf_core(ONE, prstatus_note() + bytes(8)), "notes", "left over"),
        (elf_core(ONE, struct.pack("<III", 5, 5, 1)), "notes", "0x0 are left"),
        (elf_core(ONE).replace(struct.pack("<HH", 56, 1), struct.pack("<HH", 32, 1)), "e_phentsize", "32 bytes"),
    ],
)
def test_elf_refused(data: bytes, field: str, reason: str, tmp_path: Path) -> None:
    error = refused(data, tmp_path, "elf-core")
    assert error.field == field
    assert reason in str(error)
    assert error.offset is not None


DUMPED = [Page(pfn, page_of(pfn)) for pfn in (0, 1, 2, 3, 7)] + [Page(pfn, bytes(PAGE_SIZE)) for pfn in (8, 9, 10)]
DUMPED += [Page(11, page_of(11), flags=0), Page(70000, page_of(1))]
DUMPED += [Page(70001, page_of(2), flags=0x20, packed=zstandard.compress(page_of(2)))]


@piped
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("version", [6, 5])
def test_kdump(flat: bool, version: int, piped: bool, tmp_path: Path) -> None:
    data = kdump(DUMPED, notes=prstatus_note() + qemu_note(0, cr0=0x11), vmcoreinfo=b"PAGESIZE=4096\n", version=version)
    with captured(flatten(data) if flat else data, tmp_path, piped=piped) as capture:
        assert capture.source_format == "kdump"
        assert capture.source_version == f"{version} flattened" if flat else str(version)
        assert regions(capture) == {
            0: pages_of(0, 4),
            0x7000: page_of(7) + bytes(3 * PAGE_SIZE) + page_of(11),
            70000 * PAGE_SIZE: pages_of(1, 2),
        }
        assert capture.config == {"vmcoreinfo": b"PAGESIZE=4096\n"}
        assert [vcpu.rip for vcpu in capture.vcpus] == [0xFFFFFFFF81C01ABC]


def test_kdump_of_many_pieces(tmp_path: Path) -> None:
    """makedumpfile leaves out free pages."""
    pages = [Page(pfn, page_of(pfn)) for pfn in range(0, 3000, 3)]
    with captured(kdump(pages), tmp_path) as capture:
        found = regions(capture)
        assert len(found) == 1
        assert found[0] == b"".join(page_of(pfn) if pfn % 3 == 0 else bytes(PAGE_SIZE) for pfn in range(2998))


def one(data: bytes, **options: object) -> bytes:
    return kdump([Page(0, page_of(0), packed=data, **options)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"KDUMQ   " + kdump(DUMPED)[8:], "magic", "4b44554d51"),
        (kdump(DUMPED, block=65536), "block size", "32-bit"),
        (kdump(DUMPED, status=8), "status", "incomplete"),
        (kdump(DUMPED, split=1), "split", "reassemble"),
        (kdump(DUMPED, end=1 << 40), "end of frames", "0x10000000000 frames"),
        (kdump(DUMPED, end=0, version=5), "end of frames", "0x0 frames"),
        (kdump(DUMPED, notes=bytes(5)), "notes", "left over"),
        (kdump(DUMPED)[:9000], "second bitmap", "ends after"),
        (kdump(DUMPED[:1])[: 4 * PAGE_SIZE + 20], "page descriptors", "ends before"),
        (kdump(DUMPED)[:-1], "page descriptor", "beyond the end"),
        (one(b"lzo", flags=2), "page descriptor", "lzo"),
        (one(b"snappy", flags=4), "page descriptor", "kdump-zlib"),
        (one(b"x" * 100, flags=0), "page descriptor", "0x64 bytes"),
        (one(b"x", size=0), "page descriptor", "0x0 bytes"),
        (one(b"x", size=2**32 - 1), "page descriptor", "0xffffffff bytes"),
        (one(b"no zlib"), "page", "cannot be decompressed"),
        (one(zlib.compress(bytes(PAGE_SIZE - 1))), "page", "not exactly"),
        (one(zlib.compress(bytes(9 << 20))[:8000]), "page", "not exactly"),
        (one(zstandard.compress(bytes(PAGE_SIZE + 1)), flags=0x20), "page", ""),
        (one(zstandard.compress(bytes(9 << 20)), flags=0x20), "page", ""),
        (flatten(kdump(DUMPED))[:-8], "flat piece", "ends after"),
        (flatten(kdump(DUMPED))[:-17], "flat piece", "ends after"),
        (flatten(b"")[:PAGE_SIZE] + struct.pack(">qq", -2, 5), "flat piece", ""),
        (flatten(b"")[:PAGE_SIZE] + struct.pack(">qq", 1 << 62, 5), "flat piece", "0x4000000000000000"),
        (struct.pack(">16sQQ", b"makedumpfile", 2, 1).ljust(PAGE_SIZE, b"\0"), "flat header", "type 2"),
    ],
)
def test_kdump_refused(data: bytes, field: str, reason: str, tmp_path: Path) -> None:
    error = refused(data, tmp_path, "kdump")
    assert error.field == field
    assert reason in str(error)
    assert error.offset is not None


@pytest.mark.parametrize("data", [elf_core(ONE), kdump(DUMPED)])
def test_no_memory_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="in itself"), open_capture(path, spool_dir=tmp_path, memory_files=[path]):
        pass
