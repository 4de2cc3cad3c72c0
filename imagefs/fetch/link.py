"""What the link is like, found out as it goes: its round trip, its bandwidth, and from these how much to ask for.

The model is that of BBR (draft-cardwell-iccrg-bbr): the shortest time to the first byte of an answer is the round trip
(the server's time included), the highest rate at which requests end is the bandwidth, and the product of both is what
fills the link without queueing before it. Queues are what makes a touch late: it is answered behind
whatever was asked for before it. So the background never has more under way than that product and a little.

A rate that was measured while there was too little to do says nothing about the link: it can raise the estimate, not
lower it. The round trip is forgotten after a while, and then measured anew with the link nearly drained.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SMALLEST, LARGEST = 32 << 10, 2 << 20
"""Bytes of a background request."""
FIRST_WINDOW = 256 << 10
"""Bytes under way before anything is known; doubled from there for as long as the rate follows."""
QUEUE_SHARE, QUEUE_SECONDS = 0.05, 0.0005
"""How long what is under way may queue: this share of the round trip, or so many seconds where that is more. Without
any queue the link would idle at each jitter."""
REQUEST_SECONDS = 0.001
"""Of the link's time that a background request takes at least: on a fast link smaller requests cost more processor time
than they save anyone's waiting."""
NEAR, NEAR_SECONDS, NEAR_SIZE = 0.002, 0.005, 256 << 10
"""On a link with a shorter round trip this machine sets the pace: requests are of so many seconds there, up to so many
bytes. With small ones the rate stays low, and with the rate the requests (on loopback they stayed at 45 KB)."""
HANDLING_GAIN, HANDLED = 1 / 16, 2 << 20
"""Weight of one request in the average time that this machine takes for one. A busy machine takes as long as a far
link, and what waits for a processor is no queue in the network. Without it the window follows a falling rate: 1 Gbit/s
and 10 ms became 0.3 Gbit/s with 10 ms for each request. Up to so many bytes: a processor that cannot follow takes
longer the more it is given."""
AT_LEAST = 4
"""Requests under way, even where fewer would fill the link: while one is decompressed, others are transferred."""
PACE, PACE_FILLING = 1.05, 2.0
"""Background requests begin so that what they bring would need this much of the bandwidth: those that begin together
would also end together, and leave the link idle until what replaces them begins to come."""
BURST_SECONDS = 0.002
"""What pacing forgives: no timer needs to be finer, and a late one is made up for."""
GROWTH = 1.2
"""By how much the rate must have risen in a period for the window to be doubled once more."""
PATIENCE = 3
"""Periods without such a rise after which the link is taken for full."""
PERIOD_TRIPS, PERIOD_SECONDS = 4, 0.02
"""How long the rate is measured at a time: so many round trips of at least so many seconds. Requests end in bunches,
and what a bunch seems to say of the rate is wrong by its share of the period."""
PERIODS, NEAR_PERIODS = 4, 32
"""Of which the highest rate is believed. On a near link it falls whenever other programs want the processor, and what
follows from it must not fall as well: then it would stay low (7 MB/s of 120, on a machine with a load of 11)."""
ROUND_TRIP_SECONDS, ROUND_TRIP_JITTER = 15.0, 1.05
"""The round trip is measured anew when for so long no answer has come as quickly, give or take."""
LONGER = 1.25
"""A round trip that has grown by so much is that of another link."""
STRAGGLER, STRAGGLER_SECONDS = 3.0, 0.1
"""A request is late when it takes so many times what it should, and so many seconds more."""


@dataclass(slots=True)
class Sample:
    """One request under way. Times are seconds of the scheduler's clock."""

    sent: float
    size: int
    alone: bool
    """Whether nothing else was under way: then its answer cannot have waited for others."""


class LinkEstimate:
    """Told of requests as they are sent and as they end. Synchronous; not thread-safe."""

    def __init__(self, slots: int = 8) -> None:
        """``slots`` is how many requests the background may have under way."""
        self.round_trip = 0.0
        """Seconds from a request to the first byte of its answer on a link without a queue; 0 while unknown."""
        self.bandwidth = 0.0
        """Bytes per second that this mount was seen to get; 0 while unknown."""
        self.filling = True
        """Whether it is still to be found out how much the link takes."""
        self.paced_until = 0.0
        """Seconds of the scheduler's clock before which the background begins no further request."""
        self._pieces = max(2, slots * 2 // 3)
        """Requests that the window is made of. Fewer than slots: requests are whole chunks, and so smaller."""
        self.handling = 0.0
        """Seconds that a request takes beside its time on the wire: threads, decompression, landing; an average."""
        self._measured_at = 0.0
        self._window = float(FIRST_WINDOW)
        self._flat = 0
        self._rates: deque[float] = deque(maxlen=NEAR_PERIODS)
        self._begun = -1.0
        self._bytes = 0
        self._starved = True

    def __repr__(self) -> str:
        return (
            f"<LinkEstimate {self.round_trip * 1e3:.3g} ms, {self.bandwidth * 8e-6:.3g} Mbit/s, "
            f"{self.request_size()} of {self.window()} bytes a request>"
        )

    def sent(self, now: float, size: int, *, background: bool, alone: bool) -> Sample:
        """A request of ``size`` bytes begins. ``alone``: nothing else is under way."""
        if background and self.bandwidth:
            # On a near link there is next to nothing to idle for, and each wait costs a timer.
            pace = (PACE_FILLING if self.filling or self._near else PACE) * self.bandwidth
            self.paced_until = max(self.paced_until, now - BURST_SECONDS) + size / pace
        return Sample(now, size, alone)

    def starved(self) -> None:
        """The link could take more, and there is nothing for it, or nothing that may go now."""
        self._starved = True

    def ended(self, sample: Sample, now: float, latency: float, seconds: float) -> None:
        """The first byte of its answer came ``latency`` seconds after it had been sent, the last one after ``seconds``,
        and it is done by ``now``."""
        self.handling += HANDLING_GAIN * (max(0.0, now - sample.sent - seconds) - self.handling)
        self._note_round_trip(sample, now, latency)
        self._bytes += sample.size
        passed = now - self._begun
        if self._begun < 0:
            self._begin_period(now)
        elif passed >= (1 if self.filling else PERIOD_TRIPS) * max(self.round_trip, PERIOD_SECONDS):
            self._note_rate(self._bytes / passed)
            self._begin_period(now)

    def window(self) -> int:
        """Bytes that the background may have under way, all its requests together."""
        if self.filling:
            return int(self._window)
        queue = max(QUEUE_SHARE * self.round_trip, QUEUE_SECONDS)
        # What a request takes beyond the round trip is its own transfer: the window is that much larger.
        fills = self.bandwidth * (self.round_trip + queue) * self._pieces / (self._pieces - 1)
        handled = min(HANDLED, self.bandwidth * self.handling)
        return int(max(fills + handled, AT_LEAST * self._least(), 2 * SMALLEST))

    def request_size(self) -> int:
        """Bytes that a background request should have."""
        share = max(self.window() / self._pieces, self._least())
        return int(min(LARGEST, max(SMALLEST, share)))

    @property
    def _near(self) -> bool:
        return 0 < self.round_trip < NEAR

    def _least(self) -> float:
        """Bytes that a request should have whatever the window, for what it costs to make one."""
        near = min(NEAR_SIZE, self.bandwidth * NEAR_SECONDS) if self._near else 0.0
        return max(self.bandwidth * REQUEST_SECONDS, near)

    def expected_seconds(self, size: int) -> float:
        """How long a request of ``size`` bytes takes where nothing is in its way."""
        return self.round_trip + (size / self.bandwidth if self.bandwidth else 0.0)

    def straggles_after(self, size: int) -> float:
        """Seconds after which a request of ``size`` bytes is late enough to be made once more."""
        expected = self.expected_seconds(size + self.window())
        return max(STRAGGLER * expected, expected + STRAGGLER_SECONDS) if self.round_trip else float("inf")

    def drains(self, now: float) -> bool:
        """Whether the link is to be drained for a moment, because the round trip was last seen too long ago."""
        return self.round_trip > 0 and now - self._measured_at > ROUND_TRIP_SECONDS

    def _note_round_trip(self, sample: Sample, now: float, latency: float) -> None:
        if not self.round_trip or latency <= self.round_trip or (sample.alone and self.drains(now)):
            if self.round_trip and latency > LONGER * self.round_trip:
                # What was under way filled the shorter link only: how much this one takes is to be found out anew.
                self.filling, self._flat, self._window = True, 0, float(self.window())
                self.bandwidth = 0.0
                self._rates.clear()
            self.round_trip = max(latency, 1e-6)
            self._measured_at = now
        elif latency <= self.round_trip * ROUND_TRIP_JITTER:
            self._measured_at = now

    def _begin_period(self, now: float) -> None:
        self._begun, self._bytes, self._starved = now, 0, False

    def _note_rate(self, rate: float) -> None:
        """Of the period that ends now. Where there was too little to do, it says what the link takes at least."""
        if self._starved:
            self.bandwidth = max(self.bandwidth, rate)
            return
        if self.filling:
            if rate >= GROWTH * self.bandwidth:
                self._flat = 0
                self._window = min(2 * self._window, self._pieces * LARGEST)
            else:
                self._flat += 1
            self.filling = self._flat < PATIENCE
        self._rates.append(rate)
        self.bandwidth = max(self._rates if self._near else list(self._rates)[-PERIODS:])
