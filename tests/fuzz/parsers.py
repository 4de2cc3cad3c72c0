"""What is read from a store, before and after its digest is checked, and the guest's page tables."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from imagefs.errors import CorruptObjectError
from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.chunks import Codec
from imagefs.image.document import parse_document
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.index import IndexBlock
from imagefs.image.linux import kernel_text
from imagefs.image.manifest import Manifest, Name
from imagefs.image.mappings import mapped_pages
from imagefs.image.metadata import decode_metadata
from imagefs.image.native import ENTRY_SIZE, NativeTemplate
from imagefs.image.native_reader import NativeReader
from imagefs.image.pagetables import walk
from imagefs.image.translate import AddressSpace
from imagefs.image.vcpu import VcpuState
from imagefs.store.directory import DirectoryStore
from imagefs.store.writer import write_image
from tests.fuzz.target import Target
from tests.unit.captures import capture_of, memory_of
from tests.unit.tables import PRESENT, USER, Mapper, Ram, paging
from tests.unit.working_sets import SetImage

PAGES = 24
"""Of the memory whose tables are walked; in two regions with a hole."""
REGISTERS = struct.Struct("<6Q")


def targets() -> Iterator[Target]:
    yield Target("page-tables", _walk, list(_tables()))
    objects = _objects()
    yield Target("name", partial(_parsed, lambda data: Name.decode(data, key="k", origin="o")), [objects["name"]])
    yield Target(
        "manifest", partial(_parsed, lambda data: Manifest.decode(data, key="k", origin="o")), [objects["manifest"]]
    )
    codec = Codec()
    yield Target(
        "metadata",
        partial(_parsed, lambda data: decode_metadata(codec, data, key="k", origin="o")),
        [objects["metadata"]],
    )
    yield Target(
        "document", partial(_parsed, lambda data: parse_document(data, key="k", origin="o")), [objects["document"]]
    )
    yield Target("index-block", _index_block, [objects["block"]])
    yield Target("native-template", _native, [objects["native"]])
    with tempfile.TemporaryDirectory() as directory:
        made = SetImage.make(Path(directory) / "s", 60, 1, chunk_pages=8, parts=False)
        working_set = made.publish([50, 3, 4, 17, 51])
    yield Target("working-set", partial(_working_set, made), [working_set])


def _parsed(parse: object, data: bytes) -> None:
    with suppress(CorruptObjectError):
        parse(data)  # type: ignore[operator]


# --- page tables: six registers, then the memory


def _tables() -> Iterator[bytes]:
    for levels in (2, 3, 4, 5):
        ram = Ram(PAGES, PAGES if levels == 2 else PAGES // 2)
        mapper = Mapper(ram, levels, range(1, PAGES))
        for virtual in (0x40_0000, 0x7FFF_F000) if levels < 4 else (0x40_0000, 0xFFFF_FFFF_8000_0000):
            mapper.map(virtual, ram.address(0) | PRESENT | USER)
        vcpu = paging(levels, mapper.root)
        registers = (vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer, 0xFFFF_FFFF_8000_0000, 0x40_0123)
        yield REGISTERS.pack(*(value or 0 for value in registers)) + bytes(ram.data)


def _walk(data: bytes) -> None:
    if len(data) < REGISTERS.size:
        return
    cr0, cr3, cr4, efer, idt, virtual = REGISTERS.unpack_from(data)
    vcpu = VcpuState(cr0, cr3, cr4, efer, idt_base=idt, mode="long" if idt & 1 else None)
    memory = BytesSource(data[REGISTERS.size :][: PAGES * PAGE_SIZE].ljust(PAGES * PAGE_SIZE, b"\0"))
    low = PAGES // 2 * PAGE_SIZE
    geometry = Geometry((Region("low", 0, low, 0), Region("high", 4 << 30, low, low)))
    for run in (*walk(memory, geometry, [vcpu]), *kernel_text(memory, geometry, [vcpu])):
        assert 0 <= run.first < run.first + run.count <= PAGES
    found = AddressSpace(memory, geometry, vcpu).translate(virtual)
    assert bool(found.page_size) != bool(found.fault)
    assert len(found.steps) <= 5
    assert sum(1 for _ in mapped_pages(memory, geometry, vcpu, limit=20)) <= 20 * 1024


# --- a store's objects


def _objects() -> dict[str, bytes]:
    """Of a small image with everything in it."""
    with tempfile.TemporaryDirectory() as directory:
        store = DirectoryStore(Path(directory) / "s", create=True)
        capture = capture_of(
            memory_of(40, 1),
            state=b"state" * 99,
            config={"a.xml": b"<a/>"},
            vcpus=(VcpuState(0x8005_0033, 0x1000, 0x6B0, 0xD01, mode="long"),),
            essential=(PageKind(3, 2, "pt"),),
        )
        write_image(store, "vm", capture, chunk_pages=8)
        name = store.get("vm")
        manifest_digest = Name.decode(name, key="k", origin="o").manifest.hex()
        manifest = store.get(f"objects/{manifest_digest[:2]}/{manifest_digest}")
        decoded = Manifest.decode(manifest, key="k", origin="o")
        metadata = store.get(f"objects/{decoded.metadata.hex()[:2]}/{decoded.metadata.hex()}")
        root = decoded.streams["memory"].root
        assert root is not None
        pack = store.get(f"objects/{root.place.pack.hex()[:2]}/{root.place.pack.hex()}")
        (length,) = struct.unpack_from("<I", metadata, 8)
        template = capture.native
        entries = bytes(template.entries.read_at(0, template.entries.size))
        return {
            "name": name,
            "manifest": manifest,
            "metadata": metadata,
            "document": Codec().decompress_bounded(metadata[12 : 12 + length], 1 << 20),
            "block": pack[root.place.offset : root.place.offset + root.place.length],
            "native": bytes([len(entries) // ENTRY_SIZE, 0]) + entries + b"literal",
        }


def _index_block(data: bytes) -> None:
    with suppress(CorruptObjectError):
        block = IndexBlock(data, key="k", origin="o")
        for slot in block.occupied():
            block.child(slot) if block.level else block.chunk(slot)
        list(block.gaps())


def _working_set(made: SetImage, data: bytes) -> None:
    """Whatever is taken for a page is a page of the memory."""
    with suppress(CorruptObjectError):
        made.check(made.read(data, piece=1000))


def _native(data: bytes) -> None:
    """Number of entries and of exceptions, a byte each; entries, exceptions, literals."""
    if len(data) < 2:
        return
    entries, exceptions = data[0] * ENTRY_SIZE, data[1] * 8
    body = data[2:]
    parts = (body[:entries], body[entries + exceptions :], body[entries:][:exceptions], bytes(data[1] * PAGE_SIZE))
    template = NativeTemplate(1 << 20, *(BytesSource(part) for part in parts))
    with suppress(ValueError):
        reader = NativeReader(template, BytesSource(bytes(8 * PAGE_SIZE)))
        for offset in (0, PAGE_SIZE + 5, (1 << 20) - 100):
            assert len(reader.read_at(offset, 3 * PAGE_SIZE)) <= 3 * PAGE_SIZE
