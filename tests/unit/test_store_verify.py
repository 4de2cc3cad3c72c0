"""``verify`` names all that is wrong with an image, once, and goes on; a store that does not answer is no damage."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imagefs.errors import UnavailableError
from imagefs.image.capture import BytesSource, Capture, PageKind
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.metadata import Metadata
from imagefs.image.native import LITERAL, PAGES, Entry, NativeTemplate
from imagefs.store.base import DEFAULT_LIMIT, object_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import Image, load_image
from imagefs.store.verify import Verifier
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of

MEMORY = memory_of(300, 31, 0.0)
EMPTY = BytesSource(b"")


class Fading(DirectoryStore):
    """Does not answer from the ``number``-th request on."""

    def __init__(self, root: Path, number: int) -> None:
        super().__init__(root)
        self.left = number

    def get(self, key: str, start: int = 0, length: int | None = None, limit: int = DEFAULT_LIMIT) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise UnavailableError("asleep", key=key, origin=self.origin)
        return super().get(key, start, length, limit)


def stored(root: Path, capture: Capture) -> Image:
    store = DirectoryStore(root, create=True)
    write_image(store, "vm", capture)
    return load_image(store, "vm", Codec())


def damage(root: Path, image: Image) -> list[str]:
    return list(Verifier(DirectoryStore(root), image, Codec()).damage())


def without_parts(image: Image) -> Image:
    """As if nothing had travelled with the metadata but essential pages."""
    return replace(image, metadata=replace(image.metadata, parts={}))


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return stored(tmp_path / "s", capture_of(MEMORY, state=b"state" * 999, essential=(PageKind(8, 3, "pt"),)))


@pytest.mark.parametrize("view", [lambda image: image, without_parts], ids=["with parts", "without"])
def test_every_missing_object_is_named(tmp_path: Path, image: Image, view: Callable[[Image], Image]) -> None:
    assert damage(tmp_path / "s", view(image)) == []
    store = DirectoryStore(tmp_path / "s")
    seen = 0
    for key in list(store.keys("objects")):
        data = store.get(key)
        store.delete(key)
        lines = damage(tmp_path / "s", view(image))
        assert all(f"{key}: no such object" in line for line in lines)
        seen += bool(lines)
        store.put(key, data)
    assert seen == 2, "a pack of chunks, and one of index blocks"


def test_a_store_that_falls_silent_is_no_damage(tmp_path: Path, image: Image) -> None:
    for view in (image, without_parts(image)):
        number = 0
        while True:
            try:
                assert list(Verifier(Fading(tmp_path / "s", number), view, Codec()).damage()) == []
                break
            except UnavailableError:
                number += 1
        assert number > (5 if view is not image else 1)


def changed(image: Image, change: Callable[[Metadata], Metadata]) -> Image:
    return replace(image, metadata=change(image.metadata))


def test_pages_and_parts_that_lie(tmp_path: Path, image: Image) -> None:
    """Both travel with the metadata, whose digest is right: it was written so."""
    lying = changed(image, lambda m: replace(m, pages=((8, bytes(PAGE_SIZE)), *m.pages)))
    assert damage(tmp_path / "s", lying) == ["metadata: pages from 8 on are not those of the memory"]
    key = object_key(image.manifest.metadata.hex())
    for name in image.metadata.parts:
        lying = changed(image, lambda m, name=name: replace(m, parts={**m.parts, name: b"nonsense"}))  # type: ignore[misc]
        lines = damage(tmp_path / "s", lying)
        assert any(key in line for line in lines), lines


TEMPLATES: list[tuple[str, list[Entry], bytes, list[int], str]] = [
    ("gap", [Entry(1, 0, 0, 1, 0, 0, PAGES)], b"", [], "nothing says what is at native offset 0x0"),
    ("short", [Entry(0, 0, 0, 1, 0, 0, PAGES)], b"", [], "ends at 0x1000, not at the native file's size"),
    ("page", [Entry(0, 0, 299, 2, 0, 0, PAGES)], b"", [], "a source ends before page 301 of memory"),
    ("literal", [Entry(0, 1, 0, 1, 8192, 0, LITERAL)], b"x" * 8192, [], "a source ends before byte 8193"),
    ("prefix", [Entry(0, 0, 0, 1, 1 << 17, 0, PAGES)], b"x" * (1 << 17), [], "131072 bytes of literal or prefix"),
    ("exceptions", [Entry(0, 0, 0, 2, 0, 0, PAGES)], b"", [4096, 4000], "no superseded page can be at native offset"),
    ("exception", [Entry(0, 0, 0, 2, 0, 0, PAGES)], b"", [4097], "no superseded page can be at native offset 0x1001"),
]


@pytest.mark.parametrize(
    ("entries", "literals", "exceptions", "message"), [t[1:] for t in TEMPLATES], ids=[t[0] for t in TEMPLATES]
)
def test_templates_that_lie(
    tmp_path: Path, entries: list[Entry], literals: bytes, exceptions: list[int], message: str
) -> None:
    table = b"".join(entry.pack() for entry in entries)
    template = NativeTemplate(
        2 * PAGE_SIZE,
        BytesSource(table),
        BytesSource(literals),
        BytesSource(b"".join(struct.pack("<Q", at) for at in exceptions)),
        BytesSource(bytes(len(exceptions) * PAGE_SIZE)),
    )
    (line,) = damage(tmp_path / "s", stored(tmp_path / "s", replace(capture_of(MEMORY), native=template)))
    assert message in line
