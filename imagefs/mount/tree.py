"""The mount's files and directories: names, inode numbers, listings. Nothing is kept per page.

| inode        | what                                                          |
|-------------:|---------------------------------------------------------------|
| 1 … 12       | the fixed entries, see the constants                          |
| 2**32 + i    | the i-th file of ``config/``, by name                         |
| 2**33 + i    | the i-th file below ``native/``, where that is a directory    |
| 2**34 + d    | a directory below ``native/``                                 |
| 2**48 + d    | ``pages/0xDDDDD``, d being pfn >> 12                          |
| 2**49 + pfn  | ``pages/0xDDDDD/0xPPPPPPP``                                   |

A frame number has 40 bits at most, so the ranges do not touch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from imagefs.errors import MountError
from imagefs.image.geometry import Geometry
from imagefs.image.native_files import MAX_COMPONENT, NativeFile, is_file_name
from imagefs.mount.native_tree import NativeTree

ROOT, MEMORY, STATE, NATIVE, METADATA, CONFIG, PAGES, CONTROL, STATUS, ARRIVALS, TRACE, PRESENT = range(1, 13)

MADE_UP = frozenset((STATUS, ARRIVALS, TRACE))
"""Text that is made as it is read: no size, and never cached."""

_CONFIG_FILE = 1 << 32
_NATIVE_FILE = 1 << 33
_NATIVE_DIRECTORY = 1 << 34
_FRAME_DIRECTORY = 1 << 48
_FRAME = 1 << 49
_END = 1 << 50

MAX_FRAMES = 1 << 40
"""No machine has more than 52 bits of physical addresses."""
FRAMES_SHIFT = 12
"""Frames of one directory, as a power of two."""
MAX_NAME = MAX_COMPONENT

_ROOT_ENTRIES = (
    (b"memory", MEMORY),
    (b"state", STATE),
    (b"native", NATIVE),
    (b"metadata.json", METADATA),
    (b"config", CONFIG),
    (b"pages", PAGES),
    (b".imagefs", CONTROL),
)
_CONTROL_ENTRIES = ((b"status.json", STATUS), (b"arrivals", ARRIVALS), (b"trace", TRACE), (b"present", PRESENT))

_HEX_NAME = re.compile(rb"0x[0-9a-f]{5,12}")

Entry = tuple[bytes, int, int]
"""Name, inode, and the position after the entry, from which a listing can go on."""


class Tree:
    """What exists for one geometry. Times and memory depend on the number of regions, never on that of pages."""

    def __init__(self, geometry: Geometry, config: Iterable[str] = (), native_files: Sequence[NativeFile] = ()) -> None:
        """``config`` are the names of the files below ``config/``; those that cannot be file names are left out.
        ``native_files`` make a directory of ``native``.

        MountError where there are frames that no machine has.
        """
        regions = sorted(geometry.regions, key=lambda region: region.guest_address)
        shift = FRAMES_SHIFT
        self._first = [region.guest_address >> 12 for region in regions]
        self._end = [(region.guest_address + region.size) >> 12 for region in regions]
        self._page = [region.offset >> 12 for region in regions]
        if self._end and self._end[-1] > MAX_FRAMES:
            raise MountError(f"region {regions[-1].name!r} ends at {self._end[-1] << 12:#x}, beyond 52 address bits")
        # Neighbouring regions may share a directory: spans of directory numbers, joined.
        self._directories: list[range] = []
        for first, end in zip(self._first, self._end, strict=True):
            span = range(first >> shift, ((end - 1) >> shift) + 1)
            if self._directories and span.start < self._directories[-1].stop:
                span = range(self._directories.pop().start, span.stop)
            self._directories.append(span)
        self._config = sorted(name.encode() for name in config if is_file_name(name))
        self.native = NativeTree(native_files, NATIVE, _NATIVE_FILE, _NATIVE_DIRECTORY)
        self._fixed: dict[int, tuple[tuple[bytes, int], ...]] = {
            **self.native.directories,
            ROOT: _ROOT_ENTRIES,
            CONTROL: _CONTROL_ENTRIES,
            CONFIG: tuple((name, _CONFIG_FILE + i) for i, name in enumerate(self._config)),
        }
        self._names = {directory: dict(entries) for directory, entries in self._fixed.items()}
        self._end_of_frames = self._end[-1] if self._end else 0

    def __repr__(self) -> str:
        return f"<Tree {len(self._first)} regions, {len(self._config)} config files>"

    def exists(self, inode: int) -> bool:
        """Whether an inode number names something."""
        if inode < _CONFIG_FILE:
            return ROOT <= inode <= PRESENT
        if inode < _NATIVE_FILE:
            return inode - _CONFIG_FILE < len(self._config)
        if inode < _FRAME_DIRECTORY:
            return self.native.has_file(inode) or inode in self.native.parents
        if inode < _FRAME:
            return self._has_directory(inode - _FRAME_DIRECTORY)
        return inode < _END and self._region_of(inode - _FRAME) is not None

    def is_directory(self, inode: int) -> bool:
        return inode in self._fixed or inode == PAGES or _FRAME_DIRECTORY <= inode < _FRAME

    def is_frame(self, inode: int) -> bool:
        return _FRAME <= inode < _END

    def page_of(self, inode: int) -> int:
        """Page number in ``memory`` of a frame's file; KeyError where there is none."""
        pfn = inode - _FRAME
        region = self._region_of(pfn) if self.is_frame(inode) else None
        if region is None:
            raise KeyError(inode)
        return self._page[region] + pfn - self._first[region]

    def config_name(self, inode: int) -> str | None:
        """The name below ``config/``, None for other inodes."""
        if _CONFIG_FILE <= inode < _CONFIG_FILE + len(self._config):
            return self._config[inode - _CONFIG_FILE].decode()
        return None

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Inode of an entry. A frame or its directory has one name only, in which it is listed."""
        if directory in self._names:
            return self._names[directory].get(name)
        if not _HEX_NAME.fullmatch(name):
            return None
        number = int(name, 16)
        if directory == PAGES:
            return _FRAME_DIRECTORY + number if self._has_directory(number) and name == directory_name(number) else None
        # Beyond the frame numbers that exist there may be no bits left in an inode number.
        if number >= self._end_of_frames or directory != _FRAME_DIRECTORY + (number >> FRAMES_SHIFT):
            return None
        return _FRAME + number if self._region_of(number) is not None and name == frame_name(number) else None

    def parent(self, directory: int) -> int:
        """Of a directory that exists."""
        return PAGES if directory >= _FRAME_DIRECTORY else self.native.parents.get(directory, ROOT)

    def list(self, directory: int, position: int = 0) -> Iterator[Entry]:
        """Entries behind a position, lazily, ``.`` and ``..`` first. Positions are stable: nothing ever changes."""
        if position < 1:
            yield b".", directory, 1
        if position < 2:
            yield b"..", self.parent(directory), 2
        start = max(position - 2, 0)
        if directory in self._fixed:
            for at, (name, inode) in enumerate(self._fixed[directory][start:], start):
                yield name, inode, at + 3
        elif directory == PAGES:
            for span in self._directories:
                for number in range(max(start, span.start), span.stop):
                    yield directory_name(number), _FRAME_DIRECTORY + number, number + 3
        else:
            yield from self._frames(directory - _FRAME_DIRECTORY, start)

    def _frames(self, number: int, start: int) -> Iterator[Entry]:
        base, end = number << FRAMES_SHIFT, (number + 1) << FRAMES_SHIFT
        region = max(bisect_right(self._first, base) - 1, 0)
        while region < len(self._first) and self._first[region] < end:
            for pfn in range(max(self._first[region], base + start), min(self._end[region], end)):
                yield frame_name(pfn), _FRAME + pfn, pfn - base + 3
            region += 1

    def _has_directory(self, number: int) -> bool:
        span = bisect_right(self._directories, number, key=lambda span: span.start) - 1
        return span >= 0 and number in self._directories[span]

    def _region_of(self, pfn: int) -> int | None:
        region = bisect_right(self._first, pfn) - 1
        return region if region >= 0 and pfn < self._end[region] else None


def directory_name(number: int) -> bytes:
    """Of the frames whose number is ``number << 12`` and up: five hexadecimal digits at least."""
    return b"0x%05x" % number


def frame_name(pfn: int) -> bytes:
    """Seven hexadecimal digits at least."""
    return b"0x%07x" % pfn
