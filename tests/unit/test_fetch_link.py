"""What the link's estimate makes of a link, in simulated time: how full it is, and what a touch waits for meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from imagefs.fetch.flights import Flight, Priority
from imagefs.fetch.link import LinkEstimate
from imagefs.fetch.scheduler import Brought, Scheduler
from imagefs.image.index import ChunkRef, PayloadRef
from tests.unit.simulated_link import SimulatedLink

CHUNK = 26_000
MBIT = 125_000
FAR = 1_000_000


def chunk(number: int, size: int = CHUNK) -> ChunkRef:
    return ChunkRef(number.to_bytes(32, "big"), PayloadRef(bytes(32), number * size, size), 1)


@dataclass
class Filled:
    """A scheduler that is kept busy over a link."""

    link: SimulatedLink
    scheduler: Scheduler
    landed: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, since: float) -> float:
        """Bytes a second since then."""
        return sum(size for at, size in self.landed if at > since) / (trio.current_time() - since)

    async def touch(self, number: int) -> float:
        """Seconds until it is here."""
        begun = trio.current_time()
        flight = self.scheduler.want(("memory", number), f"window {number}", chunk(number), Priority.TOUCH)
        self.scheduler.dispatch()
        await flight.wait()
        return trio.current_time() - begun


@asynccontextmanager
async def filling(link: SimulatedLink, connections: int = 16) -> AsyncIterator[Filled]:
    def note(flight: Flight, result: object) -> None:
        filled.landed.append((trio.current_time(), flight.place.length))

    async def sweep() -> None:
        number = 0
        while True:
            await scheduler.wait_for_slack(Priority.SWEEP, 256)
            while scheduler.table.queued(Priority.SWEEP) < 256:
                scheduler.want(("memory", number), f"window {number}", chunk(number), Priority.SWEEP)
                number += 1

    scheduler = Scheduler(
        lambda flights: Brought([b""] * len(flights), 0.0, 0.0), note, link, connections=connections, origin="simulated"
    )
    filled = Filled(link, scheduler)
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        nursery.start_soon(scheduler.run)
        nursery.start_soon(sweep)
        yield filled
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fair", [True, False], ids=["fair", "fifo"])
@pytest.mark.parametrize(("mbit", "round_trip"), [(10, 0.15), (100, 0.04)])
async def test_the_link_is_full_and_a_touch_hardly_later(
    mbit: float, round_trip: float, fair: bool, autojump_clock: MockClock
) -> None:
    async with filling(SimulatedLink(mbit * MBIT, round_trip, fair)) as filled:
        await trio.sleep(max(30 * round_trip, 0.6))
        since = trio.current_time()
        await trio.sleep(20 * round_trip)
        assert filled.rate(since) > 0.95 * filled.link.rate
        link = filled.scheduler.link
        assert link.bandwidth == pytest.approx(filled.link.rate, rel=0.1)
        assert link.round_trip == pytest.approx(round_trip, rel=0.1)
        waits = []
        for number in range(12):
            waits.append(await filled.touch(FAR + 10 * number))
            await trio.sleep(0.5)
        waits.sort()
        alone = round_trip + CHUNK / filled.link.rate
        assert waits[6] < (1.2 if fair else 1.3) * alone
        assert waits[-1] < 2 * alone


async def test_a_link_that_changes_is_followed(autojump_clock: MockClock) -> None:
    async with filling(SimulatedLink(50 * MBIT, 0.02)) as filled:
        await trio.sleep(3)
        filled.link.rate = 10 * MBIT
        await trio.sleep(6)
        assert filled.scheduler.link.bandwidth == pytest.approx(filled.link.rate, rel=0.15)
        filled.link.round_trip = 0.2
        await trio.sleep(30)
        assert filled.scheduler.link.round_trip > 0.15
        since = trio.current_time()
        await trio.sleep(4)
        assert filled.rate(since) > 0.9 * filled.link.rate


async def test_a_round_trip_that_becomes_shorter_is_seen_at_once(autojump_clock: MockClock) -> None:
    async with filling(SimulatedLink(20 * MBIT, 0.1)) as filled:
        await trio.sleep(3)
        filled.link.round_trip = 0.02
        await trio.sleep(1)
        assert filled.scheduler.link.round_trip < 0.03


def test_on_a_near_link_requests_do_not_stay_small() -> None:
    """Where a request takes its time in this process, its size decides the rate: it must not follow from it."""
    link, now = LinkEstimate(12), 0.0
    for _ in range(400):
        window = link.window()
        now += 0.004 + window / 250e6
        sample = link.sent(now, window, background=True, alone=False)
        link.ended(sample, now, 0.0003, 0.0003)
    assert link.request_size() > 200 << 10


@pytest.mark.parametrize(("round_trip", "handling", "share"), [(0.01, 0.01, 0.95), (0.0005, 0.04, 0.35)])
async def test_a_busy_machine_is_not_taken_for_a_slow_link(
    round_trip: float, handling: float, share: float, autojump_clock: MockClock
) -> None:
    """What waits for a processor is under way, but no touch is behind it on the link."""
    async with filling(SimulatedLink(1000 * MBIT, round_trip, handling=handling)) as filled:
        await trio.sleep(2)
        since = trio.current_time()
        await trio.sleep(1)
        assert filled.rate(since) > share * filled.link.rate
        assert filled.scheduler.link.handling == pytest.approx(handling, rel=0.05)


def test_little_to_do_says_nothing_about_the_link() -> None:
    link = LinkEstimate()
    now = 0.0

    def period(rate: float, *, starved: bool) -> None:
        nonlocal now
        for _ in range(20):
            now += 0.01
            sample = link.sent(now - 0.01, int(rate / 100), background=True, alone=True)
            link.ended(sample, now, 0.01, 0.01)
            if starved:
                link.starved()

    for _ in range(10):
        period(1e6, starved=False)
    for _ in range(10):
        period(1e3, starved=True)
    assert link.bandwidth == pytest.approx(1e6, rel=0.1)
    for _ in range(10):
        period(1e5, starved=False)
    assert link.bandwidth == pytest.approx(1e5, rel=0.1)
