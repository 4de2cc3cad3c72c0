"""What is to be fetched, and in which order: decisions only, no I/O and no waiting.

A *flight* is one chunk (or index block) on its way. There is at most one for a key, whoever asks; it belongs to the
table and not to the first who asked, so that no one who leaves strands the others.

Invariants, kept because no method awaits: a flight is either queued under exactly one priority or flying; a key is in
the table until its flight has landed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import trio

from imagefs.fetch.link import LinkEstimate
from imagefs.image.index import BlockRef, ChunkRef, PayloadRef

RESERVED = 4
"""Requests that only a touch may use; of fewer than eight connections half."""
MAX_COALESCED = 64
"""Chunks of one request at most: bounds the memory that a landing takes."""


Key = tuple[str, Any]
"""A window: its stream and number. An index block: ``INDEX`` and its digest."""
INDEX = "index"


class Priority(IntEnum):
    """Lower is sooner."""

    TOUCH = 0
    WORKING_SET = 1
    NEIGHBOUR = 2
    SWEEP = 3


class Flight:
    """One chunk or index block on its way. ``await wait()`` for it; its result is bytes of a window, or a block."""

    def __init__(self, key: Key, what: str, ref: ChunkRef | BlockRef, priority: Priority) -> None:
        self.key = key
        self.what = what
        self.ref = ref
        self.priority = priority
        self.waiters = 0
        self.attempts = 0
        """Times that it came back corrupt."""
        self.flying = False
        self._landed = trio.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "flying" if self.flying else "queued"
        return f"<Flight {self.what}: {self.priority.name.lower()}, {state}, {self.waiters} waiting>"

    @property
    def place(self) -> PayloadRef:
        return self.ref.place

    async def wait(self) -> Any:
        """The result, or its error raised anew for each waiter. Cancelling leaves the flight to the others."""
        self.waiters += 1
        try:
            await self._landed.wait()
        finally:
            self.waiters -= 1
        if self._error is not None:
            # One object for all waiters: without the traceback of those who have raised it before.
            raise self._error.with_traceback(None)
        return self._result

    def land(self, result: Any) -> None:
        self._result = result
        self._landed.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._landed.set()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request to the store: flights whose payloads follow each other in one pack."""

    flights: list[Flight]
    background: bool
    """Whether it took a background slot. A flight may be promoted while it flies, its request stays what it was."""


class FlightTable:
    """All flights of one image. Synchronous; one event loop."""

    def __init__(self, connections: int, link: LinkEstimate) -> None:
        self._connections = connections
        self._background_limit = max(1, connections - min(RESERVED, connections // 2))
        self._link = link
        self._flights: dict[Key, Flight] = {}
        self._queues: dict[Priority, OrderedDict[Key, Flight]] = {p: OrderedDict() for p in Priority}
        self._requests = 0
        self._background = 0

    def __repr__(self) -> str:
        queued = ", ".join(f"{len(queue)} {p.name.lower()}" for p, queue in self._queues.items())
        return f"<FlightTable {self._requests} requests, queued: {queued}>"

    def __len__(self) -> int:
        return len(self._flights)

    def queued(self, priority: Priority) -> int:
        """Flights waiting under this priority."""
        return len(self._queues[priority])

    @property
    def requests(self) -> int:
        """Requests under way."""
        return self._requests

    def flights(self) -> list[Flight]:
        """All that is queued or flying."""
        return list(self._flights.values())

    def want(self, key: Key, what: str, ref: ChunkRef | BlockRef, priority: Priority) -> Flight:
        """The flight of ``key``, promoted if it was queued with less haste, or a new one."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(key, what, ref, priority)
            self._queues[priority][key] = flight
        elif priority < flight.priority:
            if not flight.flying:
                del self._queues[flight.priority][key]
                self._queues[priority][key] = flight
            flight.priority = priority
        return flight

    @property
    def touched(self) -> bool:
        """Whether someone's touch is queued or under way."""
        return bool(self._queues[Priority.TOUCH]) or self._requests > self._background

    def next_request(self, *, sweep: bool = True) -> Request | None:
        """The next request to make, its flights flying from now on; None if none may be made now.

        A working set and neighbours fill the link while a touch is on its round trip; the sweep waits until nobody
        touches, and with ``sweep=False`` longer.
        """
        if self._requests >= self._connections:
            return None
        touch = self._queues[Priority.TOUCH]
        if touch:
            _, flight = touch.popitem(last=False)
            return self._take([flight], background=False)
        if self._background < self._background_limit:
            for priority in (Priority.WORKING_SET, Priority.NEIGHBOUR):
                if self._queues[priority]:
                    return self._take(self._coalesce(self._queues[priority]), background=True)
            if self._queues[Priority.SWEEP] and sweep and not self.touched:
                return self._take(self._coalesce(self._queues[Priority.SWEEP]), background=True)
        return None

    def finish(self, request: Request, again: Collection[Flight] = ()) -> None:
        """A request is over. Flights in ``again`` are queued anew, first of their priority; the others leave the table.

        Telling the waiters of those that leave is up to the caller.
        """
        self._requests -= 1
        self._background -= request.background
        for flight in reversed(request.flights):
            flight.flying = False
            if flight in again:
                queue = self._queues[flight.priority]
                queue[flight.key] = flight
                queue.move_to_end(flight.key, last=False)
            else:
                del self._flights[flight.key]

    def _take(self, flights: list[Flight], *, background: bool) -> Request:
        for flight in flights:
            flight.flying = True
        self._requests += 1
        self._background += background
        return Request(flights, background)

    def _coalesce(self, queue: OrderedDict[Key, Flight]) -> list[Flight]:
        """The first of the queue, and those behind it whose payloads follow its own in the same pack."""
        _, first = queue.popitem(last=False)
        flights = [first]
        if isinstance(first.ref, BlockRef):
            return flights
        size = first.place.length
        end = first.place.offset + size
        room = self._link.background_size()
        while queue and len(flights) < MAX_COALESCED:
            key, following = next(iter(queue.items()))
            place = following.place
            joins = isinstance(following.ref, ChunkRef) and place.pack == first.place.pack and place.offset == end
            if not joins or size + place.length > room:
                break
            del queue[key]
            flights.append(following)
            size += place.length
            end += place.length
        return flights
