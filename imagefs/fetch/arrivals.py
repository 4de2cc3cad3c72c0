"""The log of page runs in the order of their arrival (``.imagefs/arrivals``).

The log itself is bounded. A reader that is new, or that has fallen behind what is kept, is given what the presence
bitmap shows first, and then what has arrived since; and every reader is given the bitmap once more when it is complete,
since another daemon may have filled a shared cache. It may be told of a run twice, but never misses one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import trio

from imagefs.fetch.view import Run

KEPT = 65536
"""Runs in the log. A reader behind more than that starts over from the bitmap."""
STEP = 4096
"""Bytes of the bitmap looked at together: 128 MiB of memory."""
_POSITIONS = 1 << 48
_SCANNED = _POSITIONS - 1


class ArrivalLog:
    """Implements :class:`imagefs.fetch.view.Arrivals`. One event loop; not thread-safe.

    A cursor is ``sequence * 2**48 + position``: the log's sequence number at which the reader goes on once its scan of
    the bitmap, now at page ``position``, has come to the end.
    """

    def __init__(self, pages: int, bitmap: Callable[[int, int], bytes]) -> None:
        """``bitmap(offset, length)`` answers with bytes of the presence bitmap."""
        self._pages = pages
        self._bitmap = bitmap
        self._log: deque[Run] = deque(maxlen=KEPT)
        self._end = 1
        """Sequence number of the next run; that of a fresh cursor, 0, is always behind."""
        self._news = trio.Event()
        self._complete = False

    def __repr__(self) -> str:
        return f"<ArrivalLog {self._end - 1} runs, {'complete' if self._complete else 'growing'}>"

    @property
    def complete(self) -> bool:
        return self._complete

    def add(self, run: Run) -> None:
        """Note a run whose bits are set by now."""
        self._log.append(run)
        self._end += 1
        self._wake()

    def finish(self) -> None:
        """No page is missing any more."""
        self._complete = True
        # All cursors fall behind.
        self._log.clear()
        self._end += 1
        self._wake()

    def read(self, cursor: int, limit: int) -> tuple[list[Run], int]:
        sequence, position = divmod(cursor, _POSITIONS)
        if sequence < self._end - len(self._log) or sequence == 0:
            sequence, position = self._end, 0
        found: list[Run] = []
        if position != _SCANNED:
            for run in scan_runs(self._bitmap, self._pages, position):
                if len(found) == limit:
                    return found, sequence * _POSITIONS + position
                found.append(run)
                position = run.page + run.count
        start = sequence - (self._end - len(self._log))
        for at in range(start, min(len(self._log), start + limit - len(found))):
            found.append(self._log[at])
            sequence += 1
        return found, sequence * _POSITIONS + _SCANNED

    async def wait(self, cursor: int) -> None:
        sequence, position = divmod(cursor, _POSITIONS)
        if position == _SCANNED and sequence == self._end and not self._complete:
            await self._news.wait()
        else:
            await trio.lowlevel.checkpoint()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()


def scan_runs(bitmap: Callable[[int, int], bytes], pages: int, start: int) -> Iterator[Run]:
    """The runs of set bits from page ``start`` on; a long one may come in pieces."""
    for offset in range(start // 8 // STEP * STEP, (pages + 7) // 8, STEP):
        bits = int.from_bytes(bitmap(offset, STEP), "little")
        first = offset * 8
        if first < start:
            bits &= -1 << (start - first)
        while bits:
            low = (bits & -bits).bit_length() - 1
            inverted = ~(bits >> low)
            count = (inverted & -inverted).bit_length() - 1
            if first + low >= pages:
                break
            yield Run(first + low, min(count, pages - first - low))
            bits &= -1 << (low + count)
