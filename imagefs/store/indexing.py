"""Building the index trees of an image, level by level, once the packs below have their names."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path

from imagefs.errors import NoSpaceError
from imagefs.image.chunks import digest
from imagefs.image.index import (
    FANOUT,
    BlockRef,
    ChunkRef,
    PayloadRef,
    StreamRef,
    encode_block,
    group_children,
    root_level,
    span,
)
from imagefs.store.packing import PackWriter, Placed

IN_MEMORY = 4 << 20
"""References beyond this wait on disk, in the store's directory: those of 1 TiB in use take 1 GiB."""
TEMPORARY_PREFIX = ".imagefs-spool-"
"""Where the filesystem knows no files without names."""


class References:
    """The non-zero children of one level of a tree, ascending, while their packs may still be without a name."""

    RECORD = struct.Struct("<Q32sIII")

    def __init__(self, chunk_pages: int, level: int, windows: int, directory: Path) -> None:
        """``level`` is that of the blocks that will hold the references: 0 for references to chunks. ``windows`` are
        those of the whole stream."""
        self.level = level
        self._windows = windows
        self._bitmap = chunk_pages // 8 if level == 0 else 0
        self._directory = directory
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed by close()
            IN_MEMORY, prefix=TEMPORARY_PREFIX, dir=str(directory)
        )
        self.count = 0
        self.stored_bytes = 0

    def add(self, number: int, name: bytes, placed: Placed, pages: int = 0) -> None:
        record = self.RECORD.pack(number, name, placed.pack, placed.offset, placed.length)
        with self._room():
            self._file.write(record + pages.to_bytes(self._bitmap, "little"))
        self.count += 1
        self.stored_bytes += placed.length

    def resolved(self, name_of: Callable[[int], bytes]) -> Iterator[tuple[int, ChunkRef | BlockRef]]:
        """The references with the packs' names in place of their numbers."""
        with self._room():
            self._file.seek(0)
        size = self.RECORD.size + self._bitmap
        while record := self._file.read(size):
            number, name, pack, offset, length = self.RECORD.unpack_from(record)
            place = PayloadRef(name_of(pack), offset, length)
            if self.level:
                below = span(self.level - 1)
                yield number, BlockRef(name, place, self.level - 1, min(below, self._windows - number * below))
            else:
                yield number, ChunkRef(name, place, int.from_bytes(record[self.RECORD.size :], "little"))

    def close(self) -> None:
        # What is not written yet goes with the file.
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT):
                raise
            raise NoSpaceError(f"{self._directory}: no space left for the index in the making") from error


class Tree:
    """The index of one stream in the making: give it the chunks of its windows, then :func:`build_trees`."""

    def __init__(self, size: int, chunk_pages: int, directory: Path) -> None:
        """``directory`` is for temporary files."""
        self.size = size
        self.chunk_pages = chunk_pages
        self.index_bytes = 0
        self._directory = directory
        self._windows = StreamRef(size, None).windows(chunk_pages)
        self._top = References(chunk_pages, 0, self._windows, directory)
        self._total = self._windows
        self.root_level = root_level(self._windows)

    @property
    def chunks(self) -> References:
        """The references to the chunks, until :func:`build_trees` has used them up."""
        return self._top

    def blocks(self, level: int, packs: PackWriter) -> Iterator[tuple[bytes, bytes]]:
        """Digest and bytes of each block of the next level, put into packs as they are made."""
        children = self._top
        self._top = References(self.chunk_pages, level + 1, self._windows, self._directory)
        with closing(children):
            for number, slots, group in group_children(children.resolved(packs.resolve), self._total):
                data = encode_block(level, self.chunk_pages, slots, group)
                name = digest(data)
                self._top.add(number, name, packs.add(name, data, 0))
                self.index_bytes += len(data)
                yield name, data
        self._total = -(-self._total // FANOUT)

    def root(self, packs: PackWriter) -> BlockRef | None:
        """The block at the top, None where the stream is all zeros."""
        for _, root in self._top.resolved(packs.resolve):
            assert isinstance(root, BlockRef)
            return root
        return None

    def close(self) -> None:
        self._top.close()


def build_trees(
    trees: list[Tree], packs: PackWriter, written: Callable[[int, int, bytes, bytes], None]
) -> list[StreamRef]:
    """Write the index blocks of all trees into packs, the levels of all trees together, lowest first.

    ``written`` is told each block: number of its tree, level, digest, bytes.
    """
    packs.flush()
    for level in range(max(tree.root_level for tree in trees) + 1):
        for number, tree in enumerate(trees):
            if level <= tree.root_level:
                for name, data in tree.blocks(level, packs):
                    written(number, level, name, data)
        packs.flush()
    return [StreamRef(tree.size, tree.root(packs)) for tree in trees]
