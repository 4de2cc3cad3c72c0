"""The one owner of all transfers: takes requests from the flight table, makes them in threads, lands what comes.

See docs/concurrency.md for the actors and for what each cancellation discards.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from imagefs.errors import CorruptObjectError, MissingObjectError, StoreError, UnavailableError
from imagefs.fetch.flights import Flight, FlightTable, Key, Priority, Request
from imagefs.fetch.link import LinkEstimate
from imagefs.image.index import BlockRef, ChunkRef
from imagefs.store.base import object_key

log = logging.getLogger(__name__)

Result = Any
"""A window's bytes, or a parsed index block."""
Transfer = Callable[[list[Flight]], list[Result]]
"""Makes one request, blocking, in a thread: for each flight its verified result or its CorruptObjectError.

Raises StoreError where the request as a whole failed.
"""
Landed = Callable[[Flight, Result], None]

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
    payload_bytes: int = 0
    chunks: int = 0
    corrupt: int = 0
    missing: int = 0
    unavailable: int = 0
    outages: int = 0


class Scheduler:
    """Flights in, landed results out. All methods but :meth:`run` are synchronous; one event loop."""

    def __init__(self, transfer: Transfer, landed: Landed, *, connections: int, origin: str) -> None:
        """``landed`` is called in the event loop for each result, before its waiters are woken."""
        self.link = LinkEstimate()
        self.table = FlightTable(connections, self.link)
        self.counters = Counters()
        self._transfer = transfer
        self._landed = landed
        self._origin = origin
        self._connections = connections
        self._limiter = trio.CapacityLimiter(connections)
        self._work = trio.Event()
        self._slack = trio.Event()
        self._pause = 0.0
        self._paused_until = -1.0
        self._quiet_from = -1.0

    def __repr__(self) -> str:
        return f"<Scheduler {self.table!r}, {'outage' if self._pause else 'store answers'}>"

    @property
    def in_outage(self) -> bool:
        """Whether the newest request was not answered."""
        return self._pause > 0

    def want(self, key: Key, what: str, ref: ChunkRef | BlockRef, priority: Priority) -> Flight:
        """A flight to wait for; see :meth:`FlightTable.want`."""
        flight = self.table.want(key, what, ref, priority)
        if priority == Priority.TOUCH:
            self._quiet_from = trio.current_time() + QUIET_SECONDS
        self._wake()
        return flight

    async def wait_for_slack(self, priority: Priority, most: int) -> None:
        """Return when fewer than ``most`` flights are queued under ``priority``: back-pressure for the sweep."""
        while self.table.queued(priority) >= most:
            await self._slack.wait()

    async def wait_until_idle(self) -> None:
        """Return when nothing is queued or flying."""
        while len(self.table):
            await self._slack.wait()

    def start(self, nursery: trio.Nursery) -> None:
        """Start the workers in ``nursery``. They end when it is cancelled, never by themselves."""
        for number in range(self._connections):
            nursery.start_soon(self._worker, name=f"fetch {number}")

    async def _worker(self) -> None:
        while True:
            request = self._next_request()
            if request is None:
                await self._wait_for_work()
                continue
            begun = time.perf_counter()
            try:
                # Abandoned on cancellation: what the thread still does is reading, and putting verified pages into a
                # sink that ignores them once it is closed.
                results = await trio.to_thread.run_sync(
                    partial(self._transfer, request.flights), limiter=self._limiter, abandon_on_cancel=True
                )
            except StoreError as error:
                self._failed(request, error)
            except Exception as error:
                # A fault of ours costs these chunks, not the mount under a running guest.
                log.exception("internal error (%s)", ", ".join(flight.what for flight in request.flights[:3]))
                reason = f"internal error: {type(error).__name__}: {error}"
                key = object_key(request.flights[0].place.pack.hex())
                self._failed(request, StoreError(reason, key=key, origin=self._origin))
            else:
                self._came(request, results, time.perf_counter() - begun)
            self._wake()

    def _next_request(self) -> Request | None:
        now = trio.current_time()
        # In an outage, one request at a time finds out whether the store is back.
        if self._pause and (self.table.requests or now < self._paused_until):
            return None
        return self.table.next_request(sweep=now >= self._quiet_from)

    async def _wait_for_work(self) -> None:
        """Until something changes, or until something that was too early is due."""
        now = trio.current_time()
        due = [at for at in (self._paused_until, self._quiet_from) if at > now]
        with trio.move_on_at(min(due, default=float("inf"))):
            await self._work.wait()

    def _wake(self) -> None:
        self._work.set()
        self._work = trio.Event()

    def _came(self, request: Request, results: list[Result], seconds: float) -> None:
        self._answered()
        size = sum(flight.place.length for flight in request.flights)
        self.counters.requests += 1
        self.counters.background_requests += request.background
        self.counters.payload_bytes += size
        self.link.finished(seconds, background=request.background)
        if not request.background:
            self._quiet_from = trio.current_time() + QUIET_SECONDS
        self._land(request, results)

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
        again = [f for f, result in zip(request.flights, results, strict=True) if self._once_more(f, result)]
        self.table.finish(request, again)
        self._slack.set()
        self._slack = trio.Event()
        for flight, result in zip(request.flights, results, strict=True):
            if flight in again:
                continue
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
