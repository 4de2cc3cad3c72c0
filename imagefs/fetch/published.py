"""The published working set of an image, fetched with one request while the image is being opened.

The request is made as soon as the image's digest is known, beside those for the manifest and the metadata, so that
neither having a set nor lacking one costs a round trip. Its body waits in the socket until the metadata is there; then
the pages are verified and put into the sink as they stream. Demand never waits for it: a touch of a page that has not
come yet is fetched by itself.

Everything blocking is done by threads, one at a time; what they have landed is told in the event loop. Cancelling
discards the rest of the stream, and nothing that has landed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import trio

from imagefs.errors import CorruptObjectError, MissingObjectError, StoreError, UnavailableError
from imagefs.fetch.sink import PageSink
from imagefs.image.chunks import Codec
from imagefs.image.index import BlockRef, IndexBlock
from imagefs.image.setobject import MAX_SIZE, Record, SetBlock, SetParser
from imagefs.image.setverify import PageRun, SetVerifier
from imagefs.image.streams import MEMORY
from imagefs.store.base import Store, working_set_key
from imagefs.store.reader import Image

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Requests that bring nothing, one after the other, until the rest is left to demand."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between them."""

State = Literal["none", "waiting", "streaming", "complete", "not needed", "given up"]


class SetTarget(Protocol):
    """What is told of things that have landed, in the event loop."""

    def block_landed(self, ref: BlockRef, block: IndexBlock, window: int) -> None:
        """An index block; ``window`` is one that lies below it."""

    def pages_landed(self, first: int, count: int) -> None:
        """Pages are in the sink."""


@dataclass(slots=True)
class Progress:
    """For status.json; sizes in bytes."""

    state: State = "waiting"
    pages: int = 0
    bytes: int = 0
    pages_landed: int = 0
    bytes_received: int = 0
    interruptions: int = 0


@dataclass(slots=True)
class _Landed:
    blocks: list[tuple[BlockRef, IndexBlock, int]] = field(default_factory=list)
    runs: list[PageRun] = field(default_factory=list)
    full: bool = False
    """Whether the sink could not keep a page: then there is no use in going on."""
    error: CorruptObjectError | None = None
    """What was wrong with what came next."""


@dataclass(frozen=True, slots=True)
class _Landing:
    """Where the stream goes: parsed, verified, into the sink. Used by one thread at a time."""

    parser: SetParser
    verifier: SetVerifier
    sink: PageSink

    def take(self, piece: bytes) -> _Landed:
        """The next bytes of the object, none at its end."""
        landed = _Landed()
        try:
            if not piece:
                self.parser.finish()
            for record in self.parser.feed(piece):
                self._take(record, landed)
                if landed.full:
                    return landed
            if self.parser.complete:
                self.parser.finish()
        except CorruptObjectError as error:
            # What came before it is in the sink, and must be told.
            landed.error = error
        return landed

    def _take(self, record: Record, landed: _Landed) -> None:
        if isinstance(record, SetBlock):
            ref, block = self.verifier.block(record)
            self.sink.put_block(ref.digest, block.data)
            landed.blocks.append((ref, block, record.window))
            return
        for run in self.verifier.pages(record):
            if not self.sink.put(run.first, run.data):
                landed.full = True
                return
            landed.runs.append(run)


class PublishedSet:
    """One mount's look at the set. One event loop, but for what the threads are in."""

    def __init__(self, store: Store, manifest: bytes) -> None:
        self._store = store
        self._manifest = manifest
        self._key = working_set_key(manifest)
        self._pieces: Iterator[bytes] | None = None
        self._first: bytes | None = None
        self._begun = trio.Event()
        self.progress = Progress()

    def __repr__(self) -> str:
        done = self.progress
        return f"<PublishedSet {done.state}, {done.pages_landed} of {done.pages} pages>"

    @property
    def under_way(self) -> bool:
        """Whether more of it may come."""
        return self.progress.state in ("waiting", "streaming")

    def statistics(self) -> dict[str, Any]:
        return asdict(self.progress)

    async def begin(self) -> None:
        """Make the request and take in its first bytes. Raises nothing: what goes wrong, :meth:`land` tries again."""
        try:
            self._first = await trio.to_thread.run_sync(self._next_piece, 0, abandon_on_cancel=True)
        except MissingObjectError:
            self.progress.state = "none"
        except StoreError:
            self._pieces = None
        if not self.under_way:
            self._pieces = self._first = None
        self._begun.set()

    async def land(self, image: Image, sink: PageSink, target: SetTarget) -> None:
        """Stream the rest, telling ``target``. Returns when there is nothing more, for whatever reason.

        A set that is damaged, or of another image, is left with a warning; an outage is waited out, for a while.
        """
        if sink.has(0, image.metadata.geometry.pages):
            # The answer may still be on its way: it is left to its thread.
            self.progress.state = "not needed"
            self._pieces = self._first = None
            return
        await self._begun.wait()
        landing = self._landing(image, sink)
        attempts, pause = 0, FIRST_PAUSE
        while self.under_way:
            try:
                landed = await trio.to_thread.run_sync(self._step, landing, abandon_on_cancel=True)
            except UnavailableError as error:
                attempts += 1
                self.progress.interruptions += 1
                self._pieces = None
                if attempts == ATTEMPTS:
                    self._give_up(logging.INFO, error)
                    break
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            except MissingObjectError as error:
                if landing.parser.received:
                    self._give_up(logging.INFO, error)
                else:
                    self.progress.state = "none"
            except CorruptObjectError as error:
                self._give_up(logging.WARNING, error)
            else:
                attempts, pause = 0, FIRST_PAUSE
                self._tell(landing.parser, landed, target)
        self._pieces = None

    def _landing(self, image: Image, sink: PageSink) -> _Landing:
        chunk_pages = image.manifest.chunk_pages
        memory, parts = image.manifest.streams[MEMORY], image.metadata.parts
        where = {"key": self._key, "origin": self._store.origin}
        parser = SetParser(self._manifest, chunk_pages, **where)
        return _Landing(parser, SetVerifier(memory, chunk_pages, parts, Codec(), **where), sink)

    def _next_piece(self, received: int) -> bytes:
        """The next bytes of the object after those ``received``; empty at its end. Blocking."""
        if self._pieces is None:
            self._pieces = self._store.stream(self._key, received, MAX_SIZE)
        return next(self._pieces, b"")

    def _step(self, landing: _Landing) -> _Landed:
        piece = self._first if self._first is not None else self._next_piece(landing.parser.received)
        self._first = None
        return landing.take(piece)

    def _tell(self, parser: SetParser, landed: _Landed, target: SetTarget) -> None:
        self.progress.bytes_received = parser.received
        if parser.header is not None:
            self.progress.pages, self.progress.bytes = parser.header.pages, parser.header.size
            self.progress.state = "complete" if parser.complete else "streaming"
        for ref, block, window in landed.blocks:
            target.block_landed(ref, block, window)
        for run in landed.runs:
            target.pages_landed(run.first, run.count)
            self.progress.pages_landed += run.count
        if landed.full:
            self.progress.state = "given up"
            log.info("%s: %s: there is no room for the rest of the working set", self._store.origin, self._key)
        elif landed.error is not None:
            self._give_up(logging.WARNING, landed.error)

    def _give_up(self, level: int, error: StoreError) -> None:
        self.progress.state = "given up"
        log.log(level, "%s; the rest of the working set is ignored: pages are fetched as they are touched", error)
