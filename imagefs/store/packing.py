"""Gathering payloads into packs and putting these into the store; equal chunks go in once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from imagefs.errors import ImagefsError, StoreError, UnavailableError
from imagefs.image.chunks import digest
from imagefs.image.index import PayloadRef
from imagefs.image.packs import PackBuilder
from imagefs.store.base import object_key
from imagefs.store.catalogue import Catalogue
from imagefs.store.directory import DirectoryStore
from imagefs.store.lock import SplitLock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a payload went; ``pack`` is a number, since the pack may not have its name (its digest) yet."""

    pack: int
    offset: int
    length: int


class PackWriter:
    """The objects of one split. Call :meth:`flush` before asking for packs' names, :meth:`rely` before the image gets a
    name and :meth:`publish` afterwards, or :meth:`undo` if the split fails.

    A full pack is digested and put by a thread while the next one fills, so that compressing never waits for the disk
    unless the disk is slower: then two packs are in memory, and no third.
    """

    def __init__(self, store: DirectoryStore, catalogue: Catalogue) -> None:
        self._store = store
        self._catalogue = catalogue
        self._names: list[bytes] = []
        self._numbers: dict[bytes, int] = {}
        self._pack = PackBuilder()
        self._pack_number = -1
        # Chunks of the open pack and of the one before it, which the catalogue may not have had when a worker asked.
        self._open_chunks: dict[bytes, Placed] = {}
        self._closed_chunks: dict[bytes, Placed] = {}
        self._thread = ThreadPoolExecutor(1, "imagefs-pack")
        self._closing: Future[None] | None = None
        self._added: list[bytes] = []
        self._others: list[bytes] = []
        self._relied: list[bytes] = []
        self.new_bytes = 0
        """Bytes that this split has added to the store."""

    def known(self, names: Sequence[bytes]) -> Mapping[bytes, PayloadRef]:
        """Where the store already has chunks with these digests. Any thread may ask."""
        return self._catalogue.find(names)

    def refer(self, ref: PayloadRef) -> Placed:
        """A payload that is in the store already."""
        number = self._numbers.get(ref.pack)
        if number is None:
            number = self._numbers[ref.pack] = len(self._names)
            self._names.append(ref.pack)
        return Placed(number, ref.offset, ref.length)

    def add(self, name: bytes, payload: bytes, pages: int) -> Placed:
        """A payload that was not :meth:`known` a moment ago; ``pages`` is 0 for an index block."""
        if pages:
            placed = self._open_chunks.get(name) or self._closed_chunks.get(name)
            if placed is not None:
                return placed
        if self._pack.empty:
            self._pack_number = len(self._names)
            self._names.append(b"")
        placed = Placed(self._pack_number, self._pack.add(name, payload, pages), len(payload))
        if pages:
            self._open_chunks[name] = placed
        if self._pack.full:
            self._close_pack()
        return placed

    def flush(self) -> None:
        """Close the open pack and put it into the store: every payload so far has a name from here on."""
        if not self._pack.empty:
            self._close_pack()
        self._wait()

    def put_object(self, data: bytes) -> bytes:
        """One object that is no pack; returns its name."""
        name = digest(data)
        self._put(name, data)
        self._others.append(name)
        return name

    def resolve(self, pack: int) -> bytes:
        """The name of a pack that has been flushed."""
        return self._names[pack]

    def rely(self) -> None:
        """From now on no other split takes back what this one has added or refers to."""
        names = list(dict.fromkeys([*self._names, *self._others]))
        self._catalogue.rely(names)
        self._relied = names

    def publish(self) -> None:
        """Let other splits refer to the chunks of this one."""
        try:
            self._catalogue.publish()
        except ImagefsError as error:
            log.info("not catalogued: %s", error)

    def undo(self, lock: SplitLock) -> None:
        """Delete every object that this split has added, but for what another one relies on.

        While others run nothing is deleted, because they may be about to. What stays is no loss: the next split of the
        same data finds it.
        """
        with suppress(Exception):  # it is because of an error that we are here
            self._wait()
        if not lock.alone():
            log.info("another split is running: %d objects of this one stay in the store", len(self._added))
            return
        try:
            self._catalogue.release(self._relied)
            for name in self._catalogue.unneeded(self._added):
                self._store.delete(object_key(name.hex()))
        except ImagefsError as error:
            log.warning("objects of the failed split stay in the store: %s", error)

    def close(self) -> None:
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._closing is not None:
            closing, self._closing = self._closing, None
            closing.result()

    def _close_pack(self) -> None:
        self._wait()
        self._closing = self._thread.submit(self._put_pack, self._pack, self._pack_number)
        self._pack = PackBuilder()
        self._closed_chunks, self._open_chunks = self._open_chunks, {}

    def _put_pack(self, pack: PackBuilder, number: int) -> None:
        name, data, entries = pack.finish()
        self._put(name, data)
        self._names[number] = name
        self._catalogue.add(name, entries)

    def _put(self, name: bytes, data: bytes) -> None:
        key = object_key(name.hex())
        if self._store.has(key):
            if self._is_intact(key, data):
                return
            log.warning("%s: %s: was damaged; written anew", self._store.origin, key)
        else:
            # Before the put: what it leaves when it is interrupted is ours, too.
            self._added.append(name)
            self.new_bytes += len(data)
        self._store.put(key, data)

    def _is_intact(self, key: str, data: bytes) -> bool:
        """Whether an object that was there already is what we would have written: an image must not begin damaged."""
        try:
            return self._store.get(key, limit=len(data)) == data
        except UnavailableError:
            raise
        except StoreError:
            return False
