"""What is fetched before anyone asks for it: the recorded working sets, and then the sweep; and recording the next set.

The order: the published set, which streams; then what only recordings of this host have, window by window; then, if it
is wanted, what the image itself says is likely, and all the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, Protocol

import trio

from imagefs.errors import StoreError
from imagefs.fetch.flights import Priority
from imagefs.fetch.published import PublishedSet, SetTarget
from imagefs.fetch.recording import parse_trace, working_set_of
from imagefs.fetch.scheduler import Scheduler
from imagefs.fetch.sink import PageSink
from imagefs.fetch.trace import TouchTrace
from imagefs.image.index import ChunkRef
from imagefs.image.workingset import WorkingSet, from_text, merge, to_text
from imagefs.store.reader import Image

log = logging.getLogger(__name__)

AHEAD = 64
"""Windows that are queued at a time."""
GROUP = 32
"""Of these so many are sorted by number, so that requests for neighbours join."""
START_SECONDS = 10.0
"""After the mount of an image with a working set: who has recorded one starts a guest now. Until then nothing is swept,
nor fetched for lying beside a touch: what a guest wants is known, and what is missing in the set is seen page by page,
and is in the next. Pulled out of the air."""
UNFORETOLD = 8
"""Reads that had to wait although all that is foretold was here: then the guest goes ways of its own, and the rest is
fetched as if there were no recording. A guest that does what it did before need have none
(tests/vm/test_working_set.py); the number is pulled out of the air."""
FIRST_SAVE = 15.0
"""Seconds until a recording is kept for the first time; doubled each time. At the end of the mount it is kept, too."""


class ForesightTarget(SetTarget, Protocol):
    """What is fetched into."""

    async def find_chunk(self, window: int, priority: Priority) -> ChunkRef | None:
        """The chunk of a window of memory. Raises StoreError where it cannot be told."""

    def is_here(self, window: int) -> bool: ...

    def want_window(self, window: int, chunk: ChunkRef, priority: Priority) -> None: ...


class Foresight:
    """The working sets of one mount. One event loop."""

    def __init__(self, image: Image, sink: PageSink, trace: TouchTrace, published: PublishedSet | None) -> None:
        self.published = published
        self._image = image
        self._sink = sink
        self._trace = trace
        self._begun = trio.current_time()
        self._local = self._load()
        self._missing = [page for page in self._local.pages if not sink.has(page, 1)]
        self._all_asked_for = False
        self._unforetold = 0
        self._on_its_own = trio.Event()
        self._saved = 0

    @property
    def knows(self) -> bool:
        """Whether a recording says what a guest, which is starting now, will want."""
        if self._on_its_own.is_set() or trio.current_time() > self._begun + START_SECONDS:
            return False
        return bool(self._missing) or (self.published is not None and self.published.progress.pages > 0)

    def statistics(self) -> dict[str, Any]:
        published = {"state": "none"} if self.published is None else self.published.statistics()
        return {**published, "local_pages": len(self._local)}

    def missed(self) -> None:
        """A read of memory has to wait."""
        if self._all_asked_for:
            self._unforetold += 1
            if self._unforetold == UNFORETOLD:
                self._on_its_own.set()

    async def fetch(self, target: ForesightTarget, scheduler: Scheduler) -> None:
        """Everything that recordings know of. Returns when it is here or queued, and a guest has had time to start, or
        goes ways of its own."""
        if self.published is not None:
            await self.published.land(self._image, self._sink, target)
        await self._fetch_local(target, scheduler)
        self._all_asked_for = True
        if self.knows:
            with trio.move_on_at(self._begun + START_SECONDS):
                await self._on_its_own.wait()

    async def fetch_likely(self, target: ForesightTarget, scheduler: Scheduler) -> None:
        """What the image's document says is likely to be wanted. Returns when all of it is here or queued."""
        windows = self._windows(chain.from_iterable(self._image.metadata.checked.likely))
        await self._fetch_windows(windows, Priority.LIKELY, target, scheduler)

    async def _fetch_local(self, target: ForesightTarget, scheduler: Scheduler) -> None:
        windows = self._windows(page for page in self._missing if not self._sink.has(page, 1))
        for at in range(0, len(windows), GROUP):
            group = sorted(windows[at : at + GROUP])
            await self._fetch_windows(group, Priority.WORKING_SET, target, scheduler)

    def _windows(self, pages: Iterable[int]) -> list[int]:
        """Those that the pages are in, in their order."""
        chunk_pages = self._image.manifest.chunk_pages
        return list(dict.fromkeys(page // chunk_pages for page in pages))

    async def _fetch_windows(
        self, windows: Iterable[int], priority: Priority, target: ForesightTarget, scheduler: Scheduler
    ) -> None:
        for window in windows:
            await scheduler.wait_for_slack(priority, AHEAD)
            try:
                chunk = await target.find_chunk(window, priority)
            except StoreError as error:
                log.info("not fetched ahead: window %d: %s", window, error)
                continue
            if chunk is not None and not target.is_here(window):
                target.want_window(window, chunk, priority)

    # --- recording

    async def record(self) -> None:
        """Keep the recording now and then, so that a daemon that is killed has not lost it. Runs until cancelled."""
        pause = FIRST_SAVE
        while True:
            await trio.sleep(pause)
            pause *= 2
            await trio.to_thread.run_sync(self._saver())

    def save(self) -> None:
        """Keep the recording, if anything has been touched since it was kept last."""
        self._saver()()

    def _saver(self) -> Callable[[], None]:
        touches = len(self._trace)
        if touches == self._saved:
            return lambda: None
        self._saved = touches
        return partial(_save, self._sink, self._local, self._trace.text(), self._image)

    def _load(self) -> WorkingSet:
        text = self._sink.working_set()
        if text is not None:
            try:
                return from_text(text, self._image.metadata.geometry.pages)
            except ValueError as error:
                log.warning("the cache's recording of the working set is ignored: %s", error)
        return WorkingSet()


def _save(sink: PageSink, before: WorkingSet, trace: bytes, image: Image) -> None:
    found = working_set_of(parse_trace(trace), image.manifest.chunk_pages)
    if len(found):
        # The last window of memory may be one in part.
        kept = to_text(merge([before, found]), image.metadata.geometry.pages)
        sink.put_working_set(kept)
