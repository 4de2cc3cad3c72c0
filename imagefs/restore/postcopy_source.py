"""The source of a postcopy migration whose guest runs already: sends QEMU the pages of its memory.

What the guest waits for goes first, each page read by a thread of its own, so that one that is long in coming holds up
no other. Behind that, what has arrived at the mount (``.imagefs/arrivals``); and while nothing arrives, everything that
is still missing, in order and a window at a time. After the last page the migration is ended, and QEMU runs on alone.

| thread   | does                                                                                             |
|----------|--------------------------------------------------------------------------------------------------|
| main     | reads the return path, passes requests on                                                        |
| demand N | reads one page that was asked for, sends it                                                      |
| arrivals | reads ``.imagefs/arrivals``                                                                      |
| sender   | sends what is here, in small batches, and then the rest; writes ``.imagefs/trace``               |

Reads are not claimed: two threads may read the same page, and under the lock the ledger lets one of them send it.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import RawIOBase

from imagefs.errors import RestoreError
from imagefs.image.geometry import PAGE_SIZE
from imagefs.restore.memory_reader import MemoryReader, mount_status
from imagefs.restore.migration_stream import PageWriter
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.page_ledger import PageLedger
from imagefs.restore.return_path import Message, PageRequest, ReturnPath, Shut

log = logging.getLogger(__name__)

READERS = 64
"""Requests that can wait for their pages at a time; a guest has about one for each vCPU."""
BATCH_PAGES = 16
"""Pages sent without looking whether someone waits: 64 KiB, the mount's window."""
SWEEP_PAGES = 64
"""Read at once where the mount does not fetch by itself: more would hold up the guest's requests on a slow link."""
QUIET_SECONDS = 0.5
"""How long nothing must have arrived before something is read at a mount that fetches all by itself. It begins to do so
after half of that without a reader."""
YIELD_SECONDS, YIELD_LINK_SECONDS = 0.002, 0.1
"""How long a batch waits for requests under way. One that is here takes no time to speak of, and a request for a page
that is remote must not hold it up; one that may be remote itself takes the link's time."""
TRACE_SECONDS = 0.5
RETRY_SECONDS = 0.5
RECEIVE = 1 << 16


class PostcopySource:
    """Serves one connection, until QEMU has everything, or the connection breaks."""

    def __init__(
        self,
        connection: socket.socket,
        image: RestoreImage,
        writer: PageWriter,
        ledger: PageLedger,
        path: ReturnPath,
    ) -> None:
        """``path`` may hold the beginning of a message. OSError where the mount cannot be read."""
        self._connection = connection
        self._image = image
        self._writer = writer
        self._ledger = ledger
        self._path = path
        self._memory = MemoryReader(image)
        self._lock = threading.Lock()  # of the ledger, and of what is sent
        self._demand = 0  # requests under way
        self._changed = threading.Condition()  # of the two
        self._here: deque[tuple[int, int]] = deque()  # (first page, pages) that can be read without waiting
        self._asked: set[int] = set()
        self._touches: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(READERS, "demand")
        self._begun = time.monotonic()
        self._strange: set[str] = set()

    def __repr__(self) -> str:
        return f"<PostcopySource {self._image.mountpoint}: {self._ledger!r}, {len(self._asked)} asked for>"

    def run(self, early: Iterable[Message] = ()) -> bool:
        """Whether QEMU has all pages; False where the connection broke before. ``early`` messages came already.

        RestoreError where QEMU says that it failed. Threads that wait for a page may be left behind: this is for a
        process that ends afterwards.
        """
        if not self._ledger.missing:
            with self._lock:
                self._connection.sendall(self._writer.end)
        for name, work in (("arrivals", self._read_arrivals), ("sender", self._send_rest)):
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True).start()
        if self._handle(early):
            return True
        while True:
            try:
                data = self._connection.recv(RECEIVE)
            except OSError as error:
                log.info("connection to QEMU: %s", error.strerror)
                return False
            if not data:
                return False
            if self._handle(self._path.feed(data)):
                return True

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        """A thread that fails ends the whole source, and its supervisor starts another."""
        try:
            work(*arguments)
        except BaseException:
            log.exception("page source")
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _handle(self, messages: Iterable[Message]) -> bool:
        """True with the last message."""
        for message in messages:
            if isinstance(message, PageRequest):
                self._request(message)
            elif isinstance(message, Shut):
                if message.status:
                    raise RestoreError(f"QEMU failed to take the guest's pages (status {message.status:#x})")
                return True
        return False

    # ---- what the guest waits for ----

    def _request(self, request: PageRequest) -> None:
        if request.block != self._image.ram_block:
            if request.block not in self._strange:
                self._strange.add(request.block)
                log.error("QEMU waits for a page of %r, which the image's state should have", request.block)
            return
        first = request.offset // PAGE_SIZE
        for page in range(first, min(first + max(1, request.length // PAGE_SIZE), self._ledger.pages)):
            if page in self._asked:
                continue
            self._asked.add(page)
            self._touches.put(f"{time.monotonic() - self._begun:.6f} {page} 1 postcopy\n")
            if not self._ledger.is_sent(page):
                with self._changed:
                    self._demand += 1
                self._readers.submit(self._guarded, self._serve, page)

    def _serve(self, page: int) -> None:
        try:
            if not self._ledger.is_sent(page):
                self._send(page, self._memory.read(page * PAGE_SIZE, PAGE_SIZE))
        finally:
            with self._changed:
                self._demand -= 1
                # The mount has fetched its window, and the guest is likely to want more of that.
                self._here.appendleft((page // BATCH_PAGES * BATCH_PAGES, BATCH_PAGES))
                self._changed.notify_all()

    # ---- everything else ----

    def _read_arrivals(self) -> None:
        path = self._image.control("arrivals")
        while self._ledger.missing:
            try:
                with open(path, "rb", buffering=0) as file:
                    self._read_runs(file)
                return  # all is here
            except (OSError, ValueError) as error:
                # The daemon has died; once the image is mounted again the list begins anew.
                log.debug("%s: %s", path, error)
                time.sleep(RETRY_SECONDS)

    def _read_runs(self, file: RawIOBase) -> None:
        rest = b""
        while data := file.read(RECEIVE):
            lines, _, rest = (rest + data).rpartition(b"\n")
            runs = [line.split() for line in lines.splitlines()]
            with self._changed:
                self._here.extend((int(fields[0]), int(fields[1])) for fields in runs if len(fields) == 2)
                self._changed.notify_all()

    def _send_rest(self) -> None:
        # A mount that sweeps by itself stands back for whoever reads, so then reads of ours are rare.
        pause = QUIET_SECONDS if mount_status(self._image, "fetch", "prefetch") == "all" else 0.0
        at = 0
        traced = time.monotonic()
        while self._ledger.missing:
            if (run := self._next_here(pause)) is not None:
                self._send_run(*run, YIELD_SECONDS, BATCH_PAGES)
            elif (at := self._ledger.next_missing(at)) < self._ledger.pages:
                count = SWEEP_PAGES - at % SWEEP_PAGES
                self._send_run(at, count, YIELD_LINK_SECONDS, SWEEP_PAGES)
                at += count
            else:
                at = 0
                time.sleep(RETRY_SECONDS)  # what is still missing could not be read, or is being asked for
            if time.monotonic() - traced > TRACE_SECONDS:
                self._write_trace()
                traced = time.monotonic()
        self._write_trace()

    def _next_here(self, seconds: float) -> tuple[int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._here, timeout=seconds)
            return self._here.popleft() if self._here else None

    def _send_run(self, first: int, count: int, patience: float, most: int) -> None:
        """So many pages, at ``most`` read at once, without those that cannot be read now. Before each read, requests
        under way get so many seconds to be served."""
        end = min(first + count, self._ledger.pages)
        at = self._ledger.next_missing(first)
        while at < end:
            upto = min(at + most, end)
            with self._changed:
                self._changed.wait_for(lambda: not self._demand, timeout=patience)
            try:
                data = self._memory.try_read(at * PAGE_SIZE, (upto - at) * PAGE_SIZE)
            except OSError as error:
                self._memory.complain(at * PAGE_SIZE, error)
                time.sleep(RETRY_SECONDS)
                self._memory.reopen()
            else:
                for begin in range(0, len(data), BATCH_PAGES * PAGE_SIZE):
                    self._send(at + begin // PAGE_SIZE, data[begin : begin + BATCH_PAGES * PAGE_SIZE])
            at = self._ledger.next_missing(upto)

    def _send(self, first: int, data: bytes) -> None:
        with self._lock:
            pages = list(self._ledger.take(first, data))
            if not pages:
                return
            message = self._writer.pages(pages)
            if not self._ledger.missing:
                message += self._writer.end
            try:
                self._connection.sendall(message)
            except OSError as error:
                # Main sees the end of the connection, too. What counts as sent is made good by the next bitmap.
                log.debug("connection to QEMU: %s", error.strerror)

    def _write_trace(self) -> None:
        lines = []
        while not self._touches.empty():
            lines.append(self._touches.get())
        path = self._image.control("trace")
        try:
            with open(path, "ab", buffering=0) as file:
                # Whole lines in each write.
                for start in range(0, len(lines), 1000):
                    file.write("".join(lines[start : start + 1000]).encode("ascii"))
        except OSError as error:
            log.info("%s: %s", path, error.strerror)
