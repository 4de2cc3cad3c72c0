"""The native decoder beside zstandard and blake3, whose word counts."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from imagefs import native
from imagefs._native import ffi, lib
from imagefs.decode import ChunkDecoder, EncodedChunk
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE

CODEC = Codec()


def native_digest(data: bytes) -> bytes:
    out = ffi.new("uint8_t[]", 32)
    lib.imagefs_blake3(ffi.from_buffer("uint8_t[]", data), len(data), out)
    return bytes(ffi.buffer(out))


@given(st.integers(0, 40_000), st.integers(0, 255))
def test_one_digest(size: int, seed: int) -> None:
    data = random.Random(seed).randbytes(size)
    assert native_digest(data) == blake3(data).digest()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 3072, 4096, 32768])
def test_one_digest_at_the_edges(size: int) -> None:
    data = bytes(range(256)) * 128
    assert native_digest(data[:size]) == blake3(data[:size]).digest()


def page_digests(data: bytes) -> bytes:
    return b"".join(blake3(data[at : at + PAGE_SIZE]).digest() for at in range(0, len(data), PAGE_SIZE))


@pytest.mark.parametrize("count", [*range(10), 16, 1024])
def test_digests_of_pages(count: int, rng: random.Random) -> None:
    data = rng.randbytes(count * PAGE_SIZE)
    assert native.page_digests(data) == page_digests(data)


def test_digests_of_whole_pages_only() -> None:
    with pytest.raises(ValueError, match="buffer of 4095 bytes: not a multiple of the page size"):
        native.page_digests(bytes(PAGE_SIZE - 1))


def encode(
    window_pages: int, used: list[set[int]], rng: random.Random
) -> tuple[bytes, list[EncodedChunk], list[bytes]]:
    """Payloads with something between them, their places, and the windows that they are to become."""
    data, chunks, windows = b"", [], []
    for pages in used:
        content = b"".join(bytes([rng.randrange(256)]) * 3000 + rng.randbytes(PAGE_SIZE - 3000) for _ in pages)
        window = bytearray(window_pages * PAGE_SIZE)
        for at, page in enumerate(sorted(pages)):
            window[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
        payload = CODEC.compress(content)
        bits = sum(1 << page for page in pages)
        chunks.append(EncodedChunk(len(data), len(payload), blake3(page_digests(content)).digest(), bits))
        # What follows a frame does not matter.
        data += payload + rng.randbytes(rng.randrange(20))
        windows.append(bytes(window))
    return data, chunks, windows


def decoded(window_pages: int, data: bytes | bytearray, chunks: list[EncodedChunk]) -> list[bytes | None]:
    return [None if view is None else bytes(view) for view in ChunkDecoder(window_pages).decode(data, chunks)]


@given(
    st.sampled_from([8, 16, 64]).flatmap(
        lambda pages: st.tuples(
            st.just(pages), st.lists(st.sets(st.integers(0, pages - 1), min_size=1), min_size=1, max_size=5)
        )
    ),
    st.integers(0, 1000),
)
def test_windows(case: tuple[int, list[set[int]]], seed: int) -> None:
    window_pages, used = case
    data, chunks, windows = encode(window_pages, used, random.Random(seed))
    assert decoded(window_pages, data, chunks) == windows


@given(st.data())
def test_whatever_is_damaged_is_wrong_and_its_neighbours_are_not(draw: st.DataObject) -> None:
    data, chunks, windows = encode(8, [{0, 1, 2}, {3, 7}, set(range(8))], random.Random(1))
    number = draw.draw(st.integers(0, 2))
    chunk = chunks[number]
    damaged = bytearray(data)
    at = chunk.offset + draw.draw(st.integers(0, chunk.size - 1))
    damaged[at] ^= draw.draw(st.integers(1, 255))
    for other, (found, right) in enumerate(zip(decoded(8, damaged, chunks), windows, strict=True)):
        # A bit that decides nothing may change: then the window is the right one all the same.
        assert found == right or (found is None and other == number)


def test_another_digest_size_or_place_is_wrong() -> None:
    data, (chunk,), (window,) = encode(8, [{0, 5}], random.Random(2))
    assert decoded(8, data, [chunk]) == [window]
    for other in (
        EncodedChunk(chunk.offset, chunk.size, bytes(32), chunk.pages),
        EncodedChunk(chunk.offset, chunk.size, chunk.digest, 0b111),
        EncodedChunk(chunk.offset, chunk.size - 1, chunk.digest, chunk.pages),
        EncodedChunk(chunk.offset + 1, chunk.size - 1, chunk.digest, chunk.pages),
        EncodedChunk(chunk.offset, 0, chunk.digest, chunk.pages),
    ):
        assert decoded(8, data, [other]) == [None]


def test_what_no_caller_can_mean() -> None:
    decoder = ChunkDecoder(8)
    for chunk in (
        EncodedChunk(0, 11, bytes(32), 1),
        EncodedChunk(-1, 5, bytes(32), 1),
        EncodedChunk(6, 5, bytes(32), 1),
    ):
        with pytest.raises(ValueError, match="bytes at"):
            decoder.decode(bytes(10), [chunk])
    for pages in (0, 1 << 8, -1):
        with pytest.raises(ValueError, match="page bitmap"):
            decoder.decode(bytes(10), [EncodedChunk(0, 10, bytes(32), pages)])
