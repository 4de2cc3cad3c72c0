"""Reading ``native``: the template of the split file, driven asynchronously over an image's streams.

What the bytes of a range are is decided by :mod:`imagefs.image.native_reader`; here they are fetched, neighbouring
pages in one piece and what is missing all at once. Readers share one object: what it remembers are the template's
blocks that were used last, so that reading on does not search anew, and any number of requests may be under way.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio
from cachetools import LRUCache

from imagefs.errors import CorruptObjectError
from imagefs.fetch.view import ImageView
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import ENTRY_SIZE, EXCEPTION_SIZE, LITERAL, Entry
from imagefs.image.native_reader import (
    LiteralPiece,
    MemoryPiece,
    Piece,
    PrefixPiece,
    abisect,
    pieces,
    split_superseded,
    unpack_exceptions,
)
from imagefs.image.streams import (
    MEMORY,
    NATIVE_ENTRIES,
    NATIVE_EXCEPTIONS,
    NATIVE_LITERALS,
    NATIVE_SUPERSEDED,
)

BLOCK_ROWS = 256
BLOCKS_KEPT = 16
"""Of each table: as many readers at different places search no more than once each."""
PREFIXES_KEPT = 1 << 20
"""Bytes."""
MAX_PREFIX = 1 << 16
"""Bytes of a record's prefix; a page header is some hundred at most."""

Row = TypeVar("Row")


class NativeFile:
    """The file that was split, byte for byte."""

    def __init__(
        self, view: ImageView, waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        """``waiting()`` is entered while a read waits for pages."""
        self._view = view
        self._waiting = waiting
        self._entries = _Table(
            view, NATIVE_ENTRIES, ENTRY_SIZE, self._unpack_entries, lambda entry: entry.native_offset
        )
        self._exceptions = _Table(view, NATIVE_EXCEPTIONS, EXCEPTION_SIZE, unpack_exceptions, lambda offset: offset)
        self._prefixes: LRUCache[int, bytes] = LRUCache(PREFIXES_KEPT, getsizeof=len)

    def __repr__(self) -> str:
        return f"<NativeFile {self.size} bytes, {len(self._entries)} entries, {len(self._exceptions)} exceptions>"

    @property
    def size(self) -> int:
        """Bytes."""
        return self._view.native_size

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, shorter only at its end. Raises what the view's ``read`` raises; CorruptObjectError for
        a template that no writer produces. Cancelling it discards nothing."""
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        plan = await self._plan(offset, stop)
        runs = _Runs()
        places = [runs.add(piece) for piece in plan]
        fetched = await self._fetch(runs)
        out = []
        for piece, place in zip(plan, places, strict=True):
            data = fetched[place.run]
            if isinstance(piece, PrefixPiece):
                out.append(piece.cut(data))
            else:
                out.append(data[place.start : place.start + piece.length])
        return b"".join(out)

    async def _plan(self, offset: int, stop: int) -> list[Piece]:
        plan: list[Piece] = []
        at = offset
        number = await self._entries.rank(offset) - 1
        while at < stop:
            if not 0 <= number < len(self._entries):
                raise self._corrupt(f"nothing says what is at native offset {at}")
            for entry in await self._entries.rows_from(number):
                if entry.native_offset > at or entry.end <= at:
                    raise self._corrupt(f"nothing says what is at native offset {at}")
                if entry.kind != LITERAL and entry.literal_length > MAX_PREFIX:
                    raise self._corrupt(f"a prefix of {entry.literal_length} bytes at native offset {at}")
                plan.extend(pieces(entry, at, stop))
                number += 1
                at = entry.end
                if at >= stop:
                    break
        return plan if not len(self._exceptions) else await self._split(plan, offset, stop)

    async def _split(self, plan: list[Piece], offset: int, stop: int) -> list[Piece]:
        """Pages of which memory has a later copy come from the superseded stream."""
        first = await self._exceptions.rank(offset - PAGE_SIZE)
        last = await self._exceptions.rank(stop - 1)
        table: list[int] = []
        while first + len(table) < last:
            table += (await self._exceptions.rows_from(first + len(table)))[: last - first - len(table)]
        if not table:
            return plan
        out: list[Piece] = []
        for piece in plan:
            if isinstance(piece, MemoryPiece):
                low = bisect_left(table, piece.first_page_at)
                high = bisect_left(table, piece.native_offset + piece.length, low)
                out.extend(split_superseded(piece, table[low:high], first + low))
            else:
                out.append(piece)
        return out

    async def _fetch(self, runs: _Runs) -> list[bytes]:
        """The bytes of all runs. Those that are not here are waited for together."""
        fetched: list[bytes | None] = []
        for run in runs:
            here = self._prefixes.get(run.offset) if run.is_prefix else None
            fetched.append(here or self._view.read_present(run.stream, run.offset, run.length))
        missing = [number for number, data in enumerate(fetched) if data is None]
        failed: list[Exception] = []

        async def fetch(number: int, scope: trio.CancelScope) -> None:
            run = runs[number]
            try:
                fetched[number] = await self._view.read(run.stream, run.offset, run.length)
            except Exception as error:
                # The first error is the read's; a nursery would wrap it into a group.
                failed.append(error)
                scope.cancel()

        if missing:
            with self._waiting():
                async with trio.open_nursery() as nursery:
                    for number in missing:
                        nursery.start_soon(fetch, number, nursery.cancel_scope, name=f"native {runs[number].stream}")
            if failed:
                raise failed[0]
        complete = [data for data in fetched if data is not None]
        for run, data in zip(runs, complete, strict=True):
            if len(data) != run.length:
                raise self._corrupt(
                    f"it names {run.length} bytes at {run.offset:#x} of {run.stream}, which ends before"
                )
        return complete

    def _unpack_entries(self, data: bytes) -> list[Entry]:
        try:
            return [Entry.unpack(data, at) for at in range(0, len(data), ENTRY_SIZE)]
        except ValueError as error:
            raise self._corrupt(str(error)) from None

    def _corrupt(self, reason: str) -> CorruptObjectError:
        return CorruptObjectError(f"native template: {reason}", key=NATIVE_ENTRIES, origin=self._view.name)


@dataclass(slots=True)
class _Run:
    """A range of a stream, read at once."""

    stream: str
    offset: int
    length: int
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a piece's bytes are: byte ``start`` of run number ``run``."""

    run: int
    start: int


class _Runs(list[_Run]):
    """What a plan needs, neighbours joined: pages of one entry follow each other in memory, though not in the file."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._prefixes: dict[int, _Place] = {}

    def add(self, piece: Piece) -> _Place:
        if isinstance(piece, PrefixPiece):
            at = piece.entry.literal_offset
            if at not in self._prefixes:
                self._prefixes[at] = _Place(len(self), 0)
                self.append(_Run(NATIVE_LITERALS, at, piece.entry.literal_length, is_prefix=True))
            return self._prefixes[at]
        if isinstance(piece, MemoryPiece):
            stream = MEMORY
        else:
            stream = NATIVE_LITERALS if isinstance(piece, LiteralPiece) else NATIVE_SUPERSEDED
        last = self._last.get(stream)
        if last is not None and self[last].offset + self[last].length == piece.offset:
            self[last].length += piece.length
            return _Place(last, self[last].length - piece.length)
        self._last[stream] = len(self)
        self.append(_Run(stream, piece.offset, piece.length))
        return _Place(len(self) - 1, 0)


class _Block(Generic[Row]):
    """Rows of a table, their keys, and the key behind them."""

    def __init__(self, rows: list[Row], keys: list[int], bound: float) -> None:
        self.rows = rows
        self.keys = keys
        self.bound = bound

    def __contains__(self, value: int) -> bool:
        return self.keys[0] <= value < self.bound


class _Table(Generic[Row]):
    """Fixed-size rows in a stream, ascending by key; blocks of them are kept as they are used."""

    def __init__(
        self,
        view: ImageView,
        stream: str,
        row_size: int,
        unpack: Callable[[bytes], list[Row]],
        key: Callable[[Row], int],
    ) -> None:
        self._view = view
        self._stream = stream
        self._row_size = row_size
        self._unpack = unpack
        self._key = key
        self._rows = view.streams.get(stream, 0) // row_size
        self._blocks: dict[int, _Block[Row]] = {}
        """The one used last is the last."""

    def __len__(self) -> int:
        return self._rows

    async def rank(self, value: int) -> int:
        """How many rows have a key less than or equal to ``value``."""
        number = next((number for number, block in self._blocks.items() if value in block), None)
        if number is None:
            count = -(-self._rows // BLOCK_ROWS)
            number = await abisect(count, self._first_key, value) - 1
            if number < 0:
                return 0
        block = await self._block(number)
        return number * BLOCK_ROWS + bisect_right(block.keys, value)

    async def rows_from(self, row: int) -> list[Row]:
        """Some rows from number ``row`` on, at least one; ``row`` must exist."""
        number, skip = divmod(row, BLOCK_ROWS)
        return (await self._block(number)).rows[skip:]

    async def _first_key(self, number: int) -> int:
        return self._key((await self._read(number * BLOCK_ROWS, 1))[0])

    async def _block(self, number: int) -> _Block[Row]:
        block = self._blocks.pop(number, None)
        if block is None:
            # One row more, for the bound.
            rows = await self._read(number * BLOCK_ROWS, BLOCK_ROWS + 1)
            keys = [self._key(row) for row in rows]
            bound = keys[BLOCK_ROWS] if len(rows) > BLOCK_ROWS else math.inf
            block = _Block(rows[:BLOCK_ROWS], keys[:BLOCK_ROWS], bound)
        self._blocks[number] = block
        while len(self._blocks) > BLOCKS_KEPT:
            del self._blocks[next(iter(self._blocks))]
        return block

    async def _read(self, row: int, count: int) -> list[Row]:
        count = min(count, self._rows - row)
        data = await self._view.read(self._stream, row * self._row_size, count * self._row_size)
        return self._unpack(data)
