"""Images made to do harm: whatever they say, readers raise CorruptObjectError or read what is right."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.cli import main
from imagefs.errors import CorruptObjectError, MissingObjectError
from imagefs.image.capture import PageKind
from imagefs.image.chunks import Codec, digest
from imagefs.image.fields import canonical_json
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import HEADER, BlockRef, ChunkRef, PayloadRef, encode_block, parse_child
from imagefs.image.manifest import Manifest, Name
from imagefs.image.metadata import MAGIC, decode_metadata
from imagefs.store.base import object_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import ImageReader, load_image
from imagefs.store.verify import Verifier
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of

MEMORY = memory_of(60, 41, 0.3)
Change = Callable[[dict[str, Any]], object]


def with_files(*paths: str) -> Change:
    """Says that the native file is these files, the first of them with all the bytes."""

    def change(document: dict[str, Any]) -> None:
        sizes = [document["native_bytes"], *[0] * (len(paths) - 1)]
        document["native_files"] = [{"path": p, "size": s} for p, s in zip(paths, sizes, strict=True)]

    return change


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 4095, 4096, 2**31, 2**32, 2**63 - 1, 2**63])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "../x", "a" * 300, "\x1b[2J", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A copy in which one to three things were replaced, removed or added, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    what = draw(st.sampled_from(["below", "below", "below", "remove", "add", "copy"]))
    if what == "below":
        value[key] = _mutate(draw, value[key])
    elif what == "remove":
        del value[key]
    elif isinstance(value, dict):
        name = draw(st.text(max_size=8) | st.sampled_from(["config/..", "config/a/b", "config/x", "parent", "root"]))
        value[name] = value[key] if what == "copy" else draw(JSON)
    else:
        value.append(value[key] if what == "copy" else draw(JSON))
    return value


def text_of(value: Any, canonical: bool) -> bytes:
    """JSON that may be no canonical one, or hold what UTF-8 has not."""
    if canonical:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    else:
        text = json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


class Forge:
    """A sound image, and the means to put another manifest and another document in its place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = DirectoryStore(root, create=True)
        essential = (PageKind(3, 2, "pt"), PageKind(40, 1, "pml4"))
        capture = capture_of(MEMORY, state=b"state" * 999, config={"a.xml": b"<a/>"}, essential=essential)
        write_image(self.store, "vm", capture, chunk_pages=8)
        self.image = load_image(self.store, "vm", Codec())
        self.manifest: dict[str, Any] = json.loads(self.image.manifest.encode())
        self.document: dict[str, Any] = dict(self.image.metadata.document)
        self.metadata = self.store.get(object_key(self.image.manifest.metadata.hex()))

    def put(self, data: bytes) -> bytes:
        name = digest(data)
        self.store.put(object_key(name.hex()), data)
        return name

    def with_manifest(self, text: bytes) -> None:
        self.store.put("vm", Name(self.put(text), len(text)).encode())

    def with_document(self, text: bytes) -> None:
        (length,) = struct.unpack_from("<I", self.metadata, 8)
        frame = Codec().compress(text)
        data = MAGIC + struct.pack("<I", len(frame)) + frame + self.metadata[12 + length :]
        self.with_manifest(
            canonical_json({**self.manifest, "metadata": {"object": self.put(data).hex(), "size": len(data)}})
        )

    def read(self) -> None:
        """As readers do: all streams, and a verification."""
        image = load_image(self.store, "vm", Codec())
        reader = ImageReader(self.store, image, Codec())
        for name, stream in image.manifest.streams.items():
            with suppress(CorruptObjectError, MissingObjectError):
                reader.source(name).read_at(0, min(stream.size, 1 << 20))
            with suppress(CorruptObjectError, MissingObjectError):
                reader.source(name).next_data(0)
        assert all(isinstance(line, str) for line in Verifier(self.store, image, Codec()).damage())


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    return Forge(tmp_path_factory.mktemp("hostile") / "s")


@settings(max_examples=400)
@given(data=st.data(), canonical=st.booleans())
def test_any_manifest(forge: Forge, data: st.DataObject, canonical: bool) -> None:
    text = text_of(data.draw(mutated(forge.manifest)), canonical)
    try:
        assert Manifest.decode(text, key="k", origin="o").encode() == text
    except CorruptObjectError:
        return
    forge.with_manifest(text)
    with suppress(CorruptObjectError):
        forge.read()


@settings(max_examples=400)
@given(data=st.data(), canonical=st.booleans())
def test_any_document(forge: Forge, data: st.DataObject, canonical: bool) -> None:
    forge.with_document(text_of(data.draw(mutated(forge.document)), canonical))
    with suppress(CorruptObjectError):
        forge.read()


@settings(max_examples=200)
@given(data=st.data(), canonical=st.booleans())
def test_any_name(data: st.DataObject, canonical: bool) -> None:
    text = text_of(data.draw(mutated({"imagefs": 1, "manifest": "ab" * 32, "size": 1000})), canonical)
    with suppress(CorruptObjectError):
        assert Name.decode(text, key="k", origin="o").encode() == text


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for decode in (Manifest.decode, Name.decode):
        with pytest.raises(CorruptObjectError):
            decode(data, key="k", origin="o")
    with pytest.raises(CorruptObjectError):
        decode_metadata(Codec(), MAGIC + data, key="k", origin="o")


@settings(max_examples=40)
@given(data=st.data())
def test_commands_stay_calm(forge: Forge, data: st.DataObject) -> None:
    """Neither a traceback nor an internal error, whatever the document says."""
    forge.with_document(text_of(data.draw(mutated(forge.document)), True))
    for command in (["info"], ["info", "--json"], ["ls"], ["ls", "--pages"], ["ls", "--kind", "pt"], ["verify", "-q"]):
        assert main([*command, str(forge.root / "vm")]) in (0, 1), command


def refusal(forge: Forge, change: Change, *, document: bool = False) -> str:
    value = copy.deepcopy(forge.document if document else forge.manifest)
    change(value)
    (forge.with_document if document else forge.with_manifest)(canonical_json(value))
    with pytest.raises(CorruptObjectError) as caught:
        load_image(forge.store, "vm", Codec())
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(parent="x"), "a field that format version 1 does not have"),
        (lambda m: m.update(imagefs=2), "format version 2; this program reads 1"),
        (lambda m: m["streams"].pop("state"), "streams: state: this stream is missing"),
        (lambda m: m["streams"].pop("native-literals"), "native-literals: this stream is missing"),
        (lambda m: m["streams"]["memory"].update(size=4097), "memory: 4097 bytes are not a multiple of 4096"),
        (lambda m: m["streams"]["native-entries"].update(size=41), "41 bytes are not a multiple of 40"),
        (lambda m: m["streams"]["native-exceptions"].update(size=8), "not one page for each exception"),
        (lambda m: m["streams"].update({"config/..": {"size": 0, "root": None}}), "not a file's name"),
        (lambda m: m["streams"].update({"config/a/b": {"size": 0, "root": None}}), "not a file's name"),
        (lambda m: m["streams"].update({"config/b": {"size": 0, "root": None}}), "config: the metadata object says"),
        (lambda m: m["streams"]["state"].update(size=1), "state_bytes: the metadata object says 4995, the streams 1"),
        (lambda m: m["streams"]["state"].update(size=0), "an empty stream has none"),
        (lambda m: m["streams"]["state"].update(size=2**63), "a non-negative integer is missing here"),
        (lambda m: m["streams"]["state"]["root"].update(length=1 << 20), "1048576 bytes are no index block"),
        (lambda m: m["streams"]["state"]["root"].update(offset=1 << 40), "is more than 41943040"),
        (lambda m: m["metadata"].update(size=m["metadata"]["size"] + 1), "by what refers to it"),
        (lambda m: m["metadata"].update(size=1 << 30), "is more than 1048576"),
    ],
)
def test_manifests_that_are_refused(forge: Forge, change: Change, message: str) -> None:
    assert message in refusal(forge, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("native_bytes"), "native_bytes: a non-negative integer"),
        (lambda d: d.update(native_bytes=True), "native_bytes: a non-negative integer"),
        (lambda d: d.pop("restore"), "restore: not a JSON object"),
        (lambda d: d.update(restore=[]), "restore: not a JSON object"),
        (lambda d: d.update(config="a.xml"), "config: a list is missing"),
        (lambda d: d.update(config=["b.xml"]), "config: the metadata object says ['b.xml'], the streams ['a.xml']"),
        (lambda d: d["source"].pop("format"), "source: format: a string"),
        (lambda d: d.pop("page_tables"), "page_tables: a list"),
        (lambda d: d.update(page_tables=[[59, 2, "pt"]]), "page_tables: 2 pages from 59 on are not in memory"),
        (lambda d: d.update(page_tables=[[1, 0, "pt"]]), "page_tables: 0 pages from 1 on"),
        (lambda d: d.update(page_tables=[[1, 1, "\x1b[2J"]]), "page_tables: a kind is not a word"),
        (lambda d: d.update(likely={}), "likely: a list"),
        (lambda d: d.update(likely=[[1, 2, 3]]), "likely: an item is not [page number, count]"),
        (lambda d: d.update(likely=[[1, "2"]]), "likely: an item is not [page number, count]"),
        (lambda d: d.update(likely=[[59, 2]]), "likely: 2 pages from 59 on are not in memory"),
        (lambda d: d.update(likely=[[1, 0]]), "likely: 0 pages from 1 on"),
        (lambda d: d.update(vcpus={}), "vcpus: a list"),
        (lambda d: d.update(vcpus=[5]), "vcpus: number 0: not a JSON object"),
        (lambda d: d.update(vcpus=[{"cr3": 4096}]), "vcpus: number 0: cr3: a string"),
        (lambda d: d.update(vcpus=[{}, {"rip": "0x10000000000000000"}]), "vcpus: number 1: rip: not 0x and up to 16"),
        (lambda d: d.update(vcpus=[{"rip": "0x01"}]), "vcpus: number 0: rip: not 0x"),
        (lambda d: d.update(vcpus=[{"mode": "virtual"}]), "vcpus: number 0: mode: not one of real, protected"),
        (lambda d: d["regions"][0].update(size=str(d["regions"][0]["size"])), "size: a non-negative integer"),
        (lambda d: d["regions"][0].update(offset=PAGE_SIZE), "does not begin where the one before it ends"),
        (lambda d: d.update(memory_bytes=PAGE_SIZE), "memory_bytes: the regions have"),
        (lambda d: d.update(page_size=8192), "page_size: only 4096 is known"),
        (lambda d: d.update(native_files={}), "native_files: a list is missing"),
        (lambda d: d.update(native_files=[]), "native_files: an empty list"),
        (lambda d: d.update(native_files=["a"]), "native_files: number 0: not a JSON object"),
        (lambda d: d.update(native_files=[{"path": "a"}]), "number 0: size: a non-negative integer"),
        (lambda d: d.update(native_files=[{"path": "a", "size": 1}]), "the files have 1 bytes, the native stream"),
        (with_files("../a"), "native_files: '../a' cannot be the path of a file"),
        (with_files("/a"), "'/a' cannot be the path of a file"),
        (with_files(""), "'' cannot be the path of a file"),
        (with_files("a//b"), "'a//b' cannot be the path of a file"),
        (with_files("a/."), "'a/.' cannot be the path of a file"),
        (with_files("a\0"), "cannot be the path of a file"),
        (with_files("/".join(["x" * 255] * 16) + "/y"), "cannot be the path of a file"),
        (with_files("x" * 256), "cannot be the path of a file"),
        (with_files("a/b", "c", "a/b"), "'a/b' is there twice"),
        (with_files("a/b/c", "a/bb", "a/b"), "'a/b' is a file and a directory"),
    ],
)
def test_documents_that_are_refused(forge: Forge, change: Change, message: str) -> None:
    assert message in refusal(forge, change, document=True)


def test_new_fields_of_the_document_are_ignored(forge: Forge) -> None:
    forge.with_document(canonical_json({**forge.document, "new": {"share": 0.5}, "page_tables": [[1, 1, "vcpu_info"]]}))
    assert load_image(forge.store, "vm", Codec()).metadata.kinds == (PageKind(1, 1, "vcpu_info"),)


def test_name_that_does_not_know_the_size(forge: Forge) -> None:
    text = canonical_json(forge.manifest)
    for size in (len(text) - 1, len(text) + 1):
        forge.store.put("vm", Name(digest(text), size).encode())
        with pytest.raises(CorruptObjectError, match=f"{size}"):
            load_image(forge.store, "vm", Codec())
    forge.store.put("vm", Name(digest(text), len(text)).encode().replace(b":1", b": 1"))
    with pytest.raises(CorruptObjectError, match="not in canonical form"):
        load_image(forge.store, "vm", Codec())


def test_slots_are_held_against_the_stream() -> None:
    """Too few slots would make zeros of the rest, too many lead behind the end of the stream."""
    place = PayloadRef(bytes(32), 8, 100)
    leaf = encode_block(0, 8, 3, [(1, ChunkRef(bytes(32), place, 1))])
    top = encode_block(1, 0, 2, [(1, BlockRef(bytes(32), place, 0, 3))])
    for data, level, right in ((leaf, 0, {3}), (top, 1, set(range(513, 1025)))):
        for windows in (1, 2, 3, 4, 511, 512, 513, 1024, 1025):
            ref = BlockRef(digest(data), place, level, windows)
            if windows in right:
                block = parse_child(data, ref, 8, key="k", origin="o")
                child = block.child(1) if level else None
                assert child is None or child.windows == windows - 512
            else:
                with pytest.raises(CorruptObjectError, match="slots instead of"):
                    parse_child(data, ref, 8, key="k", origin="o")
    assert HEADER.size == 80


@settings(max_examples=150)
@given(
    stream=st.sampled_from(["memory", "state", "native-entries"]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3),
    cut=st.integers(-8, 8),
)
def test_any_index_block(forge: Forge, stream: str, changes: list[tuple[int, bytes]], cut: int) -> None:
    """A block that its digest vouches for, but no writer has made."""
    root = forge.manifest["streams"][stream]["root"]
    pack = forge.store.get(object_key(root["pack"]))
    block = bytearray(pack[root["offset"] : root["offset"] + root["length"]] + bytes(max(cut, 0)))
    for at, data in changes:
        block[at % len(block) : at % len(block) + len(data)] = data
    made = bytes(block[: cut if cut < 0 else None])
    place = {"digest": digest(made).hex(), "pack": forge.put(made).hex(), "offset": 0, "length": len(made)}
    streams = {**forge.manifest["streams"], stream: {**forge.manifest["streams"][stream], "root": place}}
    forge.with_manifest(canonical_json({**forge.manifest, "streams": streams}))
    with suppress(CorruptObjectError, MissingObjectError):
        forge.read()
