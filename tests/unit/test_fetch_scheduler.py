"""The scheduler over a simulated link: promotion, coalescing, hedging, yielding, and what cancelling leaves behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from imagefs.errors import CorruptObjectError, UnavailableError
from imagefs.fetch.flights import Flight, Priority
from imagefs.fetch.scheduler import CORRUPT_ATTEMPTS, QUIET_SECONDS, Brought, Result, Scheduler
from tests.unit.simulated_link import SimulatedLink
from tests.unit.test_fetch_link import CHUNK, FAR, MBIT, chunk, filling

ROUND_TRIP = 0.04


class Store:
    """What answers: a result for each flight, unless the test says otherwise."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.landed: list[int] = []
        self.answer: Callable[[Flight], Result] = lambda flight: b"window %d" % flight.key[1]

    def transfer(self, flights: list[Flight]) -> Brought:
        self.asked.append([flight.key[1] for flight in flights])
        return Brought([self.answer(flight) for flight in flights], 0.0, 0.0)


@asynccontextmanager
async def scheduling(link: SimulatedLink, store: Store, connections: int = 16) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(
        store.transfer, lambda f, r: store.landed.append(f.key[1]), link, connections=connections, origin="simulated"
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        nursery.start_soon(scheduler.run, name="scheduler")
        yield scheduler
        nursery.cancel_scope.cancel()


def want(scheduler: Scheduler, number: int, priority: Priority) -> Flight:
    return scheduler.want(("memory", number), f"window {number}", chunk(number), priority)


def touch(scheduler: Scheduler, number: int) -> Flight:
    flight = want(scheduler, number, Priority.TOUCH)
    scheduler.dispatch()
    return flight


class Turns(trio.abc.Instrument):
    """Counts how often the scheduler's task has its turn."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task.name == "scheduler"


async def test_touches_side_by_side_in_a_pack_share_a_request(autojump_clock: MockClock) -> None:
    store = Store()
    async with scheduling(SimulatedLink(1000 * MBIT, ROUND_TRIP), store) as scheduler:
        await touch(scheduler, 1).wait()
        scheduler.link.filling, scheduler.link.bandwidth = False, 1000.0 * MBIT
        flights = [want(scheduler, number, Priority.TOUCH) for number in (7, 8, 9, 20)]
        scheduler.dispatch()
        assert [await flight.wait() for flight in flights] == [b"window 7", b"window 8", b"window 9", b"window 20"]
    # Where their transfer takes next to no time. On a slow link each would wait for the others.
    assert sorted(store.asked) == [[1], [7, 8, 9], [20]]


async def test_a_touch_begins_before_control_returns(autojump_clock: MockClock) -> None:
    """No task switch lies between a guest's touch and its request."""
    link = SimulatedLink(100 * MBIT, ROUND_TRIP)
    async with scheduling(link, Store()) as scheduler:
        await trio.sleep(1)
        touch(scheduler, 1)
        assert link.sizes == [CHUNK]


async def test_touches_do_not_wake_the_scheduler_one_by_one(autojump_clock: MockClock) -> None:
    """It would be a turn of the event loop for each, in the way of their answers."""
    turns = Turns()
    async with scheduling(SimulatedLink(1000 * MBIT, 0.001), Store()) as scheduler:
        await touch(scheduler, 1).wait()
        trio.lowlevel.add_instrument(turns)
        for number in range(2, 102):
            await touch(scheduler, number).wait()
        assert turns.count < 10


async def test_queued_flights_are_promoted_and_flying_ones_awaited(autojump_clock: MockClock) -> None:
    async with filling(SimulatedLink(10 * MBIT, ROUND_TRIP)) as filled:
        await trio.sleep(4)
        table = filled.scheduler.table
        queued = next(f for f in reversed(table.flights()) if not f.flying)
        assert queued.priority == Priority.SWEEP
        seconds = await filled.touch(queued.key[1])
        assert seconds < 1.3 * (ROUND_TRIP + CHUNK / filled.link.rate)
        await trio.sleep(2)
        flying = next(f for f in table.flights() if f.flying)
        requests = len(filled.link.sizes)
        await filled.touch(flying.key[1])
        assert flying.priority == Priority.TOUCH
        assert len(filled.link.sizes) == requests


async def test_the_sweep_holds_back_while_someone_touches(autojump_clock: MockClock) -> None:
    async with filling(SimulatedLink(10 * MBIT, ROUND_TRIP)) as filled:
        await trio.sleep(2)
        before = len(filled.link.sizes)
        await filled.touch(FAR)
        await trio.sleep(QUIET_SECONDS * 0.9)
        assert len(filled.link.sizes) == before + 1
        assert not filled.scheduler.table.busy
        await trio.sleep(QUIET_SECONDS)
        assert filled.scheduler.table.busy


async def test_a_straggler_is_asked_for_again_and_lands_once(autojump_clock: MockClock) -> None:
    store = Store()
    link = SimulatedLink(100 * MBIT, ROUND_TRIP)
    async with scheduling(link, store) as scheduler:
        await touch(scheduler, 1).wait()
        link.stuck = lambda number: number == 1
        begun = trio.current_time()
        flight = touch(scheduler, 5)
        assert await flight.wait() == b"window 5"
        assert trio.current_time() - begun < 1
        assert scheduler.counters.hedged_requests == 1
        assert link.sizes == [CHUNK] * 3
        assert store.landed == [1, 5]
        # The one that never comes holds its connection, and nothing else: it does not count as a touch.
        assert len(scheduler.table) == 0
        assert not scheduler.table.touched
        assert len(scheduler.table.requests) == 1


async def test_both_answers_to_a_hedge_come_and_one_counts(autojump_clock: MockClock) -> None:
    store = Store()
    link = SimulatedLink(100 * MBIT, ROUND_TRIP)
    async with scheduling(link, store) as scheduler:
        await touch(scheduler, 1).wait()
        link.round_trip = 1.0
        flight = touch(scheduler, 5)
        await trio.sleep(0.9)
        assert flight.requests == 2
        assert touch(scheduler, 5) is flight
        await trio.sleep(3)
        assert store.asked == [[1], [5], [5]]
        assert store.landed == [1, 5]
        assert not scheduler.table.busy


@pytest.mark.expect_log("torn")
async def test_a_hedge_that_brings_damage_is_not_the_end(autojump_clock: MockClock) -> None:
    """The other request is still on its way, and only what it brings decides."""
    store = Store()
    link = SimulatedLink(100 * MBIT, ROUND_TRIP)

    def answer(flight: Flight) -> Result:
        return CorruptObjectError("torn", key="k", origin="o") if len(store.asked) == 2 else b"good"

    store.answer = answer
    async with scheduling(link, store) as scheduler:
        await touch(scheduler, 1).wait()
        link.round_trip = 1.0
        assert await touch(scheduler, 5).wait() == b"good"
        assert store.landed == [1, 5]
        assert scheduler.counters.corrupt == 1 < CORRUPT_ATTEMPTS


@pytest.mark.expect_log("trying again until it answers", "answers again")
async def test_nothing_is_hedged_in_an_outage(autojump_clock: MockClock) -> None:
    store = Store()
    down = True

    def transfer(flights: list[Flight]) -> Brought:
        if down:
            raise UnavailableError("connection refused", key="k", origin="o")
        return store.transfer(flights)

    link = SimulatedLink(100 * MBIT, ROUND_TRIP)
    scheduler = Scheduler(transfer, lambda f, r: None, link, connections=8, origin="simulated")
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        nursery.start_soon(scheduler.run, name="scheduler")
        flights = [want(scheduler, number, Priority.TOUCH) for number in (10, 20, 30)]
        await trio.sleep(20)
        assert scheduler.in_outage
        assert scheduler.counters.hedged_requests == 0
        # Three at once, and then one at a time, at most two seconds apart.
        assert 3 + 20 / 2 - 2 < len(link.sizes) < 3 + 20
        down = False
        for flight in flights:
            await flight.wait()
        assert scheduler.counters.outages == 1
        nursery.cancel_scope.cancel()


async def test_who_leaves_strands_nobody(autojump_clock: MockClock) -> None:
    store = Store()
    async with scheduling(SimulatedLink(100 * MBIT, ROUND_TRIP), store) as scheduler:
        flight = touch(scheduler, 3)
        with trio.move_on_after(ROUND_TRIP / 2) as scope:
            await flight.wait()
        assert scope.cancelled_caught
        assert await want(scheduler, 3, Priority.NEIGHBOUR).wait() == b"window 3"
        assert store.asked == [[3]]


async def test_what_comes_after_the_end_is_not_looked_at(autojump_clock: MockClock) -> None:
    store = Store()
    link = SimulatedLink(100 * MBIT, ROUND_TRIP)
    scheduler = Scheduler(store.transfer, lambda f, r: None, link, connections=8, origin="simulated")
    async with trio.open_nursery() as nursery:
        await nursery.start(link.run)
        async with trio.open_nursery() as inner:
            inner.start_soon(scheduler.run)
            touch(scheduler, 3)
            await trio.sleep(ROUND_TRIP / 2)
            inner.cancel_scope.cancel()
        touch(scheduler, 4)
        scheduler.dispatch()
        await trio.sleep(1)
        assert store.asked == [[3]]
        nursery.cancel_scope.cancel()
