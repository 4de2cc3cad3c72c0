"""A CRIU image directory and its parents: which files there are, and where the pages of each process are in them.

An incremental dump has a symbolic link ``parent`` to the directory of the dump before (``CR_PARENT_LINK``,
criu/image.c). It is followed if it is relative and leads to another image directory beside SOURCE: with any other
one, whoever made the directory would choose what is read. A directory ``parent`` in its place will do, too.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Workspace
from imagefs.formats.criu_pagemap import (
    COMMON_MAGIC,
    IN_PARENT,
    MAX_PAGEMAP,
    PRESENT,
    Pagemap,
    is_pagemap,
    parse_pagemap,
)
from imagefs.formats.directory import head_of, open_file, read_file, regular_files
from imagefs.formats.spool import FileSource
from imagefs.image.geometry import PAGE_SIZE

PARENT = "parent"
MAX_PARENTS = 64
INVENTORY, INVENTORY_MAGIC = "inventory.img", 0x58313116

_PAGEMAP = re.compile(r"pagemap-((?:shmem-)?)(\d{1,20})\.img", re.ASCII)
_FILES_LOOKED_AT = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """Pages of a process that are in a file: address, count, the file and the byte offset in it."""

    address: int
    count: int
    file: FileSource
    place: int


@dataclass
class Level:
    """One directory: SOURCE, its parent, the parent's parent, …"""

    directory: Path
    prefix: str
    """Of its files' paths below ``native/``."""
    files: dict[str, FileSource]
    """Everything in it but the parent, by path."""
    pagemaps: dict[str, Pagemap]
    """By the file's name."""

    def pages(self, name: str) -> FileSource:
        """The pages file of a pagemap."""
        pages = f"pages-{self.pagemaps[name].pages_id}.img"
        if pages not in self.files:
            raise UnsupportedInputError(
                f"{self.directory} has no {pages}", field=f"{self.prefix}{name}: pages_id", offset=0
            )
        return self.files[pages]


def is_image_directory(directory: Path) -> bool:
    """By ``inventory.img``, or by a pagemap in directories that have none (older pre-dumps)."""
    head = head_of(directory / INVENTORY, 8)
    magic = INVENTORY_MAGIC.to_bytes(4, "little")
    if magic in (head[:4], head[4:8] if head[:4] == COMMON_MAGIC.to_bytes(4, "little") else b""):
        return True
    with os.scandir(directory) as entries:
        for _, entry in zip(range(_FILES_LOOKED_AT), entries, strict=False):
            if _PAGEMAP.fullmatch(entry.name) and is_pagemap(head_of(Path(entry.path), 8)):
                return True
    return False


def read_levels(source: Path, workspace: Workspace) -> list[Level]:
    """SOURCE and its parents. UsageError for links that lead elsewhere, UnsupportedInputError for damaged images."""
    levels: list[Level] = []
    directory: Path | None = source
    while directory is not None:
        if len(levels) > MAX_PARENTS:
            raise UsageError(f"{source} has more than {MAX_PARENTS} parents, one behind the other")
        prefix = f"{PARENT}/" * len(levels)
        files = {str(path): open_file(workspace, directory / path) for path in regular_files(directory, without=PARENT)}
        pagemaps = {}
        for name, file in files.items():
            if _PAGEMAP.fullmatch(name):
                pagemaps[name] = parse_pagemap(read_file(file, f"{prefix}{name}", MAX_PAGEMAP), f"{prefix}{name}")
        levels.append(Level(directory, prefix, files, pagemaps))
        directory = _parent(source, directory, [level.directory for level in levels])
    for level in levels:
        _check_pages(level)
    return levels


def tasks(levels: list[Level]) -> list[tuple[str, str]]:
    """Whose pages there are, ``pid 12`` or ``shmem 3``, and the name of the pagemap; processes first, by number."""
    found = []
    for name in levels[0].pagemaps:
        match = _PAGEMAP.fullmatch(name)
        assert match is not None
        found.append((match[1], int(match[2]), name))
    return [(f"{kind.rstrip('-') or 'pid'} {number}", name) for kind, number, name in sorted(found)]


def segments(levels: list[Level], name: str, depth: int = 0) -> Iterator[Segment]:
    """Where the pages of one pagemap are, ascending by address. Those of a parent are taken from there."""
    pagemap, file = levels[depth].pagemaps[name], levels[depth].pages(name)
    below: _Resolved | None = None
    for address, count, place, flags in zip(
        pagemap.addresses, pagemap.counts, pagemap.places, pagemap.flags, strict=True
    ):
        if flags & IN_PARENT:
            below = below or _Resolved(levels, name, depth + 1)
            yield from below.between(address, count)
        elif flags & PRESENT:
            yield Segment(address, count, file, place)


class _Resolved:
    """The segments of a parent, to be found by address."""

    def __init__(self, levels: list[Level], name: str, depth: int) -> None:
        self._where = f"{levels[depth - 1].prefix}{name}: in_parent"
        self._starts, self._counts, self._places = array("Q"), array("Q"), array("Q")
        self._files: list[FileSource] = []
        if depth < len(levels) and name in levels[depth].pagemaps:
            for segment in segments(levels, name, depth):
                self._starts.append(segment.address)
                self._counts.append(segment.count)
                self._places.append(segment.place)
                self._files.append(segment.file)

    def between(self, address: int, count: int) -> Iterator[Segment]:
        end = address + count * PAGE_SIZE
        while address < end:
            index = bisect_right(self._starts, address) - 1
            skip = (address - self._starts[index]) // PAGE_SIZE if index >= 0 else 0
            if index < 0 or skip >= self._counts[index]:
                raise UnsupportedInputError(
                    f"the parent's images do not have the page at {address:#x}", field=self._where, offset=0
                )
            found = min(self._counts[index] - skip, (end - address) // PAGE_SIZE)
            yield Segment(address, found, self._files[index], self._places[index] + skip * PAGE_SIZE)
            address += found * PAGE_SIZE


def _check_pages(level: Level) -> None:
    for name, pagemap in level.pagemaps.items():
        file = level.pages(name)
        wanted = pagemap.file_pages * PAGE_SIZE
        if file.size != wanted:
            raise UnsupportedInputError(
                f"it has {file.size:,} bytes, the {pagemap.file_pages:,} pages of {name} take {wanted:,}",
                field=f"{level.prefix}pages-{pagemap.pages_id}.img",
                offset=min(file.size, wanted),
            )


def _parent(source: Path, directory: Path, seen: list[Path]) -> Path | None:
    path = directory / PARENT
    if not path.is_symlink():
        return path if path.is_dir() else None
    target = os.readlink(path)
    beside = Path(os.path.realpath(source)).parent
    resolved = Path(os.path.realpath(path))
    inside = not os.path.isabs(target) and resolved != beside and resolved.is_relative_to(beside)
    if not inside or any(Path(os.path.realpath(each)).is_relative_to(resolved) for each in seen):
        raise UsageError(
            f"{path} leads to {target}, which is no other directory below {beside}: bring the parent's images there"
        )
    if not resolved.is_dir() or not is_image_directory(resolved):
        raise UsageError(f"{path} leads to {target}, which is no directory of CRIU images")
    return resolved
