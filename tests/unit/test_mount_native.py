"""``native`` of a mount, read asynchronously, against the reader of verify."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefs.errors import CorruptObjectError
from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import LITERAL, PAGES, Entry, NativeTemplate, TemplateBuilder
from imagefs.image.native_reader import NativeReader
from imagefs.image.streams import (
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_LITERALS,
    NATIVE_SUPERSEDED,
)
from imagefs.mount.native_file import NativeFile
from tests.mount.fakes import FakeImage, memory_bytes, native_bytes


class Streams(FakeImage):
    """An image of which only the streams matter; what a coin says is away until it is waited for."""

    def __init__(self, size: int, contents: dict[str, bytes], away: Callable[[], bool]) -> None:
        super().__init__()
        self.native_size = size
        self.contents = {MEMORY: memory_bytes(), **contents}
        self.streams = {name: len(data) for name, data in self.contents.items()}
        self.away = away
        self.now_waiting = self.most_waiting = 0

    def read_present(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes | None:
        return None if self.away() else super().read_present(stream, offset, length)

    async def read(self, stream: str, offset: int, length: int, *, touch: bool = True) -> bytes:
        self.now_waiting += 1
        self.most_waiting = max(self.most_waiting, self.now_waiting)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        self.now_waiting -= 1
        return self.contents[stream][offset : offset + length]


Step = tuple[str, int, int, int]


@st.composite
def templates(draw: st.DrawFn) -> tuple[int, dict[str, bytes]]:
    """Size of a native file and the streams of its template."""
    entries, literals, exceptions, superseded = bytearray(), bytearray(), bytearray(), bytearray()
    builder = TemplateBuilder(entries.extend, literals.extend)
    rng = random.Random(draw(st.integers(0, 1000)))
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(["literal", "pages", "plain", "bare", "old"]))
        page, count = rng.randrange(4000), rng.choice((1, 1, 2, 7, 300))
        prefix = (page << 12 | 8).to_bytes(8, "big") + rng.randbytes(rng.choice((0, 4)))
        if kind == "literal":
            builder.literal(rng.randbytes(rng.choice((1, 100, 9000))))
        elif kind == "pages":
            builder.pages(page, count, prefix, PAGE_SIZE)
        elif kind == "plain":
            builder.pages(page, count)
        elif kind == "bare":
            builder.bare(count, prefix, PAGE_SIZE)
        else:
            exceptions += builder.pages(page, 1, prefix, 0).to_bytes(8, "little")
            superseded += rng.randbytes(PAGE_SIZE)
    builder.finish()
    return builder.size, {
        NATIVE_ENTRIES: bytes(entries),
        NATIVE_LITERALS: bytes(literals),
        NATIVE_EXCEPTIONS: bytes(exceptions),
        NATIVE_SUPERSEDED: bytes(superseded),
    }


@settings(max_examples=60)
@given(templates(), st.data())
def test_same_as_the_other_reader(template: tuple[int, dict[str, bytes]], data: st.DataObject) -> None:
    size, contents = template
    sources = [BytesSource(contents[name]) for name in (NATIVE_ENTRIES, NATIVE_LITERALS)]
    later = [BytesSource(contents[name]) for name in (NATIVE_EXCEPTIONS, NATIVE_SUPERSEDED)]
    reader = NativeReader(NativeTemplate(size, *sources, *later), BytesSource(memory_bytes()))
    rng = random.Random(data.draw(st.integers(0, 1000)))

    async def compare() -> None:
        native = NativeFile(Streams(size, contents, lambda: rng.random() < 0.3))
        for _ in range(8):
            offset, length = rng.randrange(size + 1), rng.choice((1, 13, 4096, 70_000))
            assert await native.read(offset, length) == reader.read_at(offset, length)

    trio.run(compare)


async def test_reading_on_does_not_search() -> None:
    image = FakeImage()
    native = NativeFile(image)
    expected = native_bytes()
    await native.read(0, 1)
    searches = [read for read in image.reads if read[0] == NATIVE_ENTRIES]
    at = 0
    while at < len(expected):
        assert await native.read(at, 131072) == expected[at : at + 131072]
        at += 131072
    assert [read for read in image.reads if read[0] == NATIVE_ENTRIES] == searches
    assert "exceptions>" in repr(native)


async def test_what_is_missing_is_waited_for_together() -> None:
    contents = FakeImage().contents
    image = Streams(len(native_bytes()), {k: v for k, v in contents.items() if k != MEMORY}, lambda: True)
    native = NativeFile(image)
    # The first records, among them some that are superseded: memory in several pieces, prefixes, old copies.
    assert await native.read(0, 500_000) == native_bytes()[:500_000]
    assert image.most_waiting > 3


async def test_many_readers_at_once() -> None:
    native = NativeFile(FakeImage())
    expected = native_bytes()

    async def read(offset: int) -> None:
        assert await native.read(offset, 50_000) == expected[offset : offset + 50_000]

    async with trio.open_nursery() as nursery:
        for offset in range(0, len(expected), 40_009):
            nursery.start_soon(read, offset)


GOOD = Entry(0, 0, 0, 1, 100, 0, LITERAL).pack()


@pytest.mark.parametrize(
    "entries",
    [
        b"",
        GOOD[:-1],
        Entry(0, 0, 0, 1, 50, 0, LITERAL).pack(),
        Entry(5, 0, 0, 1, 100, 0, LITERAL).pack(),
        Entry(0, 50, 0, 1, 100, 0, LITERAL).pack(),
        Entry(0, 0, 0, 1, 100, 0, LITERAL).pack()[:-4] + b"\7\0\0\0",
        Entry(0, 0, 1 << 50, 1, 0, 0, PAGES).pack(),
        Entry(0, 0, 0, 1, 1 << 29, 0, PAGES).pack(),
        Entry(0, 0, 0, 1, 50, 0, LITERAL).pack() + Entry(60, 0, 0, 1, 50, 0, LITERAL).pack(),
    ],
)
async def test_templates_that_no_writer_produces(entries: bytes) -> None:
    contents = {NATIVE_ENTRIES: entries, NATIVE_LITERALS: bytes(100), NATIVE_EXCEPTIONS: b"", NATIVE_SUPERSEDED: b""}
    native = NativeFile(Streams(100, contents, lambda: False))
    with pytest.raises(CorruptObjectError, match="native template"):
        await native.read(0, 100)
