"""Reading the native file: bisection, pieces, superseded pages, templates that lie."""

from __future__ import annotations

import bisect as stdlib
from itertools import pairwise

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import BARE, LITERAL, PAGES, Entry, NativeTemplate
from imagefs.image.native_reader import (
    LiteralPiece,
    MemoryPiece,
    NativeReader,
    PrefixPiece,
    SupersededPiece,
    abisect,
    bisect,
    memory_span,
    pieces,
    split_superseded,
    unpack_exceptions,
)

EMPTY = BytesSource(b"")


@given(st.lists(st.integers(0, 50)).map(sorted), st.integers(-1, 51))
def test_bisect(keys: list[int], value: int) -> None:
    asked = []

    def key_at(index: int) -> int:
        asked.append(index)
        return keys[index]

    assert bisect(len(keys), key_at, value) == stdlib.bisect_right(keys, value)
    assert len(asked) <= len(keys).bit_length()

    async def key_later(index: int) -> int:
        await trio.lowlevel.checkpoint()
        return keys[index]

    assert trio.run(abisect, len(keys), key_later, value) == stdlib.bisect_right(keys, value)


def test_pieces_of_a_literal() -> None:
    entry = Entry(100, 7, 0, 1, 50, 0, LITERAL)
    assert list(pieces(entry, 110, 120)) == [LiteralPiece(17, 10)]
    assert list(pieces(entry, 0, 1000)) == [LiteralPiece(7, 50)]
    assert list(pieces(entry, 150, 1000)) == []
    assert list(pieces(entry, 0, 100)) == []


def test_pieces_of_pages() -> None:
    """Records of 8 + 4096 bytes from native offset 100 on, for pages 5, 6, 7."""
    entry = Entry(100, 0, 5, 3, 8, PAGE_SIZE, PAGES)
    second = 100 + 8 + PAGE_SIZE
    assert list(pieces(entry, 104, second + 9)) == [
        PrefixPiece(entry, 0, 4, 4),
        MemoryPiece(5 * PAGE_SIZE, PAGE_SIZE, 108),
        PrefixPiece(entry, 1, 0, 8),
        MemoryPiece(6 * PAGE_SIZE, 1, second + 8),
    ]
    assert list(pieces(entry, second + 10, second + 12)) == [MemoryPiece(6 * PAGE_SIZE + 2, 2, second + 10)]
    assert PrefixPiece(entry, 2, 6, 2).cut(bytes(6) + b"\x10\x28") == b"\x30\x28"


def test_pieces_of_bare_records_and_of_flat_memory() -> None:
    bare = Entry(0, 0, 0, 4, 9, 4096, BARE)
    assert list(pieces(bare, 8, 20)) == [
        PrefixPiece(bare, 0, 8, 1),
        PrefixPiece(bare, 1, 0, 9),
        PrefixPiece(bare, 2, 0, 2),
    ]
    flat = Entry(0, 0, 2, 1000, 0, 0, PAGES)
    assert list(pieces(flat, 100, 3 * PAGE_SIZE)) == [MemoryPiece(2 * PAGE_SIZE + 100, 3 * PAGE_SIZE - 100, 100)]


@given(st.integers(0, 20), st.integers(0, 5 * PAGE_SIZE), st.integers(0, 5 * PAGE_SIZE))
def test_memory_span(prefix: int, start: int, stop: int) -> None:
    """From the first to the last piece of memory, which follow each other there without gaps."""
    entry = Entry(100, 0, 5, 4, prefix, 0, PAGES)
    found = [piece for piece in pieces(entry, start, stop) if isinstance(piece, MemoryPiece)]
    for one, other in pairwise(found):
        assert one.offset + one.length == other.offset
    expected = (found[0].offset, sum(piece.length for piece in found)) if found else (0, 0)
    assert memory_span(entry, start, stop) == expected
    assert memory_span(Entry(100, 0, 0, 4, 9, 0, BARE), start, stop) == (0, 0)


def test_split_superseded() -> None:
    """A piece of four flat pages from the middle of the first on; the first and the third have later copies."""
    piece = MemoryPiece(10 * PAGE_SIZE + 96, 3 * PAGE_SIZE, 1096)
    assert piece.first_page_at == 1000
    assert list(split_superseded(piece, [1000, 1000 + 2 * PAGE_SIZE], 7)) == [
        SupersededPiece(7, 96, PAGE_SIZE - 96),
        MemoryPiece(11 * PAGE_SIZE, PAGE_SIZE, 1000 + PAGE_SIZE),
        SupersededPiece(8, 0, PAGE_SIZE),
        MemoryPiece(13 * PAGE_SIZE, 96, 1000 + 3 * PAGE_SIZE),
    ]
    assert SupersededPiece(8, 5, 1).offset == 8 * PAGE_SIZE + 5
    assert list(split_superseded(piece, [], 7)) == [piece]


def test_unpack_exceptions() -> None:
    assert unpack_exceptions((1).to_bytes(8, "little") + (2**60).to_bytes(8, "little")) == [1, 2**60]


def reader(
    entries: list[Entry], size: int, literals: bytes = b"", memory: bytes = b"", extra: bytes = b""
) -> NativeReader:
    table = b"".join(entry.pack() for entry in entries) + extra
    template = NativeTemplate(size, BytesSource(table), BytesSource(literals), EMPTY, EMPTY)
    return NativeReader(template, BytesSource(memory))


def test_templates_that_lie() -> None:
    literal = Entry(0, 0, 0, 1, 4, 0, LITERAL)
    assert reader([literal], 4, b"abcd").read_at(1, 10) == b"bcd"
    with pytest.raises(ValueError, match="its entries end at 4, the file at 9"):
        reader([literal], 9, b"abcd").read_at(0, 9)
    with pytest.raises(ValueError, match="nothing says what is at native offset 4"):
        reader([literal, Entry(5, 0, 0, 1, 4, 0, LITERAL)], 9, b"abcd").read_at(0, 9)
    with pytest.raises(ValueError, match="a source ends before"):
        reader([literal], 4, b"abc").read_at(0, 4)
    with pytest.raises(ValueError, match="a source ends before"):
        reader([Entry(0, 0, 1, 1, 0, 0, PAGES)], PAGE_SIZE, memory=bytes(PAGE_SIZE)).read_at(0, 1)
    with pytest.raises(ValueError, match="not made of whole entries"):
        reader([literal], 4, b"abcd", extra=b"x")
    with pytest.raises(ValueError, match="entries end at 0"):
        reader([], 4).read_at(0, 1)
