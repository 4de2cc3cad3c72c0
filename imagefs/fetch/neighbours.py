"""Which windows are worth having beside the one that was touched: decisions only.

Two kinds of reader. A guest jumps about, but not far: of the 169 windows that a Linux guest touches before it answers
its first question, 65 have to be waited for if the four on either side of each touch follow it, 85 with two, 46 with
eight (at 491, 378 and 677 windows fetched; measured with a 768 MiB guest). Where more fits on the link in the time of a
round trip, more is fetched: whoever waits for the next touch waits for a round trip anyway. A tool reads one window
after the other; for it the distance doubles as long as it goes on, as in a kernel's readahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

NEAR = 4
"""Windows on either side of a touch, at least."""
MOST_NEAR = 24
"""At most: with 32 the simulated guests wait at most 3 % shorter, over any link, and fetch up to a fifth more."""
COMPRESSED = 1 / 3
"""Of a window's size, what is fetched for it."""
FARTHEST = 64
"""Windows ahead of a sequential reader: 4 MiB, more than 100 Mbit/s carry in 300 ms of zstd'd memory."""


def near_windows(bytes_per_second: float, round_trip: float, window_size: int) -> int:
    """Windows on either side of a touch that the link carries in one round trip; within bounds."""
    fits = bytes_per_second * round_trip / (2 * window_size * COMPRESSED)
    return max(NEAR, min(round(fits), MOST_NEAR))


class Neighbourhood:
    """Follows the touches of one stream. Synchronous, constant memory."""

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._next = -1
        self._depth = NEAR
        self._ahead = -1
        """The window up to which a sequential reader's future has been asked for."""

    def touched(self, first: int, last: int, *, missed: bool, near: int = NEAR) -> Iterator[int]:
        """Windows to fetch next, the most wanted first, after a read of windows ``first`` to ``last``.

        ``missed`` tells whether it had to wait; then ``near`` are fetched on either side. A sequential reader must not
        have to: it asks for more while half of what it asked for before is still ahead of it.
        """
        sequential = first == self._next or (first == self._next - 1 and last >= first)
        self._next = last + 1
        if sequential and self._ahead >= first:
            if not missed and last + self._depth // 2 < self._ahead:
                return iter(())
            self._depth = min(2 * self._depth, FARTHEST)
            begin, self._ahead = max(last, self._ahead) + 1, last + self._depth
            return self._clip(range(begin, self._ahead + 1))
        if not missed:
            return iter(())
        self._depth = near
        self._ahead = last + near
        return self._clip(chain(range(last + 1, last + near + 1), range(first - near, first)))

    def _clip(self, wanted: range | chain[int]) -> Iterator[int]:
        return (window for window in wanted if 0 <= window < self._windows)
