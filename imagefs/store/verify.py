"""Reading everything that an image consists of, and naming what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cachetools import LRUCache

from imagefs.errors import CorruptObjectError, StoreError, UnavailableError
from imagefs.image.chunks import Codec, digest
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import BlockRef, IndexBlock, PayloadRef, parse_child, span
from imagefs.image.native import ENTRY_SIZE, EXCEPTION_SIZE, Entry
from imagefs.image.native_reader import unpack_exceptions
from imagefs.image.packs import MAX_PACK_SIZE
from imagefs.image.streams import MEMORY, NATIVE_ENTRIES, NATIVE_EXCEPTIONS, NATIVE_LITERALS
from imagefs.store.base import Store, object_key
from imagefs.store.reader import MAX_PAYLOAD, Image, ImageReader, Wanted, expand

PACKS_KEPT = 2
"""Packs in memory, 32 MiB each: chunks mostly lie in the order in which they are read."""
ENTRIES_AT_ONCE = 4096

Progress = Callable[[int, int], None]
"""Told bytes of streams done and in all."""


@dataclass
class Verifier:
    """Verifies one image; see :meth:`damage`. The counters are for people."""

    store: Store
    image: Image
    codec: Codec
    progress: Progress | None = None
    chunks: int = 0
    blocks: int = 0
    packs: int = 0

    def __post_init__(self) -> None:
        self._kept: LRUCache[bytes, bytes] = LRUCache(PACKS_KEPT)
        self._seen: set[bytes] = set()
        self._pack_damage: list[str] = []
        self._done = 0

    def damage(self) -> Iterator[str]:
        """A line for each thing that is wrong, as it is found: what, which windows, and where it is stored.

        Reads every index block, every chunk and every pack as a whole; name, manifest and metadata were verified when
        the image was loaded. Raises UnavailableError where the store does not answer: that is no damage.
        """
        streams = self.image.manifest.streams
        for name, stream in streams.items():
            if stream.root is not None:
                yield from self._below(name, stream.root, 0)
            self._done += stream.size
        yield from self._pack_damage
        yield from self._essential_pages()
        yield from self._native_template()

    def _below(self, name: str, ref: BlockRef, first: int) -> Iterator[str]:
        try:
            block = self._block(ref)
        except UnavailableError:
            raise
        except StoreError as error:
            yield f"{name}: index of windows {first} to {first + ref.windows - 1}: {error}"
            return
        for slot in block.occupied():
            if ref.level:
                yield from self._child(name, block, slot, first + slot * span(ref.level - 1))
            else:
                yield from self._chunk(name, first + slot, block, slot)
        if self.progress is not None:
            done = self._done + first * self.image.manifest.window_size
            self.progress(done, sum(stream.size for stream in self.image.manifest.streams.values()))

    def _child(self, name: str, block: IndexBlock, slot: int, first: int) -> Iterator[str]:
        try:
            child = block.child(slot)
        except CorruptObjectError as error:
            yield f"{name}: index of windows from {first} on: {error}"
            return
        assert child is not None
        yield from self._below(name, child, first)

    def _chunk(self, name: str, window: int, block: IndexBlock, slot: int) -> Iterator[str]:
        what = f"{name} window {window}"
        try:
            chunk = block.chunk(slot)
            assert chunk is not None
            payload, key = self._payload(chunk.place)
            if len(payload) > MAX_PAYLOAD:
                raise CorruptObjectError(f"{what}: payload of {len(payload)} bytes", key=key, origin=self._origin)
            wanted, chunk_pages = Wanted(what, chunk), self.image.manifest.chunk_pages
            expand(self.codec, payload, wanted, chunk_pages, key=key, origin=self._origin)
            self.chunks += 1
            part = self.image.metadata.parts.get(chunk.digest)
            if part is not None:
                expand(self.codec, part, wanted, chunk_pages, key=self._metadata, origin=self._origin)
        except UnavailableError:
            raise
        except StoreError as error:
            yield f"{self._frames(name, window)}: {error}"

    def _block(self, ref: BlockRef) -> IndexBlock:
        data, key = self._payload(ref.place)
        self.blocks += 1
        part = self.image.metadata.parts.get(ref.digest)
        if part is not None:
            parse_child(part, ref, self.image.manifest.chunk_pages, key=self._metadata, origin=self._origin)
        return parse_child(data, ref, self.image.manifest.chunk_pages, key=key, origin=self._origin)

    def _payload(self, place: PayloadRef) -> tuple[bytes, str]:
        """A payload out of its pack, which is read as a whole, and its key."""
        key = object_key(place.pack.hex())
        pack = self._kept.get(place.pack)
        if pack is None:
            pack = self._kept[place.pack] = self.store.get(key, limit=MAX_PACK_SIZE)
            if place.pack not in self._seen:
                self._seen.add(place.pack)
                self.packs += 1
                if digest(pack) != place.pack:
                    self._pack_damage.append(f"pack: {self._origin}: {key}: digest is not the object's name")
        data = pack[place.offset : place.offset + place.length]
        if len(data) != place.length:
            raise CorruptObjectError(
                f"ends at byte {len(pack)}, wanted {place.length} from {place.offset} on", key=key, origin=self._origin
            )
        return data, key

    def _essential_pages(self) -> Iterator[str]:
        """Pages that travel with the metadata must be those of the memory."""
        memory = ImageReader(self.store, self.image, self.codec).source(MEMORY)
        for page, data in self.image.metadata.pages:
            try:
                same = memory.read_at(page * PAGE_SIZE, len(data)) == data
            except UnavailableError:
                raise
            except StoreError:
                continue  # named above
            if not same:
                yield f"metadata: pages from {page} on are not those of the memory"

    def _native_template(self) -> Iterator[str]:
        """The template must cover the native file without gap or overlap, with bytes that there are."""
        try:
            self._check_template()
        except UnavailableError:
            raise
        except StoreError:
            return  # named above
        except ValueError as error:
            yield str(error)

    def _check_template(self) -> None:
        reader = ImageReader(self.store, self.image, self.codec)
        entries, exceptions = reader.source(NATIVE_ENTRIES), reader.source(NATIVE_EXCEPTIONS)
        literals, memory = reader.source(NATIVE_LITERALS).size, reader.source(MEMORY).size
        size = self.image.metadata.checked.native_bytes
        end = 0
        for at in range(0, entries.size, ENTRY_SIZE * ENTRIES_AT_ONCE):
            data = entries.read_at(at, ENTRY_SIZE * ENTRIES_AT_ONCE)
            for offset in range(0, len(data), ENTRY_SIZE):
                entry = Entry.unpack(data, offset)
                if entry.native_offset != end:
                    raise ValueError(f"native template: nothing says what is at native offset {end:#x}")
                entry.check_sources(literals, memory)
                end = entry.end
        if end != size:
            raise ValueError(f"native template: ends at {end:#x}, not at the native file's size")
        last = -PAGE_SIZE
        for at in range(0, exceptions.size, EXCEPTION_SIZE * ENTRIES_AT_ONCE):
            for place in unpack_exceptions(exceptions.read_at(at, EXCEPTION_SIZE * ENTRIES_AT_ONCE)):
                if not last + PAGE_SIZE <= place <= size - PAGE_SIZE:
                    raise ValueError(f"native template: no superseded page can be at native offset {place:#x}")
                last = place

    def _frames(self, name: str, window: int) -> str:
        """Which window, and of memory also which page frames."""
        if name != MEMORY:
            return f"{name} window {window}"
        geometry = self.image.metadata.geometry
        first = window * self.image.manifest.chunk_pages
        last = min(first + self.image.manifest.chunk_pages, geometry.pages) - 1
        return f"memory window {window} (frames {geometry.pfn_of_page(first):#x} to {geometry.pfn_of_page(last):#x})"

    @property
    def _metadata(self) -> str:
        """Key of the object whose parts a reader prefers to packs, so that they must be right, too."""
        return object_key(self.image.manifest.metadata.hex())

    @property
    def _origin(self) -> str:
        return self.store.origin
