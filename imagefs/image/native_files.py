"""The files that were split, where they were more than one: a directory.

Their bytes lie end to end in the native stream, in the order of the list. A path is relative, its components are
joined by ``/``; directories are there by being on the way to a file, so empty ones are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_COMPONENT = 255
MAX_PATH = 4095
"""Bytes of UTF-8, Linux' limits."""


@dataclass(frozen=True, slots=True)
class NativeFile:
    """One of the files: its path below ``native/``, and its bytes."""

    path: str
    size: int


def is_file_name(name: str) -> bool:
    """Whether a file can have this name: images come from elsewhere."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name) and size <= MAX_COMPONENT


def is_file_path(path: str) -> bool:
    """Whether a path stays below the directory that it is relative to, and can be a file's."""
    return all(map(is_file_name, path.split("/"))) and len(path.encode()) <= MAX_PATH


def check_files(files: Sequence[NativeFile], size: int) -> None:
    """ValueError for a list that can be no directory's, or whose sizes do not add up to ``size``."""
    for file in files:
        if not is_file_path(file.path):
            raise ValueError(f"{file.path!r} cannot be the path of a file")
    paths = sorted(tuple(file.path.split("/")) for file in files)
    for before, after in pairwise(paths):
        if before == after:
            raise ValueError(f"{'/'.join(after)!r} is there twice")
        if before == after[: len(before)]:
            raise ValueError(f"{'/'.join(before)!r} is a file and a directory")
    total = sum(file.size for file in files)
    if files and total != size:
        raise ValueError(f"the files have {total} bytes, the native stream {size}")


def spans(files: Sequence[NativeFile]) -> Iterator[tuple[str, int, int]]:
    """Path, start and end in the native stream of each file."""
    at = 0
    for file in files:
        yield file.path, at, at + file.size
        at += file.size
