"""Memory files of one size laid over each other: what has data in a later one hides what is below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from imagefs.errors import UsageError
from imagefs.formats.base import Workspace
from imagefs.formats.pieces import PageRun
from imagefs.formats.spool import FileSource
from imagefs.image.geometry import PAGE_SIZE

MAX_LAYERS = 256
_PAGES_AT_ONCE = 64 << 10


class LayeredMemory:
    """The topmost data of each page: a ByteSource.

    Which file a page is from is in a spool, one byte a page: 16 MiB for a guest of 64 GiB, on disk and mostly holes.
    """

    def __init__(self, layers: Sequence[FileSource], workspace: Workspace) -> None:
        """The base first. UsageError for too many."""
        if len(layers) > MAX_LAYERS:
            raise UsageError(f"{len(layers)} memory files are too many; {MAX_LAYERS} can be laid over each other")
        self.size = layers[0].size
        self._layers = layers
        self._owners = workspace.spool()
        self._owners.resize(self.size // PAGE_SIZE)
        for number, layer in enumerate(layers[1:], 1):
            for first, count in data_pages(layer):
                for at in range(first, first + count, _PAGES_AT_ONCE):
                    piece = bytes([number]) * min(_PAGES_AT_ONCE, first + count - at)
                    self._owners.write_at(at, piece)

    def read_at(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        out = []
        for owner, first, count in self._owned(offset // PAGE_SIZE, -(-stop // PAGE_SIZE)):
            start, end = max(offset, first * PAGE_SIZE), min(stop, (first + count) * PAGE_SIZE)
            out.append(self._layers[owner].read_at(start, end - start))
        return out[0] if len(out) == 1 else b"".join(out)

    def next_data(self, offset: int) -> int:
        return min(layer.next_data(offset) for layer in self._layers)

    def runs(self, number: int) -> Iterator[PageRun]:
        """The pages of a layer's file that are those of the memory. Holes of the base are among them."""
        pages = [(0, self.size // PAGE_SIZE)] if number == 0 else data_pages(self._layers[number])
        for first, count in pages:
            for owner, start, length in self._owned(first, first + count):
                if owner == number:
                    yield PageRun(start * PAGE_SIZE, start, length)

    def _owned(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Runs of pages from one file: its number, first page, count."""
        for at in range(first, end, _PAGES_AT_ONCE):
            owners = self._owners.read_at(at, min(_PAGES_AT_ONCE, end - at))
            begin = 0
            while begin < len(owners):
                owner = owners[begin]
                rest = owners[begin:]
                count = len(rest) - len(rest.lstrip(rest[:1]))
                yield owner, at + begin, count
                begin += count


def data_pages(layer: FileSource) -> Iterator[tuple[int, int]]:
    """First page and count of what is no hole in a file; what is in part, is."""
    end = 0
    for start, stop in layer.data_extents():
        first = max(start // PAGE_SIZE, end)
        end = max(-(-stop // PAGE_SIZE), end)
        if first < end:
            yield first, end - first
