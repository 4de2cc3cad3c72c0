"""Reading an image out of a store, blocking: the way of ``info``, ``ls``, ``verify`` and of the fetch threads.

Everything is verified against the digest that led to it before it is returned; the chain begins at the name, which is
the one thing that a reader has to believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachetools import LRUCache

from imagefs import native
from imagefs.decode import ChunkDecoder, EncodedChunk
from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import Codec, decode_chunk
from imagefs.image.index import (
    MAX_BLOCK_SIZE,
    BlockRef,
    ChunkRef,
    IndexBlock,
    find_chunk,
    parse_child,
    walk_chunks,
)
from imagefs.image.manifest import MAX_NAME_SIZE, Manifest, Name, object_digest_ok
from imagefs.image.metadata import Metadata, decode_metadata
from imagefs.image.packs import MAX_PACK_SIZE
from imagefs.image.streams import MEMORY, STATE
from imagefs.store.base import Store, object_key

MAX_PAYLOAD = (4 << 20) + (1 << 16)
"""No chunk's payload is larger: zstd adds less than 1/256 to the 4 MiB of the largest window."""


@dataclass(frozen=True)
class Image:
    """An image as far as a mount needs it before the first page."""

    name: str
    digest: bytes
    manifest: Manifest
    metadata: Metadata


def load_image(store: Store, name: str, codec: Codec) -> Image:
    """Name, manifest and metadata: three requests, one after the other. Raises what the two steps do."""
    return load_named(store, name, load_name(store, name), codec)


def load_name(store: Store, name: str) -> Name:
    """Which image the name means now: one request."""
    return Name.decode(_get_name(store, name), key=name, origin=store.origin)


def load_named(store: Store, name: str, pointer: Name, codec: Codec) -> Image:
    """Manifest and metadata: two requests, one after the other.

    Raises CorruptObjectError also where they contradict each other, so that nobody needs to look again.
    """
    data = get_object(store, pointer.manifest, pointer.size)
    key = object_key(pointer.manifest.hex())
    manifest = Manifest.decode(data, key=key, origin=store.origin)
    metadata = load_metadata(store, manifest, codec)
    document = metadata.checked
    for what, said, found in (
        ("memory_bytes", document.geometry.size, manifest.streams[MEMORY].size),
        ("state_bytes", document.state_bytes, manifest.streams[STATE].size),
        ("config", document.config, manifest.config),
    ):
        if said != found:
            reason = f"{what}: the metadata object says {said}, the streams {found}"
            raise CorruptObjectError(reason, key=key, origin=store.origin)
    return Image(name, pointer.manifest, manifest, metadata)


def _get_name(store: Store, name: str) -> bytes:
    try:
        return store.get(name, limit=MAX_NAME_SIZE)
    except CorruptObjectError as error:
        raise CorruptObjectError(f"{error.reason}: is it an imagefs image?", key=name, origin=store.origin) from error


def load_metadata(store: Store, manifest: Manifest, codec: Codec) -> Metadata:
    data = get_object(store, manifest.metadata, manifest.metadata_size)
    return decode_metadata(codec, data, key=object_key(manifest.metadata.hex()), origin=store.origin)


def get_object(store: Store, name: bytes, size: int) -> bytes:
    """A whole object of known size, verified."""
    key = object_key(name.hex())
    data = store.get(key, limit=size)
    if not object_digest_ok(data, name):
        raise CorruptObjectError("digest is not the object's name", key=key, origin=store.origin)
    if len(data) != size:
        reason = f"has {len(data)} bytes, {size} by what refers to it"
        raise CorruptObjectError(reason, key=key, origin=store.origin)
    return data


def get_block(store: Store, ref: BlockRef, chunk_pages: int) -> tuple[IndexBlock, bytes]:
    """One index block, verified, and its bytes."""
    key = object_key(ref.place.pack.hex())
    if not 0 < ref.place.length <= MAX_BLOCK_SIZE or ref.place.offset > MAX_PACK_SIZE:
        reason = f"index block: impossible place: {ref.place.length} bytes at {ref.place.offset}"
        raise CorruptObjectError(reason, key=key, origin=store.origin)
    data = store.get(key, ref.place.offset, ref.place.length)
    return parse_child(data, ref, chunk_pages, key=key, origin=store.origin), data


@dataclass(frozen=True, slots=True)
class Wanted:
    """A window to fetch; ``what`` names it in messages."""

    what: str
    chunk: ChunkRef


def get_windows(store: Store, wanted: Sequence[Wanted], decoder: ChunkDecoder) -> list[memoryview | CorruptObjectError]:
    """Windows whose payloads lie in one pack, fetched with one request from the first to the last of them.

    Answers for each with the verified bytes of the whole window, zero pages included, or with what is wrong with it: a
    damaged chunk does not spoil its neighbours. Errors of the request itself are raised.
    """
    places = [want.chunk.place for want in wanted]
    begin = min(place.offset for place in places)
    end = max(place.offset + place.length for place in places)
    key = object_key(places[0].pack.hex())
    if any(place.pack != places[0].pack or not 0 < place.length <= MAX_PAYLOAD for place in places) or (
        end > MAX_PACK_SIZE
    ):
        raise CorruptObjectError("impossible place of a chunk", key=key, origin=store.origin)
    chunks = []
    for want, place in zip(wanted, places, strict=True):
        chunk = want.chunk
        if chunk.pages >> decoder.window_pages:
            raise CorruptObjectError(f"{want.what}: page bitmap is too long", key=key, origin=store.origin)
        chunks.append(EncodedChunk(place.offset - begin, place.length, chunk.digest, chunk.pages))
    data = store.get(key, begin, end - begin)
    return [
        _what_is_wrong(data[chunk.offset :][: chunk.size], want, decoder.window_pages, key=key, origin=store.origin)
        if window is None
        else window
        for want, chunk, window in zip(wanted, chunks, decoder.decode(data, chunks), strict=True)
    ]


def _what_is_wrong(payload: bytes, want: Wanted, chunk_pages: int, *, key: str, origin: str) -> CorruptObjectError:
    """Of a chunk that could not be decoded: the words that whoever looks at it by itself would have for it."""
    try:
        expand(Codec(), payload, want, chunk_pages, key=key, origin=origin)
    except CorruptObjectError as error:
        return error
    return CorruptObjectError(f"{want.what}: one decoder takes it and another does not", key=key, origin=origin)


def expand(
    codec: Codec, payload: bytes | memoryview, want: Wanted, chunk_pages: int, *, key: str, origin: str
) -> bytes:
    """A window's bytes out of its payload, verified."""
    chunk = want.chunk
    if chunk.pages >> chunk_pages:
        raise CorruptObjectError(f"{want.what}: page bitmap is too long", key=key, origin=origin)
    content = decode_chunk(codec, payload, chunk.content_pages, chunk.digest, what=want.what, key=key, origin=origin)
    if chunk.content_pages == chunk_pages:
        return content
    return native.expand(content, chunk.pages.to_bytes(chunk_pages // 8, "little"), chunk_pages)


class ImageReader:
    """Any stream of an image by offset, blocking, with a small cache of index blocks and windows."""

    BLOCKS, WINDOWS = 64, 64

    def __init__(self, store: Store, image: Image, codec: Codec) -> None:
        self.store = store
        self.image = image
        self._codec = codec
        self._decoder = ChunkDecoder(image.manifest.chunk_pages)
        self._blocks: LRUCache[bytes, IndexBlock] = LRUCache(self.BLOCKS)
        self._windows: LRUCache[tuple[str, int], bytes] = LRUCache(self.WINDOWS)

    def block(self, ref: BlockRef) -> IndexBlock:
        """A block of the index, out of the metadata or the store."""
        found = self._blocks.get(ref.digest)
        if found is None or found.windows != ref.windows:
            data = self.image.metadata.parts.get(ref.digest)
            chunk_pages = self.image.manifest.chunk_pages
            if data is not None:
                found = parse_child(data, ref, chunk_pages, key="metadata", origin=self.store.origin)
            else:
                found, _ = get_block(self.store, ref, chunk_pages)
            self._blocks[ref.digest] = found
        return found

    def window(self, stream: str, number: int) -> bytes:
        """One window, zero-padded to its full length."""
        found = self._windows.get((stream, number))
        if found is None:
            chunk = find_chunk(self.image.manifest.streams[stream], number, self.block)
            if chunk is None:
                return bytes(self.image.manifest.window_size)
            found = self._fetch(Wanted(f"{stream} window {number}", chunk))
            self._windows[stream, number] = found
        return found

    def _fetch(self, want: Wanted) -> bytes:
        payload = self.image.metadata.parts.get(want.chunk.digest)
        chunk_pages = self.image.manifest.chunk_pages
        if payload is not None:
            return expand(self._codec, payload, want, chunk_pages, key="metadata", origin=self.store.origin)
        (result,) = get_windows(self.store, [want], self._decoder)
        if isinstance(result, CorruptObjectError):
            raise result
        return bytes(result)

    def source(self, stream: str) -> StreamSource:
        """The stream as a :class:`imagefs.image.capture.ByteSource`."""
        return StreamSource(self, stream)


@dataclass(frozen=True, slots=True)
class StreamSource:
    """A stream of a stored image as a ByteSource."""

    reader: ImageReader
    stream: str

    @property
    def size(self) -> int:
        return self.reader.image.manifest.streams[self.stream].size

    def read_at(self, offset: int, length: int) -> bytes:
        window_size = self.reader.image.manifest.window_size
        end = min(offset + length, self.size)
        pieces = []
        while offset < end:
            number, start = divmod(offset, window_size)
            pieces.append(self.reader.window(self.stream, number)[start : start + end - offset])
            offset += len(pieces[-1])
        return b"".join(pieces)

    def next_data(self, offset: int) -> int:
        """Window-accurate: where the index has no chunk there is no byte other than zero."""
        window_size = self.reader.image.manifest.window_size
        stream = self.reader.image.manifest.streams[self.stream]
        for number, _ in walk_chunks(stream, self.reader.block, offset // window_size):
            return min(max(offset, number * window_size), self.size)
        return self.size
