"""When an answer came: what tells a link's round trip from its bandwidth, and both from what this machine takes.

A request and its answer happen in one thread, so who wants to know opens :func:`timed` around a store's ``get`` in the
same thread, and the store that made the request notes the moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timing:
    """One request. Times are those of ``time.monotonic``."""

    begun: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    last_byte: float | None = None
    ended: float = 0.0

    @property
    def latency(self) -> float:
        """Seconds to the first byte; to the last where the store did not say when the first came."""
        return (self.ended if self.first_byte is None else self.first_byte) - self.begun

    @property
    def seconds(self) -> float:
        """Seconds to the last byte; with what was done with it where the store did not say when it came."""
        return (self.ended if self.last_byte is None else self.last_byte) - self.begun


_current = threading.local()


@contextmanager
def timed() -> Iterator[Timing]:
    """Requests of this thread inside the block are noted in what is yielded."""
    timing = Timing()
    _current.timing = timing
    try:
        yield timing
    finally:
        _current.timing = None
        timing.ended = time.monotonic()


def request_sent() -> None:
    """A request is about to be sent on a connection that is open: connecting is not part of the round trip."""
    timing = getattr(_current, "timing", None)
    if timing is not None:
        timing.begun = time.monotonic()


def first_byte_came() -> None:
    """The answer begins."""
    timing = getattr(_current, "timing", None)
    if timing is not None and timing.first_byte is None:
        timing.first_byte = time.monotonic()


def last_byte_came() -> None:
    """The answer is complete."""
    timing = getattr(_current, "timing", None)
    if timing is not None:
        timing.last_byte = time.monotonic()
