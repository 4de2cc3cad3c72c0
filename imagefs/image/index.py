"""The index: a tree of blocks that says, for every window of a stream, where its chunk is and what verifies it.

Leaves (level 0) describe windows, a block of level n describes blocks of level n-1; each block covers FANOUT
children. A child without any byte other than zero has no entry at all. A block is named by the BLAKE3 digest of its
bytes, and is reached only through its parent's entry, the root through the manifest: so each block is verified.

| offset | bytes | field       | meaning                                                      |
|-------:|------:|-------------|--------------------------------------------------------------|
|      0 |     4 | magic       | ``IFSB``                                                     |
|      4 |     1 | version     | 1                                                            |
|      5 |     1 | level       | 0 for a leaf                                                 |
|      6 |     2 | chunk_pages | pages of a window, a multiple of 8; 0 above the leaves       |
|      8 |     2 | slots       | children covered, 1 … FANOUT                                 |
|     10 |     2 | packs       | entries of the pack table                                    |
|     12 |     2 | entries     | children that are not all zero                               |
|     14 |     2 | reserved    | 0                                                            |
|     16 |    64 | present     | bitmap of the slots that have an entry, LSB first            |
|     80 |  32 p | pack table  | digests of the packs that the entries refer to               |
|        |   … n | entries     | in slot order, see below                                     |

An entry: digest 32, offset u32, length u32, pack u16 (number in the pack table); ``offset`` and ``length`` are the
payload's place in the pack. In leaves the bitmap of the window's non-zero pages follows, chunk_pages / 8 bytes, LSB
first. All integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from imagefs.errors import CorruptObjectError
from imagefs.image.chunks import MAX_CHUNK_PAGES, digest
from imagefs.image.geometry import PAGE_SIZE

MAGIC = b"IFSB"
VERSION = 1
FANOUT = 512
"""A leaf covers 32 MiB of memory in 64 KiB windows and has at most 25 KiB; 1 TiB needs three levels."""
HEADER = struct.Struct("<4sBBHHHHH64s")
ENTRY = struct.Struct("<32sIIH")
MAX_BLOCK_SIZE = HEADER.size + FANOUT * (32 + ENTRY.size + MAX_CHUNK_PAGES // 8)


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Where a payload is stored: ``length`` bytes at ``offset`` of the pack named ``pack`` (32 bytes)."""

    pack: bytes
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BlockRef:
    """An index block of some level: its digest, its place, and how many windows of the stream lie below it.

    ``windows`` is not stored: it follows from the stream's size and the path to the block, and says what ``slots`` of
    the block must be.
    """

    digest: bytes
    place: PayloadRef
    level: int
    windows: int


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A window that is not all zero: ``pages`` has bit i set where page i of the window is in the content."""

    digest: bytes
    place: PayloadRef
    pages: int

    @property
    def content_pages(self) -> int:
        return self.pages.bit_count()


@dataclass(frozen=True, slots=True)
class StreamRef:
    """A stream: its size in bytes and the root of its index; no root where it is empty or all zeros."""

    size: int
    root: BlockRef | None

    def windows(self, chunk_pages: int) -> int:
        """How many windows of ``chunk_pages`` pages the stream has, the last one perhaps in part."""
        return -(-self.size // (chunk_pages * PAGE_SIZE))


class NeedBlock(Exception):  # noqa: N818 - a request, not an error: it never leaves the lookup's caller
    """A lookup cannot go on without this block; fetch it and look up again."""

    def __init__(self, ref: BlockRef) -> None:
        super().__init__(ref)
        self.ref = ref


class IndexBlock:
    """One block, parsed as far as needed: entries are unpacked when asked for."""

    def __init__(self, data: bytes, *, key: str = "", origin: str = "") -> None:
        """Raises CorruptObjectError, naming the field, for bytes that are no well-formed block."""
        self.data = data
        self.windows = 0
        """How many windows lie below; set by :func:`parse_child`, which knows what led here."""
        self._where = (key, origin)
        if not HEADER.size <= len(data) <= MAX_BLOCK_SIZE:
            raise self._bad("length", len(data))
        fields = HEADER.unpack_from(data)
        magic, version, self.level, self.chunk_pages, self.slots, packs, entries, reserved, present = fields
        if magic != MAGIC or version != VERSION or reserved:
            raise self._bad("magic, version or reserved", (magic, version, reserved))
        if not 1 <= self.slots <= FANOUT:
            raise self._bad("slots", self.slots)
        if (self.level == 0) != (0 < self.chunk_pages <= MAX_CHUNK_PAGES) or self.chunk_pages % 8:
            raise self._bad("chunk_pages", self.chunk_pages)
        self._present = int.from_bytes(present, "little")
        if self._present.bit_count() != entries or self._present >> self.slots:
            raise self._bad("present", entries)
        self._packs = packs
        self._entries_at = HEADER.size + 32 * packs
        self._entry_size = ENTRY.size + self.chunk_pages // 8
        if len(data) != self._entries_at + entries * self._entry_size:
            raise self._bad("entries", entries)

    def _bad(self, field: str, value: object) -> CorruptObjectError:
        return CorruptObjectError(f"index block: bad {field}: {value!r}", key=self._where[0], origin=self._where[1])

    def __repr__(self) -> str:
        return f"<IndexBlock level {self.level}, {self._present.bit_count()} of {self.slots} slots>"

    def occupied(self) -> Iterator[int]:
        """The slots that have an entry, ascending."""
        rest = self._present
        while rest:
            lowest = rest & -rest
            yield lowest.bit_length() - 1
            rest ^= lowest

    def gaps(self) -> Iterator[tuple[int, int]]:
        """``(first slot, count)`` of each run of slots without an entry: what they cover is all zero."""
        begin = 0
        for slot in (*self.occupied(), self.slots):
            if slot > begin:
                yield begin, slot - begin
            begin = slot + 1

    def pages(self) -> Iterator[tuple[int, int]]:
        """``(slot, page bitmap)`` of each entry of a leaf, ascending: what :meth:`chunk` says, without the rest."""
        size = self.chunk_pages // 8
        at = self._entries_at + ENTRY.size
        for slot in self.occupied():
            pages = int.from_bytes(self.data[at : at + size], "little")
            if not pages:
                raise self._bad(f"page bitmap of slot {slot}", 0)
            yield slot, pages
            at += self._entry_size

    def _unpack(self, slot: int) -> tuple[bytes, PayloadRef, int] | None:
        if not self._present >> slot & 1:
            return None
        rank = (self._present & ((1 << slot) - 1)).bit_count()
        at = self._entries_at + rank * self._entry_size
        name, offset, length, pack = ENTRY.unpack_from(self.data, at)
        if pack >= self._packs:
            raise self._bad(f"pack of slot {slot}", pack)
        pack_at = HEADER.size + 32 * pack
        end = at + ENTRY.size
        return name, PayloadRef(self.data[pack_at : pack_at + 32], offset, length), end

    def child(self, slot: int) -> BlockRef | None:
        """The block below slot ``slot``, None where all of it is zero."""
        found = self._unpack(slot)
        if found is None:
            return None
        below = span(self.level - 1)
        return BlockRef(found[0], found[1], self.level - 1, min(below, self.windows - slot * below))

    def chunk(self, slot: int) -> ChunkRef | None:
        """The chunk of slot ``slot`` of a leaf, None where the window is all zero."""
        found = self._unpack(slot)
        if found is None:
            return None
        name, place, end = found
        pages = int.from_bytes(self.data[end : end + self.chunk_pages // 8], "little")
        if not pages:
            raise self._bad(f"page bitmap of slot {slot}", 0)
        return ChunkRef(name, place, pages)


def span(level: int) -> int:
    """How many windows a block of this level covers; 1 for level -1, the windows themselves."""
    return int(FANOUT ** (level + 1))


def root_level(windows: int) -> int:
    """The level of the root of a stream of so many windows."""
    level = 0
    while span(level) < windows:
        level += 1
    return level


def parse_child(data: bytes, ref: BlockRef, chunk_pages: int, *, key: str, origin: str) -> IndexBlock:
    """A block's bytes, verified against the reference that led to it. Raises CorruptObjectError."""
    if digest(data) != ref.digest:
        raise CorruptObjectError(f"index block: digest is not {ref.digest.hex()}", key=key, origin=origin)
    block = IndexBlock(data, key=key, origin=origin)
    if block.level != ref.level or (block.level == 0 and block.chunk_pages != chunk_pages):
        raise CorruptObjectError(f"index block: level {block.level} instead of {ref.level}", key=key, origin=origin)
    # Too few slots would turn the rest into zeros; too many lead behind the end of the stream.
    slots = -(-ref.windows // span(ref.level - 1))
    if block.slots != slots:
        raise CorruptObjectError(f"index block: {block.slots} slots instead of {slots}", key=key, origin=origin)
    block.windows = ref.windows
    return block


BlockSource = Callable[[BlockRef], IndexBlock]
"""Answers with the verified block, or raises (:class:`NeedBlock` where it would have to wait)."""


def _follow(ref: BlockRef, blocks: BlockSource) -> IndexBlock:
    """The block, which a source may know by its digest from another place, where fewer windows are."""
    block = blocks(ref)
    if (block.level, block.windows) != (ref.level, ref.windows):
        key = ref.digest.hex()
        raise CorruptObjectError("index block: referred to where it does not fit", key=key, origin="index")
    return block


def find_leaf(stream: StreamRef, window: int, blocks: BlockSource) -> IndexBlock | None:
    """The leaf that covers ``window``, None where everything it covers is zero."""
    ref = stream.root
    while ref is not None:
        block = _follow(ref, blocks)
        if block.level == 0:
            return block
        ref = block.child(window // span(block.level - 1) % FANOUT)
    return None


def find_chunk(stream: StreamRef, window: int, blocks: BlockSource) -> ChunkRef | None:
    """The chunk of ``window``, None where the window is all zero."""
    leaf = find_leaf(stream, window, blocks)
    return None if leaf is None else leaf.chunk(window % FANOUT)


def walk_chunks(stream: StreamRef, blocks: BlockSource, first: int = 0) -> Iterator[tuple[int, ChunkRef]]:
    """Every ``(window, chunk)`` of a stream that is not all zero, ascending from window ``first`` on."""

    def below(ref: BlockRef, start: int) -> Iterator[tuple[int, ChunkRef]]:
        block = _follow(ref, blocks)
        step = span(block.level - 1)
        for slot in block.occupied():
            at = start + slot * step
            if at + step <= first:
                continue
            if block.level == 0:
                chunk = block.chunk(slot)
                assert chunk is not None
                yield at, chunk
            else:
                child = block.child(slot)
                assert child is not None
                yield from below(child, at)

    if stream.root is not None:
        yield from below(stream.root, 0)


def encode_block(
    level: int, chunk_pages: int, slots: int, children: Iterable[tuple[int, ChunkRef | BlockRef]]
) -> bytes:
    """A block's bytes from its non-zero children, ``(slot, reference)`` ascending."""
    packs: dict[bytes, int] = {}
    present = 0
    count = 0
    entries = bytearray()
    for slot, child in children:
        present |= 1 << slot
        count += 1
        pack = packs.setdefault(child.place.pack, len(packs))
        entries += ENTRY.pack(child.digest, child.place.offset, child.place.length, pack)
        if isinstance(child, ChunkRef):
            entries += child.pages.to_bytes(chunk_pages // 8, "little")
    pages = 0 if level else chunk_pages
    header = HEADER.pack(MAGIC, VERSION, level, pages, slots, len(packs), count, 0, present.to_bytes(64, "little"))
    return header + b"".join(packs) + bytes(entries)


def group_children(
    children: Iterable[tuple[int, ChunkRef | BlockRef]], total: int
) -> Iterator[tuple[int, int, list[tuple[int, ChunkRef | BlockRef]]]]:
    """Children of one level, ascending by number, cut into blocks: ``(block number, slots, [(slot, child)])``.

    ``total`` is how many children the level has, zero ones included; blocks without a child are left out.
    """
    number = -1
    group: list[tuple[int, ChunkRef | BlockRef]] = []
    for child, ref in children:
        if child // FANOUT != number:
            if group:
                yield number, min(FANOUT, total - number * FANOUT), group
            number, group = child // FANOUT, []
        group.append((child % FANOUT, ref))
    if group:
        yield number, min(FANOUT, total - number * FANOUT), group
