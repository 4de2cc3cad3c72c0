"""What the link can take, found out as it goes: how large a background request may be.

A request takes the link's round trip, the server's time and its bytes' share of the bandwidth; of these only the last
grows with its size. So the shortest request seen stands for the first two, and what a request takes beyond that is
what it, and those beside it, keep a touch waiting. The size is raised while that stays below TARGET_SECONDS and
lowered when it does not (as LEDBAT, RFC 6817, does with its window), which neither needs to know the bandwidth nor
takes a long round trip for a slow link.
"""

from __future__ import annotations

TARGET_SECONDS = 0.05
"""How long the background may keep a touch waiting. Pulled out of the air; one round trip of a good WAN."""
RAISE, LOWER = 1.25, 0.7
SMALLEST, LARGEST = 32 << 10, 1 << 20
FIRST = 128 << 10
"""Bytes of a background request before anything is known."""
FORGET = 1.0001
"""The shortest request is forgotten by so much a request: a route that has become longer is noticed in the end."""
WEIGHT = 0.2
"""Of the newest sample in the averages that are shown to people."""


class LinkEstimate:
    """Fed with finished requests. Not thread-safe."""

    def __init__(self) -> None:
        self.request_seconds = 0.0
        """Average over recent requests, whatever their size."""
        self.shortest_seconds = float("inf")
        self._size = float(FIRST)

    def __repr__(self) -> str:
        return f"<LinkEstimate {self.request_seconds:.4f} s a request, background {self.background_size()} bytes>"

    def finished(self, seconds: float, *, background: bool) -> None:
        """A request took so long."""
        self.request_seconds += (seconds - self.request_seconds) * (WEIGHT if self.request_seconds else 1.0)
        self.shortest_seconds = min(self.shortest_seconds * FORGET, seconds)
        if background:
            waited = seconds - self.shortest_seconds
            self._size = min(LARGEST, max(SMALLEST, self._size * (RAISE if waited < TARGET_SECONDS else LOWER)))

    def background_size(self) -> int:
        """Bytes that a background request should have."""
        return int(self._size)
