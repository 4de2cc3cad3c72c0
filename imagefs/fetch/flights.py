"""What is to be fetched, and in which order: decisions only, no I/O and no waiting.

A *flight* is one chunk (or index block) on its way. There is at most one for a key, whoever asks; it belongs to the
table and not to the first who asked, so that no one who leaves strands the others. A *request* carries flights. A
flight that someone waits for may be in two requests at a time, when the first is late: whichever ends first lands it.

Invariants, kept because no method awaits: a flight is either queued under exactly one priority or in one request or
two; a key is in the table until its flight has landed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import trio

from imagefs.fetch.link import LinkEstimate, Sample
from imagefs.image.index import BlockRef, ChunkRef, PayloadRef

RESERVED = 4
"""Requests that only a touch may use; of fewer than eight connections half."""
MAX_COALESCED = 128
"""Chunks of one request at most: bounds the memory that a landing takes."""


Key = tuple[str, Any]
"""A window: its stream and number. An index block: ``INDEX`` and its digest."""
INDEX = "index"


class Priority(IntEnum):
    """Lower is sooner."""

    TOUCH = 0
    WORKING_SET = 1
    NEIGHBOUR = 2
    LIKELY = 3
    SWEEP = 4


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
        self.requests = 0
        """Requests that it is in."""
        self.hedged = False
        """Whether it was asked for a second time because the first took too long."""
        self._landed = trio.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "twice under way" if self.requests > 1 else "under way" if self.requests else "queued"
        return f"<Flight {self.what}: {self.priority.name.lower()}, {state}, {self.waiters} waiting>"

    @property
    def flying(self) -> bool:
        return self.requests > 0

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

    @property
    def landed(self) -> bool:
        """Whether it has a result or an error."""
        return self._landed.is_set()

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
    sample: Sample

    def __repr__(self) -> str:
        return f"<Request {self.statistics(self.sample.sent)}>"

    def statistics(self, now: float) -> dict[str, Any]:
        """For people: what is asked for, why, and since when (JSON values, seconds)."""
        return {
            "what": self.flights[0].what,
            "chunks": len(self.flights),
            "bytes": self.sample.size,
            "why": min(flight.priority for flight in self.flights).name.lower(),
            "waiting": sum(flight.waiters for flight in self.flights),
            "again": any(flight.hedged for flight in self.flights),
            "seconds": round(now - self.sample.sent, 3),
        }

    @property
    def hedgeable(self) -> list[Flight]:
        """What someone waits for, and what was asked for only once."""
        return [f for f in self.flights if f.priority == Priority.TOUCH and not f.hedged and not f.landed]


class FlightTable:
    """All flights of one image. Synchronous; one event loop."""

    def __init__(self, connections: int, link: LinkEstimate | None = None) -> None:
        self._connections = connections
        self._background_limit = background_slots(connections)
        self._link = link or LinkEstimate(self._background_limit)
        self._flights: dict[Key, Flight] = {}
        self._queues: dict[Priority, OrderedDict[Key, Flight]] = {p: OrderedDict() for p in Priority}
        self._requests: dict[Request, None] = {}
        self._background = 0
        self._background_bytes = 0
        self._touches = 0

    def __repr__(self) -> str:
        queued = ", ".join(f"{len(queue)} {p.name.lower()}" for p, queue in self._queues.items())
        return f"<FlightTable {len(self._requests)} requests, queued: {queued}>"

    def __len__(self) -> int:
        return len(self._flights)

    def queued(self, priority: Priority) -> int:
        """Flights waiting under this priority."""
        return len(self._queues[priority])

    @property
    def requests(self) -> list[Request]:
        """Those under way, the oldest first."""
        return list(self._requests)

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._requests)

    @property
    def background_bytes(self) -> int:
        """Payload of the background requests under way."""
        return self._background_bytes

    def flights(self) -> list[Flight]:
        """All that is queued or flying."""
        return list(self._flights.values())

    def want(self, key: Key, what: str, ref: ChunkRef | BlockRef, priority: Priority) -> Flight:
        """The flight of ``key``, promoted if it was queued with less haste, or a new one."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight(key, what, ref, priority)
            self._queues[priority][key] = flight
            self._touches += priority == Priority.TOUCH
        elif priority < flight.priority:
            if not flight.flying:
                del self._queues[flight.priority][key]
                self._queues[priority][key] = flight
            flight.priority = priority
            self._touches += priority == Priority.TOUCH
        return flight

    @property
    def touched(self) -> bool:
        """Whether someone's touch is queued or under way."""
        return self._touches > 0

    def next_request(self, now: float = 0.0, *, sweep: bool = True) -> Request | None:
        """The next request to make, its flights flying from now on; None if none may be made now.

        A working set and neighbours fill the link while a touch is on its round trip; the sweep waits until nobody
        touches, and with ``sweep=False`` longer.
        """
        if len(self._requests) >= self._connections:
            return None
        if self._queues[Priority.TOUCH]:
            return self._take(self._coalesce(self._queues[Priority.TOUCH]), now, background=False)
        if not self._room_for_background(now):
            return None
        for priority in (Priority.WORKING_SET, Priority.NEIGHBOUR, Priority.LIKELY, Priority.SWEEP):
            if priority == Priority.SWEEP and (self.touched or not sweep):
                break
            if self._queues[priority]:
                return self._take(self._coalesce(self._queues[priority]), now, background=True)
        self._link.starved()
        return None

    def hedge(self, request: Request, now: float) -> Request | None:
        """Another request for what someone waits for in ``request``, which is late; None if that is not to be."""
        if not request.hedgeable or len(self._requests) >= self._connections:
            return None
        first = request.hedgeable[0]
        first.hedged = True
        return self._take([first], now, background=False)

    def finish(self, request: Request, again: Collection[Flight] = ()) -> list[Flight]:
        """A request is over. Returns its flights that land by it: whom to tell of that is up to the caller.

        Flights in ``again`` are queued anew, first of their priority, unless another request has them; those that
        landed by another request are left out.
        """
        del self._requests[request]
        if request.background:
            self._background -= 1
            self._background_bytes -= request.sample.size
        landing = []
        for flight in reversed(request.flights):
            flight.requests -= 1
            if flight.landed:
                continue
            if flight not in again:
                del self._flights[flight.key]
                self._touches -= flight.priority == Priority.TOUCH
                landing.append(flight)
            elif not flight.flying:
                flight.hedged = False
                queue = self._queues[flight.priority]
                queue[flight.key] = flight
                queue.move_to_end(flight.key, last=False)
        landing.reverse()
        return landing

    def _room_for_background(self, now: float) -> bool:
        if self._background >= self._background_limit:
            if 2 * self._background_bytes < self._link.window():
                # All of them so small that they say nothing of the link.
                self._link.starved()
            return False
        if self._background == 0:
            return True
        if self._link.drains(now):
            # For a moment now and then one request at a time, to see what the round trip is without a queue.
            self._link.starved()
            return False
        return now >= self._link.paced_until and self._background_bytes < self._link.window()

    def _take(self, flights: list[Flight], now: float, *, background: bool) -> Request:
        for flight in flights:
            flight.requests += 1
        size = sum(flight.place.length for flight in flights)
        request = Request(
            flights, background, self._link.sent(now, size, background=background, alone=not self._requests)
        )
        self._requests[request] = None
        if background:
            self._background += 1
            self._background_bytes += size
        return request

    def _coalesce(self, queue: OrderedDict[Key, Flight]) -> list[Flight]:
        """The first of the queue, and those behind it whose payloads follow its own in the same pack."""
        _, first = queue.popitem(last=False)
        flights = [first]
        if isinstance(first.ref, BlockRef):
            return flights
        size = first.place.length
        end = first.place.offset + size
        room = self._link.request_size()
        while queue and len(flights) < MAX_COALESCED:
            key, following = next(iter(queue.items()))
            place = following.place
            joins = isinstance(following.ref, ChunkRef) and place.pack == first.place.pack and place.offset == end
            # To the nearest: were they all smaller than they should be, all slots together would not fill the window.
            if not joins or size + place.length - room > room - size:
                break
            del queue[key]
            flights.append(following)
            size += place.length
            end += place.length
        return flights


def background_slots(connections: int) -> int:
    """How many of so many connections the background may use."""
    return max(1, connections - min(RESERVED, connections // 2))
