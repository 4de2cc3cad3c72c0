"""docs/format.md, the writer, and two readers agree: imagefs' own, and one written from the page alone."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import StoreError
from imagefs.formats import open_capture
from imagefs.image import chunks, fields, index, manifest, metadata, native, native_files, packs
from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.geometry import Geometry, Region, flat_geometry
from imagefs.image.native import NativeTemplate, TemplateBuilder
from imagefs.image.native_files import NativeFile
from imagefs.image.native_reader import NativeReader
from imagefs.image.workingset import WorkingSet
from imagefs.store import advance, base, reader, workingset, writer
from imagefs.store.directory import DirectoryStore
from imagefs.store.verify import Verifier
from tests.unit import format_example, streams
from tests.unit.captures import capture_of, memory_of
from tests.unit.format_example import MEMORY, NAME, example, files, write
from tests.unit.reference_reader import BLOCK_LIMIT, FANOUT, PAGE, ReferenceReader, Refused, bits_of, hash_of


def test_the_example_is_what_the_writer_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "Codec", format_example.FramesShown)
    write(tmp_path / "s", example())
    made = format_example.render(tmp_path / "s")
    assert format_example.shown() == made, "python -m tests.unit.format_example writes the example anew"


def test_the_example_can_be_read(tmp_path: Path) -> None:
    for key, data in format_example.objects_shown().items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    for image in (reference(tmp_path), own(tmp_path)):
        assert image["memory"] == format_example.MEMORY
        assert image["state"] == format_example.STATE
        assert image["native"] == format_example.NATIVE


# --- two readers


def reference(root: Path, name: str = NAME) -> dict[str, Any]:
    """All of an image by the reference reader."""
    image = ReferenceReader(root, name)
    return {
        **{stream: image.read(stream, 0, image.size(stream)) for stream in image.streams},
        "native": image.read_native(),
        "document": image.document,
        "runs": image.runs,
    }


def own(root: Path, name: str = NAME) -> dict[str, Any]:
    """All of an image by imagefs' own reader."""
    store, codec = DirectoryStore(root), chunks.Codec()
    image = reader.load_image(store, name, codec)
    source = reader.ImageReader(store, image, codec).source
    template = NativeTemplate(
        int(image.metadata.document["native_bytes"]),
        source("native-entries"),
        source("native-literals"),
        source("native-exceptions"),
        source("native-superseded"),
    )
    native_file = NativeReader(template, source("memory"))
    return {
        **{stream: source(stream).read_at(0, source(stream).size) for stream in image.manifest.streams},
        "native": native_file.read_at(0, native_file.size),
        "document": image.metadata.document,
        "runs": list(image.metadata.pages),
    }


@st.composite
def templates(draw: st.DrawFn, memory: bytes) -> tuple[NativeTemplate, bytes]:
    """A template of any shape over the memory, and the file that it describes."""
    entries, literals, exceptions, superseded, file = bytearray(), bytearray(), bytearray(), bytearray(), bytearray()
    builder = TemplateBuilder(entries.extend, literals.extend)
    pages = len(memory) // PAGE
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["literal", "pages", "bare", "old page"]))
        prefix = draw(st.sampled_from([b"", b"h", bytes(8), b"\xff" * 8 + b"name"]))
        first = draw(st.integers(0, pages - 1))
        count = draw(st.integers(1, min(5, pages - first)))
        step = draw(st.sampled_from([0, 1, 4096, 2**32 - 1])) if len(prefix) >= 8 else 0
        counter = int.from_bytes(prefix[:8], "big")
        prefixes = [((counter + step * i) % 2**64).to_bytes(8, "big") + prefix[8:] for i in range(count)]
        if len(prefix) < 8:
            prefixes = [prefix] * count
        if kind == "literal":
            data = draw(st.binary(max_size=40))
            builder.literal(data)
            file += data
        elif kind == "bare" and prefix:
            builder.bare(count, prefix, step)
            file += b"".join(prefixes)
        elif kind == "pages":
            builder.pages(first, count, prefix, step)
            for i in range(count):
                file += prefixes[i] + memory[PAGE * (first + i) : PAGE * (first + i + 1)]
        elif kind == "old page":
            old = bytes([draw(st.integers(0, 255))]) * PAGE
            exceptions += struct.pack("<Q", builder.pages(first, 1, prefix))
            superseded += old
            file += prefix + old
    builder.finish()
    parts = (BytesSource(bytes(part)) for part in (entries, literals, exceptions, superseded))
    return NativeTemplate(builder.size, *parts), bytes(file)


@settings(max_examples=40)
@given(data=st.data())
def test_both_readers_read_what_the_writer_writes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store") / "s"
    pages = data.draw(st.integers(1, 150), "pages")
    memory = memory_of(pages, data.draw(st.integers(0, 2**32), "seed"), data.draw(st.sampled_from([0.0, 0.6, 1.0])))
    template, file = data.draw(templates(memory))
    low = data.draw(st.integers(1, pages), "pages of the first region")
    regions = (Region("low", 0, low * PAGE, 0), Region("high", 1 << 32, (pages - low) * PAGE, low * PAGE))
    state = data.draw(st.binary(max_size=3 * PAGE), "state")
    capture = capture_of(
        memory,
        state=state,
        config={"a.json": b"{}", "b.txt": data.draw(st.binary(max_size=9000), "config")},
        geometry=Geometry(regions if low < pages else regions[:1]),
        restore={"notes": ['\x00\x1f"\\/\x7f é 𝄞']},
        essential=(PageKind(low - 1, 1, "pml4"),),
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(file)), max_size=3), "ends of the native files"))
    sizes = [end - start for start, end in pairwise([0, *cuts, len(file)])] if cuts else []
    several = tuple(NativeFile(f"d{i // 2}/f{i}", size) for i, size in enumerate(sizes))
    capture = replace(capture, native=template, native_files=several)
    write(root, capture, data.draw(st.sampled_from([8, 16, 64]), "chunk_pages"))
    found = reference(root)
    assert found == own(root)
    assert found["document"].get("native_files", []) == [asdict(file) for file in several]
    assert found["memory"] == memory
    assert found["state"] == state
    assert found["native"] == file
    table = memory[PAGE * (low - 1) : PAGE * low]
    assert found["runs"] == ([(low - 1, table)] if any(table) else [])
    image = ReferenceReader(root, NAME)
    assert image.pfn(0) == 0
    assert low == pages or image.pfn(low) == 1 << 20
    for x in data.draw(st.lists(st.integers(0, len(file) - 1), max_size=3), "offsets") if file else []:
        assert image.native_byte(x) == file[x]
    image.parts.clear()  # the same from the packs alone
    assert image.read_native() == file
    check_packs(root)


@settings(max_examples=30)
@given(data=st.data())
def test_both_readers_read_a_working_set(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("store") / "s"
    pages = data.draw(st.integers(1, 600), "pages")
    memory = memory_of(pages, data.draw(st.integers(0, 2**32), "seed"), data.draw(st.sampled_from([0.0, 0.6])))
    write(root, capture_of(memory), data.draw(st.sampled_from([8, 16, 64]), "chunk_pages"))
    store, codec = DirectoryStore(root), chunks.Codec()
    image = reader.load_image(store, NAME, codec)
    if data.draw(st.booleans(), "the set carries the index"):
        image = replace(image, metadata=replace(image.metadata, parts={}))
    pages_wanted = tuple(data.draw(st.sets(st.integers(0, pages - 1)), "wanted"))
    wanted = WorkingSet(pages_wanted, (3,) * len(pages_wanted))
    workingset.publish(reader.ImageReader(store, image, codec), wanted, codec)
    found = ReferenceReader(root, NAME).read_working_set()
    assert [(page, often) for page, often, _ in found] == list(workingset.read_set(store, image, codec).items())
    assert all(content == memory[PAGE * page : PAGE * (page + 1)] for page, _, content in found)
    needed = {page for page in wanted.pages if any(memory[PAGE * page : PAGE * (page + 1)])}
    assert needed <= {page for page, _, _ in found}
    assert {often for _, often, _ in found} <= {3}


def test_damage_of_a_working_set(tmp_path: Path, rng: random.Random) -> None:
    """Flipped and cut everywhere: both readers refuse it, or read the same right pages."""
    root = tmp_path / "s"
    write(root, example())
    store, codec = DirectoryStore(root), chunks.Codec()
    image = reader.load_image(store, NAME, codec)
    image = replace(image, metadata=replace(image.metadata, parts={}))
    workingset.publish(reader.ImageReader(store, image, codec), WorkingSet((2,), (1,)), codec)
    key = base.working_set_key(image.digest)
    original = store.get(key)
    want = MEMORY[2 * PAGE :]
    assert ReferenceReader(root, NAME).read_working_set() == [(2, 1, want)]
    for data in damaged(rng, original):
        (root / key).write_bytes(data)
        with suppress(StoreError):
            assert workingset.read_set(store, image, codec).pages == (2,)
            # Only how many recordings it is from may be another number.
            assert ReferenceReader(root, NAME).read_working_set()[0][::2] == (2, want)


def test_an_index_of_several_levels(tmp_path: Path) -> None:
    size = (FANOUT * FANOUT + 3) * 8 * PAGE
    touched = (0, 511 * 8 * PAGE, 512 * 8 * PAGE, FANOUT * FANOUT * 8 * PAGE, size - PAGE)
    capture = replace(capture_of(bytes(PAGE)), memory=Sparse(size, touched), geometry=flat_geometry(size))
    write(tmp_path / "s", capture)
    image = ReferenceReader(tmp_path / "s", NAME)
    for at in touched:
        assert image.read("memory", at, 2 * PAGE)[:2] == b"\1\0"
    assert not any(image.read("memory", size // 2, 100))
    image.parts.clear()  # the same from the packs alone
    assert image.read("memory", touched[-2], 1) == b"\1"
    check_packs(tmp_path / "s")


@dataclass(frozen=True)
class Sparse:
    """A source of zeros but for a byte of 1 at some offsets."""

    size: int
    at: tuple[int, ...]

    def read_at(self, offset: int, length: int) -> bytes:
        data = bytearray(min(length, self.size - offset))
        for at in self.at:
            if offset <= at < offset + len(data):
                data[at - offset] = 1
        return bytes(data)

    def next_data(self, offset: int) -> int:
        return min((max(at, offset) for at in self.at if at + PAGE > offset), default=self.size)


def test_a_qemu_migration(tmp_path: Path) -> None:
    """A live-migrated guest: page 1 travels twice, page 2 as a zero page, and a page of another block."""
    page = streams.page_of
    sections = [
        [],
        [streams.Record("page", "pc.ram", n, page(n)) for n in (0, 1, 3, 4, 5)],
        [
            streams.Record("fill", "pc.ram", 2, b"\0"),
            streams.Record("zlib", "pc.ram", 6, page(6)),
            streams.Record("page", "vga.vram", 1, page(7)),
            streams.Record("page", "pc.ram", 1, page(8)),
        ],
    ]
    built = streams.build(sections)
    root = tmp_path / "s"
    DirectoryStore(root, create=True)
    with open_capture(BytesIO(built.data), spool_dir=root) as capture:
        write(root, capture)
    found = reference(root)
    assert found == own(root)
    assert found["native"] == built.data
    assert found["memory"] == built.memory
    assert found["state"] == built.state
    assert len(found["native-superseded"]) == PAGE
    assert found["document"]["source"] == {"format": "qemu-migration", "version": "3"}
    assert set(found["document"]["restore"]) >= {"vmm", "machine", "ram_block", "ram_bytes", "incoming", "other_blocks"}


# --- what else the page says


def check_packs(root: Path) -> None:
    """Packs, index blocks, slots and ``stored_bytes`` are as the page has them; every payload is in a table."""
    image = ReferenceReader(root, NAME)
    stored = 0
    for stream, found in image.streams.items():
        windows = -(-found["size"] // image.window)
        level = next(level for level in range(9) if FANOUT ** (level + 1) >= windows)
        if found["root"] is not None:
            ref = [bytes.fromhex(found["root"][name]) for name in ("digest", "pack")]
            stored += check_block(image, stream, (*ref, found["root"]["offset"], found["root"]["length"]), level, 0)
    assert stored == image.manifest["stored_bytes"]
    entries = 0
    for key, data in files(root).items():
        if data[-8:] == b"1KCAPSFI":
            assert hash_of(data).hex() == key.rpartition("/")[2]
            toc, count = struct.unpack_from("<II", data, len(data) - 16)
            assert data[:8] == b"IFSPACK1"
            assert toc + 44 * count + 16 == len(data)
            end = 8
            for digest, offset, length, pages in struct.iter_unpack("<32sIII", data[toc:-16]):
                assert offset == end
                end += length
                payload = data[offset:end]
                content = zstandard.ZstdDecompressor().decompress(payload) if pages else b""
                assert len(content) == PAGE * pages
                hashes = [hash_of(content[at : at + PAGE]) for at in range(0, len(content), PAGE)]
                assert digest == hash_of(b"".join(hashes) if pages else payload)
                entries += 1
            assert end == toc
    assert entries > 0


def check_block(image: ReferenceReader, stream: str, ref: tuple[Any, ...], level: int, number: int) -> int:
    """Bytes stored at and below a block."""
    digest, pack, offset, length = ref[:4]
    data = image.path(pack).read_bytes()[offset : offset + length]
    windows = -(-image.size(stream) // image.window)
    present, entries = image.read_block(digest, data, level, number, windows)
    children = windows if level == 0 else -(-windows // FANOUT**level)
    assert struct.unpack_from("<H", data, 8)[0] == min(FANOUT, children - FANOUT * number)
    (packs_used,) = struct.unpack_from("<H", data, 10)
    table = [data[80 + 32 * i : 112 + 32 * i] for i in range(packs_used)]
    assert table == list(dict.fromkeys(entry[1] for entry in entries))
    if level:
        below = [
            check_block(image, stream, entry, level - 1, FANOUT * number + slot)
            for slot, entry in zip(present, entries, strict=True)
        ]
        return int(length) + sum(below)
    pages = -(-image.size(stream) // PAGE)
    for slot, entry in zip(present, entries, strict=True):
        assert (FANOUT * number + slot) * image.chunk_pages + max(entry[4]) < pages
    return int(length + sum(entry[3] for entry in entries))


def test_limits_are_those_of_the_page() -> None:
    text = format_example.FORMAT_PAGE.read_text()
    assert manifest.VERSION == index.VERSION == 1
    assert index.FANOUT == FANOUT == 512
    assert index.MAX_BLOCK_SIZE == BLOCK_LIMIT == 103_504
    assert (index.HEADER.size, index.ENTRY.size, native.ENTRY_SIZE, native.EXCEPTION_SIZE) == (80, 42, 40, 8)
    assert (packs.MAGIC, packs.END_MAGIC, packs.TOC_ENTRY.size, packs.FOOTER_SIZE) == (b"IFSPACK1", b"1KCAPSFI", 44, 16)
    assert (packs.TARGET_SIZE, packs.MAX_PACK_SIZE, packs.MAX_ENTRIES) == (32 << 20, 40 << 20, 16384)
    assert (metadata.MAGIC, metadata.TARGET_SIZE, metadata.MAX_RUN_PAGES) == (b"IFSMETA1", 768 << 10, 256)
    assert (manifest.MAX_NAME_SIZE, manifest.MAX_MANIFEST_SIZE, manifest.MAX_METADATA_SIZE) == (4096, 1 << 20, 1 << 20)
    assert (metadata.MAX_DOCUMENT_SIZE, chunks.MAX_CHUNK_PAGES, reader.MAX_PAYLOAD) == (4 << 20, 1024, 65 << 16)
    assert (native.MAX_LITERAL, base.MAX_KEY_LENGTH, advance.ADVANCE_LIMIT) == (1 << 30, 1024, 384 << 10)
    assert (native.MAX_PREFIX, metadata.MAX_PAGES, native_files.MAX_COMPONENT) == (1 << 16, 4096, 255)
    for said in (
        "103 504 bytes",
        "16384 payloads",
        "40 MiB",
        "768 KiB",
        "4 MiB + 64 KiB",
        "2^30 bytes",
        "1024 charact",
    ):
        assert said in text


def canonical(value: Any) -> str:
    """Canonical JSON by the page's words."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        return '"' + "".join(short.get(c, f"\\u{ord(c):04x}" if c < " " else c) for c in value) + '"'
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 2**63 - 1) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_canonical_json(value: Any) -> None:
    assert fields.canonical_json(value) == canonical(value).encode() + b"\n"


def test_a_bitmap_counts_from_the_least_bit() -> None:
    assert bits_of(b"\x05\x80") == [0, 2, 15]


# --- damage


def damaged(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Each byte with one bit flipped, each truncation, and a byte too many."""
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
        yield data[:at]
    yield data + b"\n"


def found_by_verify(root: Path) -> bool:
    store, codec = DirectoryStore(root), chunks.Codec()
    try:
        image = reader.load_image(store, NAME, codec)
        return bool(list(Verifier(store, image, codec).damage()))
    except StoreError:
        return True


def test_every_damage_is_found(tmp_path: Path, rng: random.Random) -> None:
    """A tiny image, each byte of it damaged, each object cut everywhere: no wrong byte is read, `verify` sees all."""
    root = tmp_path / "s"
    write(root, example())
    want = own(root)
    assert not found_by_verify(root)
    objects = files(root)
    assert sum(map(len, objects.values())) < 4096
    for key, original in objects.items():
        path = root / key
        for data in damaged(rng, original):
            path.write_bytes(data)
            with suppress(StoreError):
                assert own(root) == want, (key, data.hex())
            assert found_by_verify(root), (key, data.hex())
            with suppress(Refused, OSError):
                assert reference(root) == want, (key, data.hex())
        path.unlink()
        with suppress(StoreError):
            assert own(root) == want, key
        assert found_by_verify(root), key
        path.write_bytes(original)
    assert own(root) == want
