"""Guest memory's pages as a migration stream brings them: the newest copy of each, and the ones before it.

A live-migrated guest's stream holds pages more than once. The last copy is guest memory; the earlier ones exist only in
the native file, so they become *superseded* pages of the template, with their native offsets as exceptions.

Nothing here grows with the guest but sparse files. Two ways to keep the page bytes:

- :class:`SpooledPages` copies them to a spool: for pipes (:class:`LatestPages` only the newest copies);
- :class:`PagesInPlace` reads them from the file that is split, where it is a regular file: nothing is copied.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator

from imagefs.formats.base import Input, Workspace
from imagefs.formats.gather import GatheredMemory, Scattered, SupersededPages
from imagefs.formats.spool import Spool
from imagefs.image.capture import ByteSource
from imagefs.image.geometry import PAGE_SIZE

_SLOT = 8
_WINDOW = 1 << 17
"""Pages whose slots are in memory at a time: 1 MiB of slots, 512 MiB of guest. QEMU walks RAM in order."""


class NewestCopies:
    """For each page the native offset of its newest copy in the native file; 0 where there is none.

    0 means that the page was never sent, or last as a zero, filled or compressed page.
    """

    def __init__(self, spool: Spool, pages: int) -> None:
        self._spool = spool
        self._spool.resize(pages * _SLOT)
        self._pages = pages
        self._number = -1
        self._window = memoryview(bytearray())

    def slots(self, page: int, count: int) -> Iterator[tuple[int, memoryview]]:
        """``(first page, its slots)``: views of 64-bit integers to read and write, valid until the next one."""
        while count:
            number = page // _WINDOW
            if number != self._number:
                self._load(number)
            start = page - number * _WINDOW
            stop = min(start + count, _WINDOW)
            yield page, self._window[start:stop]
            page += stop - start
            count -= stop - start

    def finish(self, pages: int) -> Spool:
        """The first ``pages`` slots, as native 64-bit integers."""
        self._store()
        self._number = -1
        self._spool.resize(pages * _SLOT)
        return self._spool

    def _load(self, number: int) -> None:
        self._store()
        data = bytearray(self._spool.read_at(number * _WINDOW * _SLOT, _WINDOW * _SLOT))
        self._window = memoryview(data).cast("Q")
        self._number = number

    def _store(self) -> None:
        if self._number >= 0:
            self._spool.write_at(self._number * _WINDOW * _SLOT, self._window.cast("B"))


class MainMemory(ABC):
    """Takes pages in the order of the stream. Page numbers are those of the flat memory.

    ``native`` is the offset in the stream of a page's bytes, ``stride`` that from one page of a run to the next.
    """

    def __init__(self, workspace: Workspace, pages: int) -> None:
        self.pages = pages
        self._newest = NewestCopies(workspace.spool(), pages)
        # Pages from here on were not sent yet: the first pass over RAM needs no look at what was there before.
        self._untouched = 0
        # Sparse; a retired copy's native offset at (offset // PAGE_SIZE) slots. No two copies share a slot, since
        # each takes at least a page of the stream, and reading the slots in order yields them sorted.
        self._retired = workspace.spool()
        self._exceptions = workspace.spool()

    def put_run(self, page: int, count: int, native: int, stride: int, buffer: memoryview, start: int) -> None:
        """``count`` consecutive pages; the first page's bytes are at ``buffer[start:]``."""
        for first, slots in self._newest.slots(page, count):
            self._retire_what_was(first, slots)
            at = native + (first - page) * stride
            slots[:] = array("Q", range(at, at + len(slots) * stride, stride))
        self._untouched = max(self._untouched, page + count)
        self._keep(page, count, stride, buffer, start)

    def put_page(self, page: int, data: bytes) -> None:
        """One page whose bytes are not in the stream as they are: compressed there, or a fill byte."""
        for first, slots in self._newest.slots(page, 1):
            self._retire_what_was(first, slots)
            slots[0] = 0
        self._untouched = max(self._untouched, page + 1)
        self._keep_aside(page, data)

    def clear(self, page: int, count: int) -> None:
        """``count`` pages that are zero now."""
        known = min(count, self._untouched - page)
        if known > 0:
            for first, slots in self._newest.slots(page, known):
                self._retire_what_was(first, slots)
                slots[:] = array("Q", bytes(len(slots) * _SLOT))
            self._forget_aside(page, known)
        self._untouched = max(self._untouched, page + count)

    def current(self, page: int) -> bytes | None:
        """The newest copy of a page; None where none came that far."""
        if page >= self._untouched:
            return None
        (slot,) = (slots[0] for _, slots in self._newest.slots(page, 1))
        return self._read(page, slot)

    def finish(self, pages: int) -> tuple[ByteSource, ByteSource, ByteSource]:
        """Memory of ``pages`` pages, exceptions and superseded pages, as the native template defines them."""
        newest = self._newest.finish(pages)
        at = self._retired.next_data(0)
        while at < self._retired.size:
            offsets = array("Q", self._retired.read_at(at, 1 << 20))
            found = array("Q", filter(None, offsets))
            if sys.byteorder == "big":
                found.byteswap()
            self._exceptions.append(found.tobytes())
            at = self._retired.next_data(at + len(offsets) * _SLOT)
        self._exceptions.flush()
        return self._memory(newest, pages), self._exceptions, self._superseded()

    def _retire_what_was(self, page: int, slots: memoryview) -> None:
        if page >= self._untouched:
            return
        old = slots.tolist()
        if not any(old):
            return
        # Runs whose copies are neighbours in the stream are neighbours in the sparse files too, but for a step here
        # and there: a record is a little longer than a page.
        begin = 0
        for index in range(1, len(old) + 1):
            if index == len(old) or not old[begin] or old[index] // PAGE_SIZE != old[index - 1] // PAGE_SIZE + 1:
                if old[begin]:
                    key = old[begin] // PAGE_SIZE
                    self._retired.write_at(key * _SLOT, array("Q", old[begin:index]).tobytes())
                    self._retire(page + begin, index - begin, key)
                begin = index

    @abstractmethod
    def _keep(self, page: int, count: int, stride: int, buffer: memoryview, start: int) -> None:
        """Called after the run's older copies were retired."""

    @abstractmethod
    def _keep_aside(self, page: int, data: bytes) -> None: ...

    @abstractmethod
    def _forget_aside(self, page: int, count: int) -> None: ...

    @abstractmethod
    def _retire(self, page: int, count: int, key: int) -> None:
        """The pages are about to be superseded; their native offsets divided by PAGE_SIZE count up from ``key``."""

    @abstractmethod
    def _read(self, page: int, slot: int) -> bytes:
        """The newest copy of a page; ``slot`` is its native offset, or 0."""

    @abstractmethod
    def _memory(self, newest: Spool, pages: int) -> ByteSource: ...

    @abstractmethod
    def _superseded(self) -> ByteSource: ...


class SpooledPages(MainMemory):
    """Memory in a spool, superseded pages in another one, there at ``native offset // PAGE_SIZE`` pages."""

    def __init__(self, workspace: Workspace, pages: int) -> None:
        super().__init__(workspace, pages)
        self._spool = workspace.spool()
        self._spool.resize(pages * PAGE_SIZE)
        self._old = workspace.spool()

    def _keep(self, page: int, count: int, stride: int, buffer: memoryview, start: int) -> None:
        views = [buffer[at : at + PAGE_SIZE] for at in range(start, start + count * stride, stride)]
        self._spool.write_all_at(page * PAGE_SIZE, views)

    def _keep_aside(self, page: int, data: bytes) -> None:
        self._spool.write_at(page * PAGE_SIZE, data)

    def _forget_aside(self, page: int, count: int) -> None:
        self._spool.punch(page * PAGE_SIZE, count * PAGE_SIZE)

    def _retire(self, page: int, count: int, key: int) -> None:
        self._old.write_at(key * PAGE_SIZE, self._spool.read_at(page * PAGE_SIZE, count * PAGE_SIZE))

    def _read(self, page: int, slot: int) -> bytes:
        return self._spool.read_at(page * PAGE_SIZE, PAGE_SIZE)

    def _memory(self, newest: Spool, pages: int) -> ByteSource:
        self._spool.resize(pages * PAGE_SIZE)
        return self._spool

    def _superseded(self) -> ByteSource:
        old = self._old

        def read(native: int) -> bytes:
            return old.read_at(native // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE)

        return SupersededPages(self._exceptions, read)


class LatestPages(SpooledPages):
    """Without superseded pages: where the stream is not in the native file as it is, nobody asks for them."""

    def _retire_what_was(self, page: int, slots: memoryview) -> None:
        pass


class PagesInPlace(MainMemory):
    """Pages stay where they are in the file; only those that are not there as they are go to a spool."""

    def __init__(self, workspace: Workspace, pages: int, source: Scattered) -> None:
        super().__init__(workspace, pages)
        self._source = source
        self._aside = workspace.spool()
        self._aside.resize(pages * PAGE_SIZE)

    def _keep(self, page: int, count: int, stride: int, buffer: memoryview, start: int) -> None:
        pass

    def _keep_aside(self, page: int, data: bytes) -> None:
        self._aside.write_at(page * PAGE_SIZE, data)

    def _forget_aside(self, page: int, count: int) -> None:
        self._aside.punch(page * PAGE_SIZE, count * PAGE_SIZE)

    def _retire(self, page: int, count: int, key: int) -> None:
        pass

    def _read(self, page: int, slot: int) -> bytes:
        return self._source.read_at(slot, PAGE_SIZE) if slot else self._aside.read_at(page * PAGE_SIZE, PAGE_SIZE)

    def _memory(self, newest: Spool, pages: int) -> ByteSource:
        self._aside.resize(pages * PAGE_SIZE)
        return GatheredMemory(newest, self._source, self._aside)

    def _superseded(self) -> ByteSource:
        source = self._source
        return SupersededPages(self._exceptions, lambda native: source.read_at(native, PAGE_SIZE))


def keeper(source: Input, workspace: Workspace) -> Callable[[int], MainMemory]:
    """What makes room for so many pages of a stream that ``source`` has as it is."""

    def keep(pages: int) -> MainMemory:
        if source.regular:
            return PagesInPlace(workspace, pages, workspace.adopt(source.as_file()))
        return SpooledPages(workspace, pages)

    return keep
