"""Working sets in a store: written beside an image, and read again by those who look at them without mounting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from imagefs import native
from imagefs.errors import CorruptObjectError, MissingObjectError
from imagefs.image.chunks import DIGEST_SIZE, Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import FANOUT, BlockRef, ChunkRef, span
from imagefs.image.setobject import (
    HEADER,
    MAX_BLOCKS,
    MAX_SIZE,
    Header,
    SetBlock,
    SetBuilder,
    SetParser,
    SetWindow,
    parse_header,
)
from imagefs.image.setverify import SetVerifier, bit_runs
from imagefs.image.streams import MEMORY
from imagefs.image.workingset import WorkingSet
from imagefs.store.base import Store, working_set_key
from imagefs.store.reader import Image, ImageReader


@dataclass(frozen=True, slots=True)
class Published:
    """What was written: pages, index blocks, bytes."""

    pages: int
    blocks: int
    size: int


def find_header(store: Store, image: Image) -> Header | None:
    """What the image's set says of itself, None where it has none: one request. Raises StoreError."""
    key = working_set_key(image.digest)
    with suppress(MissingObjectError):
        return parse_header(store.get(key, 0, HEADER.size), key=key, origin=store.origin)
    return None


def read_set(store: Store, image: Image, codec: Codec) -> WorkingSet:
    """The pages that the image's set carries, in its order, every byte of it verified.

    Raises MissingObjectError where there is none, CorruptObjectError for anything wrong with it.
    """
    key, chunk_pages = working_set_key(image.digest), image.manifest.chunk_pages
    where = {"key": key, "origin": store.origin}
    parser = SetParser(image.digest, chunk_pages, **where)
    verifier = SetVerifier(image.manifest.streams[MEMORY], chunk_pages, image.metadata.parts, codec, **where)
    found: dict[int, int] = {}
    for piece in store.stream(key, 0, MAX_SIZE):
        for record in parser.feed(piece):
            if isinstance(record, SetBlock):
                verifier.block(record)
                continue
            verifier.pages(record)
            for window in record.windows:
                for first, count in bit_runs(window.carried):
                    start = window.window * chunk_pages + first
                    found.update(dict.fromkeys(range(start, start + count), window.recordings))
    parser.finish()
    return WorkingSet(tuple(found), tuple(found.values()))


def set_damage(store: Store, image: Image, codec: Codec) -> Iterator[str]:
    """A line for what is wrong with the image's set, if it has one and something is."""
    try:
        read_set(store, image, codec)
    except MissingObjectError:
        return
    except CorruptObjectError as error:
        yield str(error)


def publish(reader: ImageReader, wanted: WorkingSet, codec: Codec) -> Published:
    """Write the set of the reader's image into its store, in place of what was there.

    Windows come in the order of their first page, each once, with all pages of it that are wanted. Left out are pages
    that a mount has anyway: zeros, and the page tables in the metadata object; and what lies below more than MAX_BLOCKS
    index blocks.
    """
    image = reader.image
    chunk_pages = image.manifest.chunk_pages
    builder = SetBuilder(image.digest, chunk_pages, codec)
    blocks = _Blocks(reader, builder)
    travelling = {page + i for page, data in image.metadata.pages for i in range(len(data) // PAGE_SIZE)}
    windows: dict[int, tuple[int, int]] = {}
    for page, recordings in wanted.items():
        if page not in travelling and page < image.metadata.geometry.pages:
            window, bit = divmod(page, chunk_pages)
            pages, most = windows.get(window, (0, 0))
            windows[window] = pages | 1 << bit, max(most, recordings)
    for number, (pages, recordings) in windows.items():
        chunk = blocks.chunk(number)
        if chunk is not None and pages & chunk.pages:
            builder.add_window(*_window(reader, number, pages & chunk.pages, recordings, chunk))
    data = builder.finish()
    reader.store.put(working_set_key(image.digest), data)
    return Published(builder.pages, builder.blocks, len(data))


class _Blocks:
    """Looks up windows, and puts the index blocks on the way into the object, each once."""

    def __init__(self, reader: ImageReader, builder: SetBuilder) -> None:
        self._reader = reader
        self._builder = builder
        self._known = set(reader.image.metadata.parts)

    def chunk(self, window: int) -> ChunkRef | None:
        """None where the window is all zero, or where there is no room for the blocks that lead to it."""
        ref = self._reader.image.manifest.streams[MEMORY].root
        while ref is not None:
            if not self._carry(ref, window):
                return None
            block = self._reader.block(ref)
            if not ref.level:
                return block.chunk(window % FANOUT)
            ref = block.child(window // span(ref.level - 1) % FANOUT)
        return None

    def _carry(self, ref: BlockRef, window: int) -> bool:
        if ref.digest not in self._known:
            if self._builder.blocks == MAX_BLOCKS:
                return False
            first = window // span(ref.level) * span(ref.level)
            self._builder.add_block(ref.level, first, self._reader.block(ref).data)
            self._known.add(ref.digest)
        return True


def _window(reader: ImageReader, number: int, wanted: int, recordings: int, chunk: ChunkRef) -> tuple[SetWindow, bytes]:
    """The entry of a window and the pages that it carries: those wanted, or all where that takes no more bytes."""
    data = memoryview(reader.window(MEMORY, number))
    content = [p for p in range(chunk.pages.bit_length()) if chunk.pages >> p & 1]
    few, all_ = wanted.bit_count(), len(content)
    if chunk.place.length <= chunk.place.length * few // all_ + DIGEST_SIZE * (all_ - few):
        wanted = chunk.pages
    carried, siblings = bytearray(), bytearray()
    for page in content:
        bytes_of = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        if wanted >> page & 1:
            carried += bytes_of
        else:
            siblings += native.page_digests(bytes_of)
    return SetWindow(number, recordings, wanted, bytes(siblings)), bytes(carried)
