"""What the mount has been asked, and how long answers took; kept small whatever the mount's age."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_STEPS = 8
"""Buckets per doubling: a percentile is off by 9 % at most."""
_SHORTEST = 1e-6


class WaitTimes:
    """A histogram of seconds with logarithmic buckets."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self._buckets[max(0, math.ceil(_STEPS * math.log2(max(seconds, _SHORTEST) / _SHORTEST)))] += 1
        self.count += 1
        self.longest = max(self.longest, seconds)

    def percentile(self, share: float) -> float | None:
        """Seconds that a ``share`` (0 to 1) of all waits did not exceed; None without waits."""
        wanted, seen = math.ceil(self.count * share), 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(self.longest, _SHORTEST * math.exp2(bucket / _STEPS))
        return None


class MountCounters:
    """Requests by kind, and the reads that had to wait for something to arrive. One event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self.requests: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.bytes_read = 0
        self._waits = WaitTimes()
        self._waiting: dict[int, float] = {}
        self._next = 0

    def __repr__(self) -> str:
        return f"<MountCounters {self.requests.total()} requests, {len(self._waiting)} waiting>"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around an answer that has to wait for pages."""
        number, self._next = self._next, self._next + 1
        self._waiting[number] = self._clock()
        try:
            yield
        finally:
            self._waits.add(self._clock() - self._waiting.pop(number))

    def statistics(self) -> dict[str, Any]:
        """JSON values, times in seconds. A read that still waits counts for the longest stall, too."""
        now = self._clock()
        oldest = max((now - since for since in self._waiting.values()), default=0.0)
        return {
            "uptime": round(now - self._begun, 3),
            "requests": dict(sorted(self.requests.items())),
            "errors": dict(sorted(self.errors.items())),
            "bytes_read": self.bytes_read,
            "waited": self._waits.count,
            "waiting": len(self._waiting),
            "wait_p50": _rounded(self._waits.percentile(0.5)),
            "wait_p99": _rounded(self._waits.percentile(0.99)),
            "longest_stall": _rounded(max(oldest, self._waits.longest)),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
