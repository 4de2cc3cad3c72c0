"""Xen streams of PV, PVH and HVM guests, built from the specification, and a genuine one where it is at hand."""

from __future__ import annotations

import hashlib
import io
import random
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.formats import open_capture, regions
from imagefs.image.capture import ByteSource, Capture, PageKind
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native_reader import NativeReader
from tests.unit.xen_streams import (
    BROKEN,
    JSON,
    L1TAB,
    L2TAB,
    L3TAB,
    L4TAB,
    PINNED,
    TIME_SCALE,
    XALLOC,
    XTAB,
    Entry,
    hvm_stream,
    libvirt,
    libxl,
    page_data,
    page_of,
    pages,
    pv_stream,
    record,
    xl,
)

GENUINE = Path(__file__).resolve().parents[3] / "shared" / "data" / "xen-pvh-1vcpu.save.zst"


def content(source: ByteSource) -> bytes:
    return bytes(source.read_at(0, source.size))


@contextmanager
def captured(data: bytes, directory: Path, *, piped: bool = False) -> Iterator[Capture]:
    """Recognised, and put together again byte for byte; its memory's windows agree with the whole."""
    path = directory / "save"
    path.write_bytes(data)
    with open_capture(io.BytesIO(data) if piped else path, spool_dir=directory) as capture:
        assert capture.source_format == "xen"
        assert content(NativeReader(capture.native, capture.memory)) == data
        check_source(capture.memory)
        yield capture


def check_source(source: ByteSource) -> None:
    whole = content(source)
    for at in range(0, source.size, 5000):
        assert source.read_at(at, 6000) == whole[at : at + 6000]
        assert at <= source.next_data(at) <= source.size
        assert not any(whole[at : source.next_data(at)])
    assert source.next_data(source.size) == source.size


def frames(capture: Capture) -> dict[int, bytes]:
    """Pages by frame number."""
    data = content(capture.memory)
    return {
        capture.geometry.pfn_of_page(page): data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        for page in range(capture.geometry.pages)
    }


@pytest.mark.parametrize("piped", [False, True])
def test_pvh(piped: bool, tmp_path: Path) -> None:
    low = pages(0, 5) + pages(5, 2, XTAB) + pages(7, 3)
    high = pages(0xFEFF8, 8)
    stream = hvm_stream(page_data(low) + page_data(high), vcpus=2, cr3=0x2000)
    with captured(xl(libxl(stream)), tmp_path, piped=piped) as capture:
        assert [(r.guest_address, r.size) for r in capture.geometry.regions] == [
            (0, 5 * PAGE_SIZE),
            (7 * PAGE_SIZE, 3 * PAGE_SIZE),
            (0xFEFF8000, 8 * PAGE_SIZE),
        ]
        assert frames(capture) == {pfn: data for pfn, _, data in low + high if data}
        assert capture.config == {"xl.json": JSON[:-1]}
        assert capture.source_version == "3"
        vcpu = capture.vcpus[1]
        assert len(capture.vcpus) == 2
        assert (vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer) == (0x80050033, 0x2000, 0x6F0, 0xD01)
        assert (vcpu.rip, vcpu.rsp, vcpu.cs) == (0xFFFFFFFF81A43C83, 0xFFFFC90000093E40, 0x10)
        assert (vcpu.gdt_base, vcpu.idt_base) == (0xFFFFFE0000001000, 0xFFFFFE0000000000)
        assert (vcpu.mode, vcpu.levels) == ("long", 4)
        pages_at = capture.restore["pages_at"]
        assert capture.restore == {
            "vmm": "xen",
            "kind": "pvh",
            "stream": "xl",
            "xen": "4.17",
            "libxc_version": 3,
            "cpus": 2,
            "pages_at": pages_at,
            "tsc": {"mode": 0, "khz": 2300002, "nsec": 46778870113, "incarnation": 1},
            "hvm_params": {
                "store_pfn": "0xfeffc",
                "ioreq_pfn": "0xfeffd",
                "console_pfn": "0xfefff",
                "ident_pt": "0xfeffe000",
                "param_99": "0xffffffffffffffff",
            },
            "vcpu_info_pfns": [],
        }
        # The state is the file without the pages, and they fit in again where they were.
        state = content(capture.state)
        assert state == xl(libxl(hvm_stream(b"", vcpus=2, cr3=0x2000)))
        assert state[:pages_at] + page_data(low) + page_data(high) + state[pages_at:] == xl(libxl(stream))


def test_hvm_has_emulators(tmp_path: Path) -> None:
    stream = hvm_stream(page_data(pages(0, 4)), emulated=True)
    xenstore = record(2, struct.pack("<II", 2, 0) + b"physmap/0/size\x001000\0")
    emulator = record(3, struct.pack("<II", 2, 0) + b"QEVM" + bytes(101))
    with captured(xl(libxl(stream, xenstore + emulator)), tmp_path) as capture:
        assert capture.restore["kind"] == "hvm"
        assert xenstore + emulator in content(capture.state)


@pytest.mark.parametrize("piped", [False, True])
def test_outermost_layers(piped: bool, tmp_path: Path) -> None:
    stream = hvm_stream(page_data(pages(3, 4)))
    with captured(stream, tmp_path, piped=piped) as capture:
        assert capture.restore["stream"] == "libxc"
        assert capture.config == {}
    with captured(libxl(stream), tmp_path, piped=piped) as capture:
        assert capture.restore["stream"] == "libxl"
        assert sorted(frames(capture)) == [3, 4, 5, 6]
    with captured(libvirt(libxl(stream)), tmp_path, piped=piped) as capture:
        assert capture.restore["stream"] == "libvirt"
        assert capture.config == {"domain.xml": b"<domain type='xen'/>\n"}


def pv_tables(root: int) -> list[Entry]:
    """Page tables of a guest of 64 bits: contents do not matter, types do."""
    return [
        (root, L4TAB | PINNED, page_of(root)),
        (root + 1, L4TAB, page_of(root + 1)),
        (root + 2, L3TAB, page_of(root + 2)),
        (root + 3, L2TAB, page_of(root + 3)),
        (root + 4, L1TAB, page_of(root + 4)),
        (root + 5, L1TAB | PINNED, page_of(root + 5)),
    ]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("piped", [False, True])
def test_pv(piped: bool, version: int, tmp_path: Path) -> None:
    data = page_data(pages(0, 20)) + page_data(pv_tables(20) + pages(26, 6))
    stream = pv_stream(data, last=39, root=20, vcpus=2, version=version)
    with captured(xl(libxl(stream)), tmp_path, piped=piped) as capture:
        assert capture.essential == (
            PageKind(20, 2, "pml4"),
            PageKind(22, 1, "pdpt"),
            PageKind(23, 1, "pd"),
            PageKind(24, 2, "pt"),
        )
        assert capture.source_version == str(version)
        vcpu = capture.vcpus[1]
        assert (vcpu.cr3, vcpu.rip, vcpu.cs, vcpu.rsp) == (20 << 12, 0xFFFFFFFF8100146A, 0xE033, 0xFFFFFFFF82203E90)
        assert (vcpu.mode, vcpu.levels) == ("long", 4)
        assert capture.restore["kind"] == "pv"
        assert capture.restore["guest_width"] == 8
        assert capture.restore["end_of_pfns"] == 40
        assert "hvm_params" not in capture.restore


def test_pv_of_32_bits(tmp_path: Path) -> None:
    tables: list[Entry] = [(4, L3TAB | PINNED, page_of(4)), (5, L2TAB, page_of(5)), (6, L1TAB, page_of(6))]
    stream = pv_stream(page_data(pages(0, 4) + tables), last=2000, width=4, root=0x123456)
    with captured(stream, tmp_path) as capture:
        (vcpu,) = capture.vcpus
        assert (vcpu.cr3, vcpu.rip, vcpu.cs, vcpu.rsp) == (0x123456000, 0xC1001227, 0xE019, 0xC15C7F78)
        assert (vcpu.mode, vcpu.levels) == ("protected", 3)
        assert [kind.kind for kind in capture.essential] == ["pdpt", "pd", "pt"]


def test_sent_again(tmp_path: Path) -> None:
    """A live migration: the last copy counts, the others are in the native file only."""
    first = pages(0, 8) + pages(8, 2, XALLOC)
    again = [(2, 0, page_of(100)), (3, 0, page_of(101)), (7, XTAB, b""), (9, 0, page_of(102)), (5, BROKEN, b"")]
    third = [(3, 0, page_of(200)), (4, XALLOC, b""), (11, BROKEN, b""), (12, XTAB, b"")]
    stream = hvm_stream(page_data(first) + page_data(again) + record(13) + page_data(third))
    expected = {pfn: page_of(pfn) for pfn in range(8)} | {2: page_of(100), 3: page_of(200), 8: bytes(PAGE_SIZE)}
    expected |= {9: page_of(102)}
    for piped in (False, True):
        with captured(stream, tmp_path, piped=piped) as capture:
            assert frames(capture) == expected
            assert content(capture.native.superseded) == page_of(2) + page_of(3) + page_of(101)


def test_page_that_became_a_table(tmp_path: Path) -> None:
    data = page_data([*pages(0, 4), (4, L1TAB, page_of(4))]) + page_data([(2, L4TAB, page_of(9)), (4, 0, page_of(8))])
    with captured(pv_stream(data, last=9), tmp_path) as capture:
        assert capture.essential == (PageKind(2, 1, "pml4"),)


def test_page_tables_are_found_from_cr3(tmp_path: Path) -> None:
    """In a PVH guest's stream pages have no types."""
    tables = {2: 3, 3: 4, 4: 5, 5: 6}
    data = [
        (pfn, 0, struct.pack("<Q", tables.get(pfn, 0) << 12 | (pfn in tables)).ljust(PAGE_SIZE, b"\0"))
        for pfn in range(8)
    ]
    with captured(hvm_stream(page_data(data), cr3=0x2000), tmp_path) as capture:
        assert [(kind.first, kind.kind) for kind in capture.essential] == [
            (2, "pml4"),
            (3, "pdpt"),
            (4, "pd"),
            (5, "pt"),
        ]


def test_vcpu_info(tmp_path: Path) -> None:
    info = struct.pack("<IIQQ", 64, 0, 1 << 40, 1 << 30) + TIME_SCALE + bytes(3)
    shared = bytearray(page_of(3))
    shared[32:64] = shared[96:128] = info
    unaligned = bytes(1) + info
    locked = struct.pack("<I", 65) + info[4:]
    data: list[Entry] = [
        (0x10, 0, bytes(shared)),
        (0x11, 0, unaligned.ljust(PAGE_SIZE, b"\0")),
        (0x12, 0, locked.ljust(PAGE_SIZE, b"\0")),
        (0x20, 0, info.rjust(PAGE_SIZE, b"\0")),
        (0x21, 0, TIME_SCALE.ljust(PAGE_SIZE, b"\0")),
    ]
    with captured(hvm_stream(page_data(data)), tmp_path) as capture:
        assert capture.restore["vcpu_info_pfns"] == [0x10, 0x20]


def test_many_pieces_of_memory(tmp_path: Path) -> None:
    """The smallest gaps are filled; every page is where its frame number says."""
    picker = random.Random(5)
    pfns = [*sorted(picker.sample(range(5000), 600)), 1 << 20, (1 << 31) - 1]
    stream = hvm_stream(page_data([(pfn, 0, page_of(pfn)) for pfn in pfns]))
    with captured(stream, tmp_path, piped=True) as capture:
        assert 100 < len(capture.geometry.regions) <= regions.MAX_REGIONS
        data = frames(capture)
        assert {pfn: data[pfn] for pfn in pfns} == {pfn: page_of(pfn) for pfn in pfns}
        assert not any(map(any, (page for pfn, page in data.items() if pfn not in set(pfns))))
        assert len(data) < 5000


@settings(max_examples=40)
@given(
    records=st.lists(
        st.lists(
            st.tuples(st.integers(0, 12), st.sampled_from([0, 0, 0, XALLOC, XTAB, BROKEN])), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=4,
    ),
    piped=st.booleans(),
)
def test_any_order(records: list[list[tuple[int, int]]], piped: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected: dict[int, bytes] = {}
    data = b""
    seed = 0
    for entries in records:
        built: list[Entry] = []
        for pfn, kind in entries:
            seed += 1
            built.append((pfn, kind, page_of(seed) if kind == 0 else b""))
            if kind == 0:
                expected[pfn] = page_of(seed)
            elif kind == XALLOC:
                expected.setdefault(pfn, bytes(PAGE_SIZE))
        data += page_data(built)
    if not expected:
        return
    with captured(hvm_stream(data), tmp_path_factory.mktemp("any"), piped=piped) as capture:
        assert frames(capture) == expected


def test_windows_of_the_frame_types(tmp_path: Path) -> None:
    """Runs across the border of what is in memory at a time are one run."""
    border = 1 << 16
    with captured(hvm_stream(page_data(pages(border - 2, 4))), tmp_path) as capture:
        (region,) = capture.geometry.regions
        assert (region.guest_address, region.size) == ((border - 2) * PAGE_SIZE, 4 * PAGE_SIZE)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with open_capture(io.BytesIO(hvm_stream(page_data(pages(0, 2)))), spool_dir=tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_genuine_stream(tmp_path: Path) -> None:
    """What xl 4.17 saved of a PVH guest, where the file is at hand; one that was built like it otherwise."""
    if not GENUINE.exists():
        with captured(xl(libxl(hvm_stream(page_data(pages(0, 16)) + page_data(pages(17, 9))))), tmp_path) as capture:
            assert [region.size // PAGE_SIZE for region in capture.geometry.regions] == [16, 9]
        return
    whole = hashlib.sha256()
    with GENUINE.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        while data := stream.read(1 << 20):
            whole.update(data)
    with (
        GENUINE.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as stream,
        open_capture(stream, spool_dir=tmp_path) as capture,
    ):
        reader = NativeReader(capture.native, capture.memory)
        native = hashlib.sha256()
        for at in range(0, reader.size, 1 << 20):
            native.update(reader.read_at(at, 1 << 20))
        assert native.digest() == whole.digest()
        pieces = [(r.guest_address // PAGE_SIZE, r.size // PAGE_SIZE) for r in capture.geometry.regions]
        assert pieces == [(0, 16), (17, 49135), (0xFC000, 9), (0xFEFF8, 8)]
        (vcpu,) = capture.vcpus
        assert (vcpu.cr3, vcpu.rip, vcpu.mode) == (0x2A10000, 0xFFFFFFFF81A43C83, "long")
        assert capture.restore["kind"] == "pvh"
        assert capture.restore["vcpu_info_pfns"] == [0xB831]
        kinds: Counter[str] = Counter()
        for run in capture.essential:
            kinds[run.kind] += run.count
        assert kinds == {"pml4": 1, "pdpt": 69, "pd": 8, "pt": 23, "ktext": 3586}
        assert b'"type": "pvh"' in capture.config["xl.json"]
        assert capture.state.size == 4949
