"""The threads that make requests: whatever blocks, blocks here.

Handing a call to ``trio.to_thread.run_sync`` and getting its result back takes 79 µs here; a thread that waits at a
queue and calls back into the event loop takes 37. With 8000 touches a second behind one another that is what a guest
waits for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[], T]
Done = Callable[["T | Exception"], None]


class FetchThreads(Generic[T]):
    """Up to ``most`` threads, started when they are first needed. To be made and used in one event loop.

    A thread that is in the middle of its work when it is told to end is left to itself, as with trio's
    ``abandon_on_cancel``: it is a daemon, and whom it would tell is not called any more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[tuple[Work[T], Done[T]] | None] = SimpleQueue()
        self._started = 0
        self._busy = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<FetchThreads {self._busy} busy of {self._started}>"

    def submit(self, work: Work[T], done: Done[T]) -> None:
        """Call ``work`` in a thread, then ``done`` with its result, or its exception, in the event loop."""
        self._busy += 1
        if self._busy > self._started and self._started < self._most:
            self._started += 1
            threading.Thread(target=self._run, name=f"fetch {self._started}", daemon=True).start()
        self._queue.put((work, done))

    def close(self) -> None:
        """Nothing calls back from now on; idle threads end, the others after what they are at."""
        self._closed = True
        for _ in range(self._started):
            self._queue.put(None)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            work, done = task
            result: T | Exception
            try:
                result = work()
            except Exception as error:
                result = error
            try:
                self._token.run_sync_soon(self._finish, done, result)
            except trio.RunFinishedError:
                return
            # What it holds must not live until the next request comes.
            del task, work, done, result

    def _finish(self, done: Done[T], result: T | Exception) -> None:
        self._busy -= 1
        if not self._closed:
            done(result)
