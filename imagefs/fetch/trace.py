"""First touches, in order (``.imagefs/trace``): what the next resume of the same image will want first."""

from __future__ import annotations

import math
import time
from array import array

from imagefs.errors import UsageError

LIMIT = 1 << 17
"""Touches kept: 16 GiB of a file that is read, half a gibibyte by single pages. A guest that runs for weeks must not
fill the daemon's memory."""
MAX_ORIGIN = 32
OWN = "read"
LIKELY = "likely"
"""The origin of lines that are no touches: what was here before anyone asked, because the image says that it is likely
to be wanted. A pager that has it installed does not see its touches."""


class TouchTrace:
    """Implements :class:`imagefs.fetch.view.Trace`. Own touches are the pages of a read, helpers append single ones."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._begun = time.monotonic()
        self._seconds = array("d")
        self._first = array("Q")
        self._count = array("Q")
        self._origin = array("H")
        self._origins: list[str] = [OWN]
        self._touched: set[int] = set()

    def __len__(self) -> int:
        return len(self._first)

    def touch(self, page: int, count: int) -> None:
        """A read of these pages, of which the first time counts. Cheap: it is on the way of every read."""
        if page not in self._touched and len(self._first) < LIMIT:
            self._touched.add(page)
            self._add(time.monotonic() - self._begun, page, count, 0)

    def guessed(self, page: int, count: int) -> None:
        """These pages have been fetched for being likely to be wanted."""
        if len(self._first) < LIMIT:
            self._add(time.monotonic() - self._begun, page, count, self._origin_number(LIKELY))

    def text(self) -> bytes:
        lines = zip(self._seconds, self._first, self._count, self._origin, strict=True)
        return "".join(f"{at:.6f} {page} {count} {self._origins[who]}\n" for at, page, count, who in lines).encode()

    def append_text(self, data: bytes) -> None:
        parsed = [self._parse(line) for line in data.decode("ascii", "replace").splitlines() if line.strip()]
        for seconds, page, count, origin in parsed:
            if len(self._first) < LIMIT:
                self._add(seconds, page, count, self._origin_number(origin))

    def _parse(self, line: str) -> tuple[float, int, int, str]:
        try:
            at, first, number, origin = line.split()
            seconds, page, count = float(at), int(first), int(number)
        except ValueError:
            seconds, page, count, origin = math.nan, 0, 0, ""
        named = origin.isascii() and origin.isprintable() and len(origin) <= MAX_ORIGIN
        if not (math.isfinite(seconds) and seconds >= 0 and named and 0 <= page < page + count <= self._pages):
            raise UsageError(f"trace: not SECONDS PAGE COUNT ORIGIN within {self._pages} pages: {line[:80]!r}")
        return seconds, page, count, origin

    def _origin_number(self, origin: str) -> int:
        if origin not in self._origins:
            if len(self._origins) == 256:
                raise UsageError("trace: more than 256 different origins")
            self._origins.append(origin)
        return self._origins.index(origin)

    def _add(self, seconds: float, page: int, count: int, origin: int) -> None:
        self._seconds.append(seconds)
        self._first.append(page)
        self._count.append(count)
        self._origin.append(origin)
