"""Which pages of a guest's memory QEMU has been sent. Each is sent once: QEMU takes a second copy for an error."""

from __future__ import annotations

from collections.abc import Iterator

from imagefs.image.geometry import PAGE_SIZE

_WINDOW = 1 << 16


class PageLedger:
    """One flag a page, and how many are missing. Not safe for threads by itself: :meth:`take` and what is sent on
    its word belong under one lock. The other methods may be called beside it, and may then be late by a page."""

    def __init__(self, pages: int, received: bytes = b"") -> None:
        """``received`` is a bitmap of those that are there, least significant bit first."""
        self.pages = pages
        self._sent = bytearray(pages)
        for start in range(0, pages if received else 0, _WINDOW):
            count = min(_WINDOW, pages - start)
            bits = int.from_bytes(received[start // 8 : (start + count + 7) // 8], "little") & ((1 << count) - 1)
            # As text, a digit a page, the last page first.
            self._sent[start : start + count] = f"{bits:0{count}b}".encode()[::-1].translate(_DIGITS)
        self.missing = self._sent.count(0)

    def __repr__(self) -> str:
        return f"<PageLedger {self.pages - self.missing} of {self.pages} pages sent>"

    def is_sent(self, page: int) -> bool:
        return self._sent[page] == 1

    def missing_in(self, first: int, end: int) -> int:
        """How many of the pages from ``first`` to before ``end`` are missing."""
        return self._sent.count(0, first, end)

    def next_missing(self, first: int) -> int:
        """The first missing page from ``first`` on; ``pages`` if there is none."""
        found = self._sent.find(0, first)
        return self.pages if found < 0 else found

    def take(self, first: int, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """The missing ones of the pages of ``data``, the first being ``first``; they count as sent now."""
        view = memoryview(data)
        for number in range(first, first + len(data) // PAGE_SIZE):
            if not self._sent[number]:
                self._sent[number] = 1
                self.missing -= 1
                at = (number - first) * PAGE_SIZE
                yield number, view[at : at + PAGE_SIZE]


_DIGITS = bytes.maketrans(b"01", b"\0\1")
