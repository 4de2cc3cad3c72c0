"""The one owner of all transfers: takes requests from the flight table, has them made, lands what comes.

See docs/concurrency.md for the actors and for what each cancellation discards.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import trio

from imagefs.errors import CorruptObjectError, MissingObjectError, StoreError, UnavailableError
from imagefs.fetch.flights import Flight, FlightTable, Key, Priority, Request, background_slots
from imagefs.fetch.link import LinkEstimate
from imagefs.fetch.threads import FetchThreads
from imagefs.image.index import BlockRef, ChunkRef
from imagefs.store.base import object_key

log = logging.getLogger(__name__)

Result = Any
"""A window's bytes, or a parsed index block."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What a request has brought."""

    results: list[Result]
    """For each flight its verified result, or its CorruptObjectError."""
    latency: float | None
    """Seconds from the request to the first byte of its answer; None where no request was needed."""
    seconds: float
    """To its last byte."""


Transfer = Callable[[list[Flight]], Brought]
"""Makes one request, blocking, in a thread. Raises StoreError where it failed as a whole."""
Landed = Callable[[Flight, Result], None]


class Runner(Protocol):
    """What makes requests: threads, or a test's idea of a link."""

    def submit(self, work: Callable[[], Brought], done: Callable[[Brought | Exception], None]) -> None:
        """Call ``work`` somewhere, then ``done`` with what came of it in the event loop. Returns at once."""


CORRUPT_ATTEMPTS = 3
"""A torn transfer or a bad proxy is cured by asking again; a damaged pack is not."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between attempts while the store refuses or resets: a guest goes on two seconds after the link at most. Where
nothing comes back at all, an attempt takes as long as the store's own time limits."""
QUIET_SECONDS = 0.25
"""How long nobody must have touched anything before the sweep goes on. A guest that has just started touches something
new every few milliseconds, and what it waits for is the link; the sweep leaves that alone until the guest has come to
rest."""


@dataclass(slots=True)
class Counters:
    """Since the mount; sizes in bytes, times in seconds."""

    requests: int = 0
    background_requests: int = 0
    hedged_requests: int = 0
    payload_bytes: int = 0
    chunks: int = 0
    corrupt: int = 0
    missing: int = 0
    unavailable: int = 0
    outages: int = 0


class Scheduler:
    """Flights in, landed results out. One event loop; what changes the table never awaits."""

    def __init__(
        self, transfer: Transfer, landed: Landed, runner: Runner | None = None, *, connections: int, origin: str
    ) -> None:
        """``landed`` is called in the event loop for each result, before its waiters are woken."""
        self.link = LinkEstimate(background_slots(connections))
        self.table = FlightTable(connections, self.link)
        self.counters = Counters()
        self._transfer = transfer
        self._landed = landed
        self._runner = runner
        self._origin = origin
        self._connections = connections
        self._work = trio.Event()
        self._slack = trio.Event()
        self._pause = 0.0
        self._paused_until = -1.0
        self._quiet_from = -1.0
        self._sleeps_until = float("inf")

    def __repr__(self) -> str:
        return f"<Scheduler {self.table!r}, {'outage' if self._pause else 'store answers'}>"

    @property
    def in_outage(self) -> bool:
        """Whether the newest request was not answered."""
        return self._pause > 0

    def want(self, key: Key, what: str, ref: ChunkRef | BlockRef, priority: Priority) -> Flight:
        """A flight to wait for; see :meth:`FlightTable.want`. Whoever wants a touch calls :meth:`dispatch` as well."""
        flight = self.table.want(key, what, ref, priority)
        if priority == Priority.TOUCH:
            self._quiet_from = trio.current_time() + QUIET_SECONDS
        else:
            self._work.set()
        return flight

    def dispatch(self) -> None:
        """Begin every request that may begin now: those of a touch without a turn of the event loop in between."""
        if self._runner is None:
            return
        now = trio.current_time()
        self._begin_what_may(now)
        # Otherwise the task sleeps on: a turn of the event loop for each touch would be in the way of its answer.
        if self._next_time(now) < self._sleeps_until:
            self._work.set()

    def _begin_what_may(self, now: float) -> None:
        self._hedge(now)
        # In an outage, one request at a time finds out whether the store is back.
        while not (self._pause and (self.table.busy or now < self._paused_until)):
            request = self.table.next_request(now, sweep=now >= self._quiet_from)
            if request is None:
                return
            self._begin(request)

    async def wait_for_slack(self, priority: Priority, most: int) -> None:
        """Return when fewer than ``most`` flights are queued under ``priority``: back-pressure for the sweep."""
        while self.table.queued(priority) >= most:
            await self._slack.wait()

    async def wait_until_idle(self) -> None:
        """Return when nothing is queued or flying."""
        while len(self.table):
            await self._slack.wait()

    async def run(self) -> None:
        """Make requests until cancelled. Those under way then are abandoned, what they bring is not looked at."""
        threads: FetchThreads[Brought] | None = None
        if self._runner is None:
            self._runner = threads = FetchThreads(self._connections)
        try:
            while True:
                now = trio.current_time()
                self._begin_what_may(now)
                self._sleeps_until = self._next_time(now)
                with trio.move_on_at(self._sleeps_until):
                    await self._work.wait()
                self._work = trio.Event()
        finally:
            self._runner = None
            if threads is not None:
                threads.close()

    def _begin(self, request: Request) -> None:
        assert self._runner is not None
        self._runner.submit(partial(self._transfer, request.flights), partial(self._ended, request))

    def _ended(self, request: Request, outcome: Brought | Exception) -> None:
        if isinstance(outcome, StoreError):
            self._failed(request, outcome)
        elif isinstance(outcome, Exception):
            # A fault of ours costs these chunks, not the mount under a running guest.
            named = ", ".join(flight.what for flight in request.flights[:3])
            log.error("internal error (%s)", named, exc_info=outcome)
            reason = f"internal error: {type(outcome).__name__}: {outcome}"
            key = object_key(request.flights[0].place.pack.hex())
            self._failed(request, StoreError(reason, key=key, origin=self._origin))
        else:
            self._came(request, outcome)
        self.dispatch()

    def _next_time(self, now: float) -> float:
        """When something that was too early becomes due."""
        due = [at for at in (self._paused_until, self._quiet_from, self.link.paced_until) if at > now]
        due += [at for request in self.table.requests if (at := self._late_at(request)) > now]
        return min(due, default=float("inf"))

    def _late_at(self, request: Request) -> float:
        """When a request becomes a straggler; never if nobody waits for it, or if it was made once more."""
        if self._pause or not any(
            f.priority == Priority.TOUCH and not f.hedged and not f.landed for f in request.flights
        ):
            return float("inf")
        return request.sample.sent + self.link.straggles_after(request.sample.size)

    def _hedge(self, now: float) -> None:
        """Ask once more, on another connection, for what is waited for and late. The first answer counts."""
        for request in self.table.requests:
            while self._late_at(request) <= now and (hedge := self.table.hedge(request, now)) is not None:
                self.counters.hedged_requests += 1
                self._begin(hedge)

    def _came(self, request: Request, brought: Brought) -> None:
        self._answered()
        now = trio.current_time()
        self.counters.requests += 1
        self.counters.background_requests += request.background
        self.counters.payload_bytes += request.sample.size
        if brought.latency is not None:
            self.link.ended(request.sample, now, brought.latency, brought.seconds)
        if not request.background:
            self._quiet_from = now + QUIET_SECONDS
        self._land(request, brought.results)

    def _failed(self, request: Request, error: StoreError) -> None:
        self.counters.requests += 1
        if not isinstance(error, UnavailableError):
            self._answered()
            self._land(request, [error] * len(request.flights))
            return
        self.counters.unavailable += 1
        if not self._pause:
            self.counters.outages += 1
            log.warning("%s; trying again until it answers", error)
        self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self._pause * 2))
        # Jitter, so that the hosts that one server has left do not come back as one.
        self._paused_until = trio.current_time() + self._pause * random.uniform(0.5, 1.0)
        self.table.finish(request, request.flights)

    def _land(self, request: Request, results: list[Result]) -> None:
        """Each flight by itself: landed, failed for good, or queued once more."""
        came = dict(zip(request.flights, results, strict=True))
        again = [f for f, result in came.items() if not f.landed and self._once_more(f, result)]
        landing = self.table.finish(request, again)
        self._slack.set()
        self._slack = trio.Event()
        for flight in landing:
            result = came[flight]
            if isinstance(result, StoreError):
                flight.fail(result)
            else:
                self.counters.chunks += 1
                self._landed(flight, result)
                flight.land(result)

    def _once_more(self, flight: Flight, result: Result) -> bool:
        if not isinstance(result, StoreError):
            return False
        if isinstance(result, MissingObjectError):
            self.counters.missing += 1
            log.error("%s (%s)", result, flight.what)
            return False
        if not isinstance(result, CorruptObjectError):
            return False
        self.counters.corrupt += 1
        flight.attempts += 1
        log.error("%s (%s, attempt %d of %d)", result, flight.what, flight.attempts, CORRUPT_ATTEMPTS)
        return flight.attempts < CORRUPT_ATTEMPTS

    def _answered(self) -> None:
        if self._pause:
            log.warning("%s answers again", self._origin)
            self._pause = 0.0
