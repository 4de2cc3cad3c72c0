"""A CRIU image directory, as ``criu dump`` and ``criu pre-dump`` write it: processes instead of a VM.

| file                            | what is done with it                                                             |
|---------------------------------|----------------------------------------------------------------------------------|
| `inventory.img`                 | recognised by its magic, 0x58313116                                              |
| `pagemap-PID.img`, `pagemap-shmem-ID.img` | say which pages are where: :mod:`imagefs.formats.criu_pagemap`         |
| `pages-ID.img`                  | the pages, end to end: they become ``memory``                                    |
| `parent`                        | the dump before: :mod:`imagefs.formats.criu_images`                              |
| everything else                 | kept as it is                                                                    |

``memory`` has the pages of one process after the other, by address. It has no guest-physical addresses: those in
``regions`` and ``pages/`` are made up, a page's frame number is its number in ``memory``. A region is a run of pages
without a gap, and its name says whose and where: ``pid 17 0x7f2c41000000``. With more than MAX_REGIONS runs a region
is all of one process. Either way ``config/criu-runs.json`` has them all: ``[whose, address, pages, first page of
memory]``.

``native/`` of a mount is the directory again, for ``criu restore -D MOUNT/native``; ``parent`` is a directory there,
not a link. Restoring from a mount has not been tried.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats.base import Input, Workspace
from imagefs.formats.criu_images import Level, is_image_directory, read_levels, segments, tasks
from imagefs.formats.criu_pagemap import IN_PARENT, PRESENT
from imagefs.formats.directory import SeveralFiles
from imagefs.formats.pieces import PageRun, PieceMemory
from imagefs.image.capture import BytesSource, Capture
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region

MAX_REGIONS = 4096
"""In the document, of which a mount gets all."""
MAX_RUNS = 150_000
"""All in memory while the image is split, some 220 bytes each in all tables: 199 000 took 43 MB."""
RUNS = "criu-runs.json"

Run = tuple[str, int, int, int]
"""Whose pages, address, count, first page of memory."""


class Criu:
    """The format ``criu``."""

    name = "criu"

    def matches(self, source: Input) -> bool:
        return source.directory is not None and is_image_directory(source.directory)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: CRIU's pages are in the directory")
        if source.directory is None:
            raise UsageError(f"{source.name}: CRIU's images are a directory")
        levels = read_levels(source.directory, workspace)
        memory, runs, used = _gather(levels)
        if not len(runs):
            raise UnsupportedInputError(f"{source.name} has no pages of any process", field="pagemap", offset=0)
        several = SeveralFiles(workspace)
        for level in levels:
            for path, file in level.files.items():
                several.add(level.prefix + path, file, used.get(id(file), ()))
        native, files = several.finish()
        return Capture(
            source_format=self.name,
            source_version="",
            geometry=Geometry(tuple(_regions(runs))),
            memory=memory,
            native=native,
            native_files=files,
            state=BytesSource(b""),
            config={RUNS: runs.to_json()},
            restore={"vmm": "criu", "processes": _processes(runs), "absent_pages": _absent(levels[0])},
        )


FORMAT = Criu()


class _Used:
    """Which pages of a file are in memory, in columns: there may be some 100 000 runs."""

    def __init__(self) -> None:
        self._places, self._pages, self._counts = array("Q"), array("Q"), array("Q")
        self._end = 0

    def add(self, place: int, page: int, count: int) -> None:
        """Only what is behind the runs before: two pagemaps may name the same pages, and ``native`` needs them once."""
        if place >= self._end:
            self._places.append(place)
            self._pages.append(page)
            self._counts.append(count)
            self._end = place + count * PAGE_SIZE

    def __iter__(self) -> Iterator[PageRun]:
        return map(PageRun, self._places, self._pages, self._counts)


class _Runs:
    """Pages that follow each other in a process, in columns."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._numbers, self._addresses, self._counts, self._pages = array("I"), array("Q"), array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Run]:
        names = (self._names[number] for number in self._numbers)
        return zip(names, self._addresses, self._counts, self._pages, strict=True)

    def add(self, whose: str, address: int, count: int, page: int) -> None:
        """Goes on with the run before where that ended at this address of the same process."""
        new = not self._names or self._names[-1] != whose
        if new:
            self._names.append(whose)
        elif self._addresses[-1] + self._counts[-1] * PAGE_SIZE == address:
            self._counts[-1] += count
            return
        self._numbers.append(len(self._names) - 1)
        self._addresses.append(address)
        self._counts.append(count)
        self._pages.append(page)

    def to_json(self) -> bytes:
        """A list of lists."""
        text = bytearray()
        for run in self:
            text += b",\n" if text else b"["
            text += json.dumps(run, separators=(",", ":")).encode()
        return bytes(text + b"]\n")


def _gather(levels: list[Level]) -> tuple[PieceMemory, _Runs, dict[int, _Used]]:
    """The memory, what it is made of, and which pages of each file are in it."""
    memory = PieceMemory()
    runs = _Runs()
    used: dict[int, _Used] = {}
    for whose, name in tasks(levels):
        for segment in segments(levels, name):
            page = memory.size // PAGE_SIZE
            memory.add(memory.size, segment.file, segment.place, segment.count * PAGE_SIZE)
            used.setdefault(id(segment.file), _Used()).add(segment.place, page, segment.count)
            runs.add(whose, segment.address, segment.count, page)
            if len(runs) > MAX_RUNS:
                raise UnsupportedInputError(f"more than {MAX_RUNS:,} runs of pages", field=name, offset=0)
    return memory, runs, used


def _regions(runs: _Runs) -> list[Region]:
    if len(runs) <= MAX_REGIONS:
        parts = [(f"{whose} {address:#x}", count, page) for whose, address, count, page in runs]
    else:
        parts = [(str(each["whose"]), int(each["pages"]), int(each["first_page"])) for each in _processes(runs)]
    return [Region(name, page * PAGE_SIZE, count * PAGE_SIZE, page * PAGE_SIZE) for name, count, page in parts]


def _processes(runs: _Runs) -> list[dict[str, str | int]]:
    found: dict[str, dict[str, str | int]] = {}
    for whose, _, count, page in runs:
        each = found.setdefault(whose, {"whose": whose, "first_page": page, "pages": 0})
        each["pages"] = int(each["pages"]) + count
    return list(found.values())


def _absent(level: Level) -> int:
    """Pages that were left behind at the host of the dump."""
    return sum(
        count
        for pagemap in level.pagemaps.values()
        for count, flags in zip(pagemap.counts, pagemap.flags, strict=True)
        if not flags & (IN_PARENT | PRESENT)
    )
