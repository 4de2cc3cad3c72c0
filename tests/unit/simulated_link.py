"""A link in simulated time: what makes the scheduler's requests where there is no network.

One bottleneck, shared by turns (as a fair queue does) or first come, first served; half of the round trip before it
and half behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from imagefs.fetch.scheduler import Brought

Done = Callable[["Brought | Exception"], None]


@dataclass(eq=False)
class _Answer:
    left: float
    work: Callable[[], Brought]
    done: Done
    sent: float
    first: float = 0.0


@dataclass
class SimulatedLink:
    """Implements :class:`imagefs.fetch.scheduler.Runner` under a MockClock. ``rate`` in bytes a second."""

    rate: float
    round_trip: float
    fair: bool = True
    stuck: Callable[[int], bool] = lambda number: False
    """Requests, by their number, whose answer never comes."""
    handling: float = 0.0
    """Seconds that the host takes with each answer when it has come."""
    sizes: list[int] = field(default_factory=list)
    """Of all requests so far, in order."""
    _queue: deque[_Answer] = field(default_factory=deque)
    _news: trio.Event = field(default_factory=trio.Event)
    _nursery: trio.Nursery | None = None

    def submit(self, work: Callable[[], Brought], done: Done) -> None:
        assert self._nursery is not None
        size = sum(flight.place.length for flight in work.args[0])  # type: ignore[attr-defined]
        number = len(self.sizes)
        self.sizes.append(size)
        if not self.stuck(number):
            self._nursery.start_soon(self._arrive, _Answer(size, work, done, trio.current_time()))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                if not self._queue:
                    self._news = trio.Event()
                    await self._news.wait()
                answer = self._queue.popleft()
                now = trio.current_time()
                answer.first = answer.first or now + self.round_trip / 2 - answer.sent
                piece = min(answer.left, max(1500.0, self.rate * 0.001)) if self.fair else answer.left
                await trio.sleep(piece / self.rate)
                answer.left -= piece
                if answer.left > 0:
                    self._queue.append(answer)
                else:
                    self._nursery.start_soon(self._deliver, answer)

    async def _arrive(self, answer: _Answer) -> None:
        await trio.sleep(self.round_trip / 2)
        self._queue.append(answer)
        self._news.set()

    async def _deliver(self, answer: _Answer) -> None:
        await trio.sleep(self.round_trip / 2)
        seconds = trio.current_time() - answer.sent
        await trio.sleep(self.handling)
        try:
            brought = answer.work()
        except Exception as error:
            answer.done(error)
        else:
            answer.done(replace(brought, latency=answer.first, seconds=seconds))
