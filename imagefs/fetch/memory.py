"""What of ``memory`` is here: the sink, and the log of what has arrived in it."""

from __future__ import annotations

from imagefs.fetch.arrivals import ArrivalLog
from imagefs.fetch.sink import PageSink
from imagefs.fetch.view import Run
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.index import IndexBlock


class MemoryPages:
    """Pages of one image's memory. Numbers are of pages, or of windows where it says so. One event loop."""

    def __init__(self, pages: int, chunk_pages: int, sink: PageSink) -> None:
        self.pages = pages
        self.arrivals = ArrivalLog(pages, sink.bitmap)
        self._chunk_pages = chunk_pages
        self._sink = sink
        self.check_complete()

    def window_span(self, number: int) -> tuple[int, int]:
        """First page and number of pages of a window; the last one may be short."""
        first = number * self._chunk_pages
        return first, min(self._chunk_pages, self.pages - first)

    def window_here(self, number: int) -> bool:
        return self._sink.has(*self.window_span(number))

    def keep(self, first: int, data: bytes) -> None:
        """Take in verified pages."""
        self._sink.put(first, data)
        self._announce(first, min(len(data) // PAGE_SIZE, self.pages - first))

    def pages_landed(self, first: int, count: int) -> None:
        """Pages were put into the sink, if that has room."""
        self._announce(first, min(count, self.pages - first))

    def window_landed(self, number: int) -> None:
        """A window was put into the sink, if that has room."""
        self._announce(*self.window_span(number))

    def note_zero_windows(self, number: int, count: int) -> None:
        """Windows that are all zero, by the index: here without a request."""
        first, _ = self.window_span(number)
        pages = min(count * self._chunk_pages, self.pages - first)
        if not self._sink.has(first, pages):
            self._sink.put_zeros(first, pages)
            self._announce(first, pages)

    def note_leaf(self, number: int, leaf: IndexBlock) -> None:
        """A leaf of the index, covering windows from ``number`` on: every zero page that it knows of is here.

        Zero pages within a window that has content are not announced: they are when the window lands.
        """
        for slot, count in leaf.gaps():
            self.note_zero_windows(number + slot, count)
        full = (1 << self._chunk_pages) - 1
        for slot, content in leaf.pages():
            if content == full:
                continue
            first, pages = self.window_span(number + slot)
            if content.bit_count() < pages and not self._sink.has(first, pages):
                for at, count in _runs_of_zeros(content, pages):
                    self._sink.put_zeros(first + at, count)
        self.check_complete()

    def _announce(self, first: int, count: int) -> None:
        # A full disk keeps nothing: whoever was waiting has the bytes, and nobody else must be told.
        if self._sink.has(first, count):
            self.arrivals.add(Run(first, count))
            self.check_complete()

    def check_complete(self) -> None:
        """To be called when nothing is left to be fetched, too: another daemon may have put the rest into the cache."""
        if not self.arrivals.complete and self._sink.has(0, self.pages):
            self.arrivals.finish()


def _runs_of_zeros(bits: int, count: int) -> list[tuple[int, int]]:
    """``(first, length)`` of each run of clear bits among the lowest ``count``."""
    runs = []
    zeros = ~bits & ((1 << count) - 1)
    while zeros:
        first = (zeros & -zeros).bit_length() - 1
        rest = ~(zeros >> first)
        length = (rest & -rest).bit_length() - 1
        runs.append((first, length))
        zeros &= -1 << (first + length)
    return runs
