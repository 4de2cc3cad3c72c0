"""Pages in memory only (``-o nocache``): the most recent windows, the rest is fetched again."""

from __future__ import annotations

import mmap
import threading
from typing import Any

from cachetools import LRUCache

from imagefs.cache.presence import Presence
from imagefs.image.geometry import PAGE_SIZE

LIMIT = 32 << 20
"""Bytes of pages kept: enough for what is read again at once, little enough for a daemon of 120 MiB."""
SINGLE_LIMIT = 8 << 20
"""Bytes of single pages kept, beside that: page tables, which came with the metadata and come from nowhere else
without their whole window."""


class _Recent(LRUCache[int, bytes]):
    """Windows by their first page number, whose bits are cleared as they are dropped."""

    def __init__(self, limit: int, presence: Presence, single: dict[int, bytes]) -> None:
        super().__init__(limit, getsizeof=len)
        self._presence = presence
        self._single = single

    def popitem(self) -> tuple[int, bytes]:
        first, data = super().popitem()
        for page in range(first, first + len(data) // PAGE_SIZE):
            if page not in self._single:
                self._presence.clear(page, 1)
        return first, data


class MemoryCache:
    """The pages of one image as long as the daemon lives. See :class:`imagefs.fetch.sink.PageSink`.

    A bit that is set without bytes is a zero page. Whole windows are kept as long as they are recent, and pages that
    are put one by one for good.
    """

    def __init__(self, size: int, window_size: int, limit: int = LIMIT) -> None:
        self.pages = -(-size // PAGE_SIZE)
        self._window = window_size
        self._presence = Presence(mmap.mmap(-1, max(1, (self.pages + 7) // 8)), self.pages)
        self._single: dict[int, bytes] = {}
        self._recent = _Recent(limit, self._presence, self._single)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryCache {self._recent.currsize} of {self._recent.maxsize} bytes>"

    def read(self, offset: int, length: int) -> bytes | None:
        first, last = offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE
        pieces = []
        with self._lock:
            if not self._presence.all(first, last - first + 1):
                return None
            end = offset + length
            while offset < end:
                window, start = divmod(offset, self._window)
                count = min(self._window - start, end - offset)
                data = self._recent.get(window * self._window // PAGE_SIZE)
                if data is None:
                    data = self._assembled(window * self._window // PAGE_SIZE)
                pieces.append(data[start : start + count])
                offset += count
        return b"".join(pieces)

    def has(self, first: int, count: int) -> bool:
        return self._presence.all(first, count)

    def put(self, first: int, data: bytes | memoryview) -> bool:
        with self._lock:
            if len(data) != self._window or first * PAGE_SIZE % self._window:
                return self._put_single(first, data)
            if len(data) <= self._recent.maxsize:
                # A copy: a view would keep all of the request that it came with.
                self._recent[first] = bytes(data)
                self._presence.set(first, min(len(data) // PAGE_SIZE, self.pages - first))
        return True

    def _put_single(self, first: int, data: bytes | memoryview) -> bool:
        if len(self._single) * PAGE_SIZE + len(data) > SINGLE_LIMIT:
            return False
        for at in range(0, len(data), PAGE_SIZE):
            self._single[first + at // PAGE_SIZE] = bytes(data[at : at + PAGE_SIZE])
        self._presence.set(first, len(data) // PAGE_SIZE)
        return True

    def _assembled(self, first: int) -> bytes:
        """A window of single pages, and of zeros."""
        numbers = range(first, first + self._window // PAGE_SIZE)
        if not any(page in self._single for page in numbers):
            return bytes(self._window)
        return b"".join(self._single.get(page, bytes(PAGE_SIZE)) for page in numbers)

    @property
    def full(self) -> bool:
        """Never: the oldest pages go."""
        return False

    def put_zeros(self, first: int, count: int) -> None:
        with self._lock:
            self._presence.set(first, count)

    def distrusted(self, first: int, count: int) -> bytes | None:
        return None

    def block(self, digest: bytes) -> bytes | None:
        return None

    def put_block(self, digest: bytes, data: bytes) -> None:
        """Blocks are kept by the reader's own cache."""

    def working_set(self) -> bytes | None:
        return None

    def put_working_set(self, text: bytes) -> None:
        """Nothing outlives the daemon."""

    def bitmap(self, offset: int, length: int) -> bytes:
        return self._presence.bytes_at(offset, length)

    def statistics(self) -> dict[str, Any]:
        kept = self._recent.currsize + len(self._single) * PAGE_SIZE
        return {"kind": "memory", "pages_present": self._presence.count(), "bytes": kept}

    def close(self) -> None:
        """Nothing to do: it ends with the process."""
