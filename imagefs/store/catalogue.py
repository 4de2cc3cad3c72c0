"""Which chunks a directory store already has, so that equal chunks are stored once per store.

An SQLite file beside the objects, made from the packs' own tables and never needed to read an image: if it is lost or
damaged it is made anew. It is on disk because the digests of a large store do not fit into the memory that a split
may use.

A split sees the chunks that the catalogue has, and its own, which are in tables that only its connection has until
it succeeds. Just before its image gets a name it notes all objects that it added or refers to (:meth:`Catalogue.rely`):
``relied`` counts such splits, and an object with any is never taken back by the split that added it. Once the image
has its name the split's own chunks go into the shared tables (:meth:`Catalogue.publish`); ``listed`` says that all
chunks of a pack are there.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imagefs.errors import (
    AccessDeniedError,
    CorruptObjectError,
    ImagefsError,
    NoSpaceError,
    StoreError,
    UnavailableError,
)
from imagefs.image.chunks import digest
from imagefs.image.index import PayloadRef
from imagefs.image.packs import FOOTER_SIZE, MAX_PACK_SIZE, TocEntry, parse_footer, parse_toc
from imagefs.store.base import object_key
from imagefs.store.directory import DirectoryStore

log = logging.getLogger(__name__)

FILE_NAME = ".catalogue.sqlite"
BUSY_SECONDS = 60.0
"""How long to wait for another split into the same store; its transactions are short."""
PUBLISHED_AT_ONCE = 32768
"""Chunks of one transaction, some 0.3 s: others wait so long to look something up."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE,
                                    relied INTEGER NOT NULL DEFAULT 0, listed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS chunks (digest BLOB PRIMARY KEY, object INTEGER NOT NULL, offset INTEGER NOT NULL,
                                   length INTEGER NOT NULL) WITHOUT ROWID;
"""
OWN_SCHEMA = """
PRAGMA temp_store = FILE;
PRAGMA temp.journal_mode = OFF;
CREATE TEMP TABLE own_objects (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TEMP TABLE own_chunks (digest BLOB PRIMARY KEY, object INTEGER NOT NULL, offset INTEGER NOT NULL,
                              length INTEGER NOT NULL) WITHOUT ROWID;
"""
FIND = """
SELECT digest, name, offset, length FROM {0}chunks c JOIN {0}objects o ON o.id = c.object WHERE digest IN ({1})
"""
RELY = "INSERT INTO objects (name, relied) VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET relied = relied + 1"
LIST = "INSERT INTO objects (name, listed) VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET listed = 1"
PUBLISH = """
INSERT OR REPLACE INTO chunks
SELECT digest, objects.id, offset, length
FROM own_chunks CROSS JOIN own_objects ON own_objects.id = own_chunks.object CROSS JOIN objects USING (name)
WHERE digest >= ? AND digest < ?
"""


class Catalogue:
    """Chunk digests of one store, for one split that holds its lock. Thread-safe: the split's workers all ask it.

    ``settled`` are the keys of the lock (:class:`imagefs.store.lock.SplitLock`): packs among them that are not listed
    are read and taken in. Raises StoreError and NoSpaceError where the file cannot be used.
    """

    def __init__(self, store: DirectoryStore, settled: frozenset[str] | None) -> None:
        self._store = store
        self._path = store.root / FILE_NAME
        self._lock = threading.Lock()
        self._present: dict[bytes, bool] = {}
        with self._errors():
            self._db = self._open(may_make_anew=settled is not None)
        try:
            self._take_in(settled or frozenset())
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def find(self, names: Sequence[bytes]) -> dict[bytes, PayloadRef]:
        """Where the store has these chunks, some dozens at most; without those that it has not, or whose pack has been
        deleted meanwhile."""
        places = ",".join("?" * len(names))
        with self._lock, self._errors():
            rows = self._db.execute(FIND.format("", places), names).fetchall()
            own = self._db.execute(FIND.format("own_", places), names).fetchall()
        found = {name: PayloadRef(*place) for name, *place in rows if self._is_present(place[0])}
        return found | {name: PayloadRef(*place) for name, *place in own}

    def add(self, pack: bytes, entries: Iterable[TocEntry]) -> None:
        """Take in the table of one pack of this split, for this split alone."""
        # Deferred: it locks only what it writes, which is nobody else's.
        with self._lock, self._transaction("DEFERRED"):
            self._db.execute("INSERT OR IGNORE INTO own_objects (name) VALUES (?)", (pack,))
            self._insert("own_", pack, entries)

    def rely(self, names: Iterable[bytes]) -> None:
        """Note that an image is about to be named that needs these objects.

        UnavailableError if one of them is gone: then the image must not get its name.
        """
        wanted = list(names)
        for name in wanted:
            if not self._store.has(object_key(name.hex())):
                key = object_key(name.hex())
                reason = "was deleted while the split referred to it; split again"
                raise UnavailableError(reason, key=key, origin=self._store.origin)
        with self._lock:
            if not self._is_current():
                # Someone took the file away. Our own chunks go with it: the next split reads the packs' tables.
                self._db.close()
                with self._errors():
                    self._db = self._open(may_make_anew=False)
            with self._transaction():
                self._db.executemany(RELY, ((name,) for name in wanted))

    def release(self, names: Iterable[bytes]) -> None:
        """Take back what :meth:`rely` noted: the image did not get its name."""
        with self._lock, self._transaction():
            self._db.executemany("UPDATE objects SET relied = relied - 1 WHERE name = ?", ((name,) for name in names))

    def unneeded(self, names: Iterable[bytes]) -> list[bytes]:
        """Those that no split relies on, as far as this catalogue can tell: none if it was replaced meanwhile."""
        with self._lock, self._errors():
            if not self._is_current():
                return []
            relied = "SELECT relied FROM objects WHERE name = ?"
            return [name for name in names if not (self._db.execute(relied, (name,)).fetchone() or (0,))[0]]

    def publish(self) -> None:
        """Let other splits find the chunks of this one. No loss if it fails: a later one reads the packs' tables."""
        with self._lock, self._errors():
            count = self._db.execute("SELECT count(*) FROM own_chunks").fetchone()[0]
            # By digest, so that the table is written from its begin to its end.
            pieces = count // PUBLISHED_AT_ONCE + 1
            bounds = [(number * 65536 // pieces).to_bytes(2, "big") for number in range(pieces)]
            for low, high in zip(bounds, [*bounds[1:], b"\xff" * 33], strict=True):
                with self._transaction():
                    self._db.execute(PUBLISH, (low, high))
            with self._transaction():
                self._db.execute("UPDATE objects SET listed = 1 WHERE name IN (SELECT name FROM own_objects)")

    def _insert(self, prefix: str, pack: bytes, entries: Iterable[TocEntry]) -> None:
        (number,) = self._db.execute(f"SELECT id FROM {prefix}objects WHERE name = ?", (pack,)).fetchone()
        self._db.executemany(
            f"INSERT OR REPLACE INTO {prefix}chunks VALUES (?, ?, ?, ?)",
            ((entry.digest, number, entry.offset, entry.length) for entry in entries if entry.pages),
        )

    def _is_present(self, pack: bytes) -> bool:
        """Whether a pack is in the store. It stays there while we hold the lock: asked once."""
        found = self._present.get(pack)
        if found is None:
            found = self._present[pack] = self._store.has(object_key(pack.hex()))
        return found

    def _take_in(self, keys: Iterable[str]) -> None:
        """Packs that are not listed: of a copied store, of a catalogue that was lost, of a split that was killed."""
        with self._errors():
            listed = {name for (name,) in self._db.execute("SELECT name FROM objects WHERE listed")}
        for key in sorted(keys):
            try:
                name = bytes.fromhex(key.rpartition("/")[2])
            except ValueError:
                continue
            if name in listed:
                continue
            entries = self._table(key, name)
            if entries is not None:
                with self._lock, self._transaction():
                    self._db.execute(LIST, (name,))
                    self._insert("", name, entries)

    def _table(self, key: str, name: bytes) -> list[TocEntry] | None:
        """A pack's table; empty for an object that is no pack, None for one that nobody should refer to."""
        origin = self._store.origin
        try:
            # All of it: a table can be whole where payloads are not.
            data = self._store.get(key, limit=MAX_PACK_SIZE)
            if digest(data) != name:
                raise CorruptObjectError("digest is not the object's name", key=key, origin=origin)
            where = parse_footer(data[-FOOTER_SIZE:], len(data), key=key, origin=origin)
            return [] if where is None else list(parse_toc(data[where[0] : where[0] + where[1]]))
        except CorruptObjectError as error:
            log.warning("%s; nothing new will refer to it", error)
        except StoreError as error:
            log.info("not catalogued: %s", error)
        return None

    # --- the file

    def _open(self, *, may_make_anew: bool) -> sqlite3.Connection:
        try:
            db = _connect(self._path)
        except sqlite3.DatabaseError as error:
            if not may_make_anew or not _is_damage(error):
                raise
            log.info("%s: %s; making it anew", self._path, error)
            self._path.unlink(missing_ok=True)
            db = _connect(self._path)
        self._identity = _identity(self._path)
        return db

    def _is_current(self) -> bool:
        """Whether other splits use the same file; a deleted one can still be written to, but nobody sees it."""
        return self._identity is not None and _identity(self._path) == self._identity

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """The caller has the lock."""
        with self._errors():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> ImagefsError:
        """What a failed statement means for the user."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return NoSpaceError(f"{self._path}: no space left there, or for SQLite's temporary files")
        origin = self._store.origin
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return AccessDeniedError(f"cannot be used: {error}", key=FILE_NAME, origin=origin)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return UnavailableError("another split does not let go of it", key=FILE_NAME, origin=origin)
        reason = f"{error}; delete it when no split is running, the next one makes it anew"
        return UnavailableError(reason, key=FILE_NAME, origin=origin)


def _connect(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    try:
        # Losing it costs a rescan, so it need not reach the disk before the packs do.
        db.execute("PRAGMA synchronous = OFF")
        db.executescript(SCHEMA)
        db.execute("SELECT digest, name, relied, listed FROM chunks JOIN objects ON id = object LIMIT 1").fetchall()
        db.executescript(OWN_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is at fault, or a schema of former days, and not the disk or another process."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
