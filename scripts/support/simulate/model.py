"""The model: a guest that touches windows in a recorded order, one link, and a policy that says what to fetch unasked.

A link answers a request a round trip after it was made, and brings one byte after the other: what was asked for first
comes first. A touch of a window that is not here is asked for at once and waited for. The background asks for what its
policy wants for as long as less than the product of round trip and bandwidth is under way, so that a touch finds next
to no queue: as `imagefs.fetch.link` does it. Left out: the host's own time for a fetch, losses, slow start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LEAST_UNDER_WAY = 128 << 10
"""Bytes that the background may have under way on the shortest link."""


@dataclass(frozen=True, slots=True)
class Link:
    mbit: float
    rtt_ms: float

    @property
    def name(self) -> str:
        return f"{self.mbit:g} Mbit/s, {self.rtt_ms:g} ms"

    @property
    def round_trip(self) -> float:
        return self.rtt_ms / 1e3

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.mbit * 1e6 / 8


@dataclass(frozen=True, slots=True)
class Touch:
    """The guest runs for so many seconds since its touch before, then wants a page of this window."""

    after: float
    page: int
    window: int


class Policy(Protocol):
    """What to fetch before it is asked for. Anew for each simulation."""

    def begin(self) -> Iterable[int]:
        """Windows to fetch from the mount on, the most wanted first."""

    def touched(self, page: int, window: int, *, missed: bool) -> Iterable[int]:
        """Windows to fetch after a touch, the most wanted first; they go before those of :meth:`begin`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float
    """From the guest's start to its last touch."""
    waits: int
    """Touches that waited."""
    fetched: int
    """Bytes asked for until then."""
    windows: int
    used: int
    """Of the windows that were asked for unasked: how many were touched in the end."""


@dataclass(slots=True)
class _Wire:
    """One bottleneck, first come, first served."""

    link: Link
    free: float = 0.0
    arrives: dict[int, float] = field(default_factory=dict)
    under_way: deque[tuple[float, int]] = field(default_factory=deque)
    background: int = 0
    fetched: int = 0

    def ask(self, now: float, window: int, size: int, *, background: bool) -> None:
        self.free = max(now + self.link.round_trip, self.free) + size / self.link.bandwidth
        self.arrives[window] = self.free
        self.fetched += size
        if background:
            self.under_way.append((self.free, size))
            self.background += size

    def ended(self, now: float) -> None:
        while self.under_way and self.under_way[0][0] <= now:
            self.background -= self.under_way.popleft()[1]


def simulate(
    touches: Sequence[Touch],
    sizes: Mapping[int, int],
    policy: Policy,
    link: Link,
    *,
    head_start: float = 0.0,
    host_seconds: float = 0.0,
) -> Outcome:
    """``sizes``: bytes of each window that is to be fetched; all others are here. ``head_start``: seconds from the
    mount to the guest's start, in which the background has the link for itself. ``host_seconds``: of the host's own
    for each touch that waits."""
    wire = _Wire(link)
    near: deque[int] = deque()
    listed = deque(policy.begin())
    most = max(LEAST_UNDER_WAY, link.round_trip * link.bandwidth * 1.05)
    now, waits = 0.0, 0
    unasked: set[int] = set()

    def fill(until: float) -> None:
        """The background's requests from ``now`` to ``until``."""
        at = now
        while at <= until:
            wire.ended(at)
            if wire.background >= most:
                at = wire.under_way[0][0]
                continue
            queue = near or listed
            if not queue:
                return
            window = queue.popleft()
            if window in sizes and window not in wire.arrives:
                wire.ask(at, window, sizes[window], background=True)
                unasked.add(window)

    wanted: set[int] = set()
    fill(head_start)
    now = head_start
    for touch in touches:
        fill(now + touch.after)
        now += touch.after
        arrives = now
        if touch.window in sizes:
            wanted.add(touch.window)
            if touch.window not in wire.arrives:
                wire.ask(now, touch.window, sizes[touch.window], background=False)
            arrives = wire.arrives[touch.window]
        missed = arrives > now
        near.extend(policy.touched(touch.page, touch.window, missed=missed))
        if missed:
            waits += 1
            fill(arrives)
            now = arrives + host_seconds
    return Outcome(now - head_start, waits, wire.fetched, len(wire.arrives), len(unasked & wanted))
