"""``native/`` of an image that was split from a directory: names and inode numbers of what is below it."""

from __future__ import annotations

from collections.abc import Sequence

from imagefs.image.native_files import NativeFile, spans

Entries = tuple[tuple[bytes, int], ...]
"""Name and inode."""


class NativeTree:
    """Directories come into being by being on the way to a file. What is here was made once, and grows with the number
    of files."""

    def __init__(self, files: Sequence[NativeFile], root: int, first_file: int, first_directory: int) -> None:
        """``root`` is the inode of ``native/``; files and directories below it get numbers from the other two on."""
        self._spans = [(start, end) for _, start, end in spans(files)]
        self._first_file = first_file
        self.directories: dict[int, Entries] = {}
        """Entries of each directory, sorted by name; nothing where there are no files."""
        self.parents: dict[int, int] = {}
        """Of each directory below ``root``."""
        if not files:
            return
        content: dict[int, dict[bytes, int]] = {root: {}}
        for number, file in enumerate(files):
            *directories, name = file.path.encode().split(b"/")
            inside = root
            for directory in directories:
                below = content[inside].setdefault(directory, first_directory + len(self.parents))
                if below not in content:
                    content[below] = {}
                    self.parents[below] = inside
                inside = below
            content[inside][name] = first_file + number
        self.directories = {inode: tuple(sorted(entries.items())) for inode, entries in content.items()}

    def has_file(self, inode: int) -> bool:
        return self._first_file <= inode < self._first_file + len(self._spans)

    def span(self, inode: int) -> tuple[int, int]:
        """Start and end of a file in the native stream; for an inode that :meth:`has_file`."""
        return self._spans[inode - self._first_file]
