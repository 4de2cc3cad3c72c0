"""What is written can be read, byte for byte; what is damaged is found; what failed leaves nothing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import ImagefsError, StoreError, UnsupportedInputError, UsageError
from imagefs.image.capture import BytesSource, Capture, PageKind
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE, flat_geometry
from imagefs.image.index import FANOUT, walk_chunks
from imagefs.image.manifest import Manifest
from imagefs.store.base import object_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import ImageReader, load_image
from imagefs.store.writer import Written, write_image
from tests.unit.captures import capture_of, memory_of

STATE = b"device state " * 1000


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
        return min((max(at, offset) for at in self.at if at + PAGE_SIZE > offset), default=self.size)


class Broken(BytesSource):
    """Cannot be read beyond 8 MiB."""

    def read_at(self, offset: int, length: int) -> memoryview:
        if offset >= 8 << 20:
            raise OSError("the disk is on fire")
        return super().read_at(offset, length)


def reader_of(root: Path, name: str = "vm") -> ImageReader:
    store, codec = DirectoryStore(root), Codec()
    return ImageReader(store, load_image(store, name, codec), codec)


def write(root: Path, capture: Capture, name: str = "vm", chunk_pages: int = 16) -> Written:
    return write_image(DirectoryStore(root, create=True), name, capture, chunk_pages=chunk_pages)


def everything(reader: ImageReader) -> dict[str, bytes]:
    return {name: reader.source(name).read_at(0, stream.size) for name, stream in reader.image.manifest.streams.items()}


@settings(max_examples=25)
@given(
    pages=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    chunk=st.sampled_from([8, 16, 24, 64]),
)
def test_streams_come_back(
    tmp_path_factory: pytest.TempPathFactory, pages: int, seed: int, share: float, chunk: int
) -> None:
    root = tmp_path_factory.mktemp("store") / "s"
    memory = memory_of(pages, seed, share)
    write(root, capture_of(memory, state=STATE, config={"domain.xml": b"<domain/>"}), chunk_pages=chunk)
    reader = reader_of(root)
    streams = everything(reader)
    assert streams["memory"] == memory
    assert streams["state"] == STATE
    assert streams["config/domain.xml"] == b"<domain/>"
    assert reader.image.metadata.document["memory_bytes"] == len(memory)


@pytest.mark.parametrize("chunk", [24, 40, 168, 264, 1024])
def test_windows_that_no_mebibyte_is_a_multiple_of(tmp_path: Path, chunk: int) -> None:
    """Nor the other way about: workers take whole windows."""
    memory = memory_of(1500, 9, 0.3)
    write(tmp_path / "s", capture_of(memory, state=STATE), chunk_pages=chunk)
    assert everything(reader_of(tmp_path / "s"))["memory"] == memory


@pytest.mark.parametrize("chunk", [0, 4, 12, 1032, -8])
def test_windows_that_there_are_not(tmp_path: Path, chunk: int) -> None:
    with pytest.raises(UsageError, match="must be a multiple of 8 up to 1024"):
        write(tmp_path / "s", capture_of(memory_of(1, 1)), chunk_pages=chunk)


def test_trees_of_several_levels(tmp_path: Path) -> None:
    """Content far apart in a sparse memory: the levels between hold a handful of blocks, not a million."""

    size = (FANOUT * FANOUT + 3) * 8 * PAGE_SIZE
    touched = (0, FANOUT * 8 * PAGE_SIZE, size - PAGE_SIZE)
    capture = replace(capture_of(bytes(PAGE_SIZE)), memory=Sparse(size, touched), geometry=flat_geometry(size))
    write(tmp_path / "s", capture, chunk_pages=8)
    reader = reader_of(tmp_path / "s")
    stream = reader.image.manifest.streams["memory"]
    assert stream.root is not None
    assert stream.root.level == 2
    assert [window for window, _ in walk_chunks(stream, reader.block)] == [0, FANOUT, FANOUT * FANOUT + 2]
    source = reader.source("memory")
    assert source.read_at(FANOUT * 8 * PAGE_SIZE, 2) == b"\1\0"
    assert source.next_data(1 << 20) == FANOUT * 8 * PAGE_SIZE


def test_the_same_image_has_the_same_name(tmp_path: Path) -> None:
    memory = memory_of(100, 1)
    first = write(tmp_path / "a", capture_of(memory))
    second = write(tmp_path / "b", capture_of(memory))
    assert first == second


def test_equal_chunks_are_stored_once_per_store(tmp_path: Path) -> None:
    memory = memory_of(400, 2)
    first = write(tmp_path / "s", capture_of(memory), "one")
    changed = bytearray(memory)
    changed[0:8] = b"changed!"
    second = write(tmp_path / "s", capture_of(bytes(changed)), "two")
    assert second.new_bytes < first.new_bytes / 4
    assert everything(reader_of(tmp_path / "s", "one"))["memory"] == memory
    assert everything(reader_of(tmp_path / "s", "two"))["memory"] == bytes(changed)


def test_small_streams_are_stored_once_too(tmp_path: Path) -> None:
    """Although their chunks travel with each image's metadata."""
    state = memory_of(64, 17, 0.0)
    first = write(tmp_path / "s", capture_of(memory_of(20, 2), state=state), "one")
    second = write(tmp_path / "s", capture_of(memory_of(20, 3), state=state), "two")
    assert len(reader_of(tmp_path / "s", "two").image.metadata.parts) > 4
    (tmp_path / "s" / object_key(second.manifest.hex())).stat()
    metadata = reader_of(tmp_path / "s", "two").image.manifest.metadata_size
    assert second.new_bytes - metadata < first.new_bytes / 2
    assert everything(reader_of(tmp_path / "s", "two"))["state"] == state


def test_a_lost_catalogue_and_a_lost_pack_are_no_loss(tmp_path: Path) -> None:
    root, memory = tmp_path / "s", memory_of(400, 3)
    write(root, capture_of(memory), "one")
    (root / ".catalogue.sqlite").write_bytes(b"no database, this is")
    again = write(root, capture_of(memory), "two")
    assert again.new_bytes == 0
    for path in (root / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    write(root, capture_of(memory), "three")
    assert everything(reader_of(root, "three"))["memory"] == memory


def test_a_failed_split_leaves_nothing(tmp_path: Path) -> None:
    memory = memory_of(8192, 4, 0.2)
    capture = replace(capture_of(memory), memory=Broken(memory))
    with pytest.raises(OSError, match="on fire"):
        write(tmp_path / "s", capture)
    assert list(DirectoryStore(tmp_path / "s").keys()) == []


def test_essential_pages_travel_with_the_metadata(tmp_path: Path) -> None:
    memory = memory_of(64, 5, 0.0)
    write(tmp_path / "s", capture_of(memory, essential=(PageKind(3, 2, "pt"), PageKind(40, 1, "pml4"))))
    pages = reader_of(tmp_path / "s").image.metadata.pages
    assert [(page, len(data)) for page, data in pages] == [(40, PAGE_SIZE), (3, 2 * PAGE_SIZE)]
    assert pages[1][1] == memory[3 * PAGE_SIZE : 5 * PAGE_SIZE]


@dataclass(frozen=True)
class Striped:
    """Every eighth page is the same within 16 MiB, all others zeros: chunks cost nothing, leaves as much as ever."""

    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        stripe = (1 + (offset >> 24)).to_bytes(4, "big") * (PAGE_SIZE // 4) + bytes(7 * PAGE_SIZE)
        start = offset % len(stripe)
        return (stripe * (length // len(stripe) + 2))[start : start + min(length, self.size - offset)]

    def next_data(self, offset: int) -> int:
        return offset


def test_page_tables_do_not_wait_for_the_index(tmp_path: Path) -> None:
    """Leaves of 768 MiB in use take more than all the room."""
    size = 768 << 20
    tables = (PageKind(0, 400, "pt"), PageKind(size // PAGE_SIZE - 8, 8, "pml4"))
    capture = replace(
        capture_of(bytes(PAGE_SIZE), essential=tables), memory=Striped(size), geometry=flat_geometry(size)
    )
    write(tmp_path / "s", capture, chunk_pages=8)
    reader = reader_of(tmp_path / "s")
    metadata = reader.image.metadata
    assert [page for page, _ in metadata.pages] == [size // PAGE_SIZE - 8, *range(0, 400, 8)]
    assert all(data == b"\0\0\0\1" * 1024 for _, data in metadata.pages[1:])
    assert 700 << 10 < reader.image.manifest.metadata_size <= 768 << 10
    root = reader.image.manifest.streams["memory"].root
    assert root is not None
    assert root.level == 1
    leaves = [reader.block(root).child(slot) for slot in reader.block(root).occupied()]
    here = [leaf is not None and leaf.digest in metadata.parts for leaf in leaves]
    assert here[0]
    assert not here[-1]


@pytest.mark.parametrize("name", ["", "..", "a/b", "\0", "\ud800", "x" * 256])
def test_config_files_without_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedInputError, match=r"config: .* cannot be the name of a file"):
        write(tmp_path / "s", capture_of(memory_of(1, 1), config={name: b""}))
    assert list(DirectoryStore(tmp_path / "s").keys()) == []


def test_more_config_files_than_a_manifest_holds(tmp_path: Path) -> None:
    config = {f"{number:04}": b"" for number in range(30_000)}
    with pytest.raises(UnsupportedInputError, match="config: 30000 config files are too many"):
        write(tmp_path / "s", capture_of(memory_of(1, 1), config=config))
    assert list(DirectoryStore(tmp_path / "s").keys()) == []


def test_every_flipped_byte_is_detected(tmp_path: Path) -> None:
    """One byte of any object, any bit: reading fails with an error of the store, or the bytes are right."""
    root, memory = tmp_path / "s", memory_of(40, 6)
    write(root, capture_of(memory, state=STATE[:500]))
    want = everything(reader_of(root))
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        original = path.read_bytes()
        step = max(1, len(original) // 150)
        for at in range(0, len(original), step):
            damaged = bytearray(original)
            damaged[at] ^= 1 << (at % 8)
            path.write_bytes(damaged)
            with suppress(StoreError):
                assert everything(reader_of(root)) == want
        path.write_bytes(original)
    assert everything(reader_of(root)) == want


def test_every_truncation_is_detected(tmp_path: Path) -> None:
    root, memory = tmp_path / "s", memory_of(40, 7)
    write(root, capture_of(memory))
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        original = path.read_bytes()
        for size in range(0, len(original), max(1, len(original) // 40)):
            path.write_bytes(original[:size])
            with suppress(ImagefsError):
                assert everything(reader_of(root))["memory"] == memory
        path.write_bytes(original)


def test_manifest_is_canonical(tmp_path: Path) -> None:
    write(tmp_path / "s", capture_of(memory_of(20, 8)))
    image = reader_of(tmp_path / "s").image
    key = object_key(image.digest.hex())
    data = DirectoryStore(tmp_path / "s").get(key)
    assert Manifest.decode(data, key=key, origin="").encode() == data
