"""The metadata object: what goes in first, what stays out, and what is refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from imagefs.errors import CorruptObjectError, UnsupportedInputError
from imagefs.image.capture import BytesSource, PageKind
from imagefs.image.chunks import Buffer, Codec
from imagefs.image.fields import canonical_json
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.metadata import MAGIC, MAX_PAGES, Metadata, decode_metadata, encode_metadata
from imagefs.store.advance import Advance, essential_pages

PAGES = 8192
DOCUMENT: dict[str, Any] = {
    "source": {"format": "test", "version": "1"},
    "page_size": PAGE_SIZE,
    "memory_bytes": PAGES * PAGE_SIZE,
    "state_bytes": 0,
    "native_bytes": 0,
    "regions": [{"name": "ram", "guest_address": 0, "size": PAGES * PAGE_SIZE, "offset": 0}],
    "config": [],
    "restore": {},
    "page_tables": [],
}


class Counting(Codec):
    """Counts what it compresses, and makes every page of a run take 1000 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = 0

    def compress(self, content: Buffer) -> bytes:
        if len(content) % PAGE_SIZE:
            return super().compress(content)
        self.pages += len(content) // PAGE_SIZE
        return bytes(1000 * (len(content) // PAGE_SIZE))


def decode(data: bytes) -> Metadata:
    return decode_metadata(Codec(), data, key="objects/m", origin="store")


def part(number: int, size: int) -> tuple[bytes, bytes]:
    return bytes([number]) * 32, bytes([number]) * size


def run_counts(data: bytes) -> list[tuple[int, int]]:
    """First page and count of each run of an object whose payloads may be no frames."""
    (length,) = struct.unpack_from("<I", data, 8)
    at = 12 + length
    (parts,) = struct.unpack_from("<I", data, at)
    at += 4
    for _ in range(parts):
        at += 36 + int(struct.unpack_from("<I", data, at + 32)[0])
    (runs,) = struct.unpack_from("<I", data, at)
    at += 4
    found = []
    for _ in range(runs):
        page, count, length = struct.unpack_from("<QII", data, at)
        found.append((page, count))
        at += 16 + length
    assert at == len(data)
    return found


def test_pages_go_between_the_parts() -> None:
    """Pages take the room before the parts that come behind them, and leave it to those before."""
    page = bytes(range(256)) * 16
    frame = len(Codec().compress(page))
    fixed = len(encode_metadata(Codec(), DOCUMENT, [], []))
    first, more = [part(1, 100)], [part(2, 100), part(3, 10)]
    room = fixed + 136 + 16 + frame + 46
    found = decode(encode_metadata(Codec(), DOCUMENT, first, [(7, page)], more, limit=room))
    assert set(found.parts) == {b"\1" * 32, b"\3" * 32}
    assert found.pages == ((7, page),)
    found = decode(encode_metadata(Codec(), DOCUMENT, first, [(7, page)], more, limit=fixed + 136))
    assert (set(found.parts), found.pages) == ({b"\1" * 32}, ())


def test_nothing_is_compressed_once_the_room_is_used_up() -> None:
    codec, asked = Counting(), 0

    def pages() -> Iterator[tuple[int, bytes]]:
        nonlocal asked
        for first in range(0, PAGES, 256):
            asked += 1
            yield first, b"x" * (256 * PAGE_SIZE)

    fixed = len(encode_metadata(Codec(), DOCUMENT, [], []))
    data = encode_metadata(codec, DOCUMENT, [], pages(), limit=fixed + 301_000)
    counts = run_counts(data)
    assert asked == 2
    assert counts[0] == (0, 256)
    assert 295 <= sum(count for _, count in counts) <= 300
    assert [first for first, _ in counts] == [sum(c for _, c in counts[:i]) for i in range(len(counts))]
    assert codec.pages < 4 * 256


def test_all_runs_together_are_bounded() -> None:
    """A reader must not be made to allocate gigabytes by a megabyte that compresses too well."""
    pages = [(first, b"x" * (256 * PAGE_SIZE)) for first in range(0, PAGES, 256)]
    found = decode(encode_metadata(Codec(), DOCUMENT, [], pages))
    assert sum(len(data) for _, data in found.pages) == MAX_PAGES * PAGE_SIZE
    text = Codec().compress(canonical_json(DOCUMENT))
    frame = Codec().compress(bytes(256 * PAGE_SIZE))
    for count, is_bad in ((16, False), (17, True)):
        runs = [struct.pack("<QII", 0, 256, len(frame)) + frame] * count
        data = MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<II", 0, count) + b"".join(runs)
        if is_bad:
            with pytest.raises(CorruptObjectError, match="page run count"):
                decode(data)
        else:
            assert len(decode(data).pages) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"restore": {"notes": "x" * (5 << 20)}}, "takes 5.* bytes, over 4194304"),
        ({"restore": {"notes": "\ud800"}}, "cannot be written as JSON"),
        ({"restore": {"share": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_documents_that_cannot_be_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedInputError, match=message):
        encode_metadata(Codec(), {**DOCUMENT, **change}, [], [])


def test_document_that_does_not_fit() -> None:
    with pytest.raises(UnsupportedInputError, match="bytes compressed, over 150"):
        encode_metadata(Codec(), DOCUMENT, [], [], limit=170)


def test_page_tables_from_the_root_down_without_zeros() -> None:
    used = {1, 2, 5, 6, 7, 9, 300}
    memory = BytesSource(
        b"".join(bytes([page % 255 + 1]) * PAGE_SIZE if page in used else bytes(PAGE_SIZE) for page in range(600))
    )
    kinds = [
        PageKind(0, 4, "pt"),
        PageKind(5, 1, "pml4"),
        PageKind(6, 2, "pt"),
        PageKind(9, 1, "pdpt"),
        PageKind(290, 300, "pd"),
        PageKind(8, 1, "pml5"),
        PageKind(7, 1, "vcpu_info"),
    ]
    found = [(page, len(data) // PAGE_SIZE, data[0]) for page, data in essential_pages(memory, kinds)]
    assert found == [(5, 1, 6), (9, 1, 10), (300, 1, 46), (1, 2, 2), (6, 2, 7), (7, 1, 8)]


def test_blocks_in_the_order_in_which_they_are_wanted() -> None:
    advance = Advance()
    for number, (stream, level) in enumerate(
        [("native-entries", 0), ("memory", 0), ("memory", 0), ("state", 0), ("memory", 1), ("native-entries", 1)]
    ):
        advance.add_block(stream, level, bytes([number]), b"block")
    advance.add_chunk(b"chunk", b"payload")
    assert [name for name, _ in advance.first()] == [b"\4", b"\5", b"\3", b"chunk"]
    assert [name for name, _ in advance.rest()] == [b"\1", b"\2", b"\0"]
