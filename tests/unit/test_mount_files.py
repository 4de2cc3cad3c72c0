"""Control files, counters and failures of a mount, without a mount."""

from __future__ import annotations

import errno
import logging

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import MissingObjectError, TimedOutError, UsageError
from imagefs.fetch.arrivals import ArrivalLog
from imagefs.fetch.view import Run
from imagefs.mount.counters import MountCounters, WaitTimes
from imagefs.mount.failures import Failures
from imagefs.mount.files import HEARTBEAT, MAX_LINE, ArrivalsFile, SnapshotFile, TraceFile

PAGES = 4096


class Pages:
    """Arrivals as a mount sees them."""

    def __init__(self) -> None:
        self.bits = bytearray(PAGES // 8)
        self.log = ArrivalLog(PAGES, lambda offset, length: bytes(self.bits[offset : offset + length]))

    def arrive(self, page: int, count: int = 1) -> None:
        for each in range(page, page + count):
            self.bits[each // 8] |= 1 << each % 8
        self.log.add(Run(page, count))


async def test_arrivals_heartbeat(autojump_clock: trio.testing.MockClock) -> None:
    pages = Pages()
    file = ArrivalsFile(pages.log)
    begun = trio.current_time()
    assert await file.read(0, 100) == b"\n"
    assert trio.current_time() - begun == HEARTBEAT
    pages.arrive(5, 2)
    assert await file.read(0, 100) == b"5 2\n"
    assert trio.current_time() - begun == HEARTBEAT


async def test_arrivals_news_while_waiting(autojump_clock: trio.testing.MockClock) -> None:
    pages = Pages()
    file = ArrivalsFile(pages.log)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await file.read(0, 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(HEARTBEAT / 2)
        pages.arrive(7)
    assert got == [b"7 1\n"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        pages.log.finish()
    assert got[1] == b"7 1\n"
    assert await file.read(0, 100) == b""


@given(st.lists(st.integers(0, PAGES - 1), max_size=60), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_arrivals_in_pieces_of_any_size(arriving: list[int], sizes: list[int]) -> None:
    """However small the reads, the text is that of all runs."""

    async def read_all() -> bytes:
        pages = Pages()
        file = ArrivalsFile(pages.log)
        text = b""
        for number, page in enumerate(arriving):
            pages.arrive(page)
            if number % 3 == 0:
                text += await file.read(0, sizes[number % len(sizes)])
        pages.log.finish()
        number = 0
        while piece := await file.read(0, sizes[number % len(sizes)]):
            assert len(piece) <= sizes[number % len(sizes)]
            text += piece
            number += 1
        return text

    text = trio.run(read_all)
    seen: set[int] = set()
    for line in text.decode().splitlines():
        if line:
            first, count = map(int, line.split())
            seen |= set(range(first, first + count))
    assert seen == set(arriving)


class FakeTrace:
    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def text(self) -> bytes:
        return b"".join(self.taken)

    def append_text(self, data: bytes) -> None:
        if b"bad" in data:
            raise UsageError("trace: bad")
        self.taken.append(data)


@given(st.lists(st.integers(0, 40), max_size=8))
def test_trace_written_in_pieces(cuts: list[int]) -> None:
    text = b"0.1 1 1 a\n0.2 2 1 b\n0.3 3 1 c\n0.4 4 1"
    trace = FakeTrace()
    file = TraceFile(trace)
    at = 0
    for cut in [*sorted(cuts), len(text)]:
        file.write(text[at:cut])
        at = max(at, cut)
    file.close()
    assert b"".join(trace.taken) == text + b"\n"
    assert all(piece.endswith(b"\n") for piece in trace.taken)


@pytest.mark.expect_log("trace: bad")
def test_trace_that_is_bad() -> None:
    trace = FakeTrace()
    file = TraceFile(trace)
    with pytest.raises(UsageError):
        file.write(b"bad\nrest")
    file.write(b"good\n")
    with pytest.raises(UsageError):
        file.write(b"x" * (MAX_LINE + 1))
    file.write(b"bad")
    file.close()
    assert trace.taken == [b"good\n"]


async def test_snapshot_is_made_once() -> None:
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return b"text %d" % len(made)

    file = SnapshotFile(make)
    assert made == []
    assert (await file.read(0, 4), await file.read(4, 100), await file.read(0, 100)) == (b"text", b" 1", b"text 1")
    with pytest.raises(UsageError):
        file.write(b"x")


def test_percentiles() -> None:
    waits = WaitTimes()
    assert waits.percentile(0.5) is None
    for milliseconds in range(1, 1001):
        waits.add(milliseconds / 1000)
    assert (waits.count, waits.longest) == (1000, 1.0)
    assert waits.percentile(0.5) == pytest.approx(0.5, rel=0.1)
    assert waits.percentile(0.99) == pytest.approx(0.99, rel=0.1)
    assert waits.percentile(1.0) == 1.0


def test_counters() -> None:
    now = [10.0]
    counters = MountCounters(lambda: now[0])
    with counters.waiting():
        now[0] += 2
        assert counters.statistics()["longest_stall"] == 2
        with counters.waiting():
            assert counters.statistics()["waiting"] == 2
            now[0] += 0.5
    statistics = counters.statistics()
    assert (statistics["waited"], statistics["waiting"], statistics["longest_stall"]) == (2, 0, 2.5)
    assert statistics["uptime"] == 2.5
    assert repr(counters) == "<MountCounters 0 requests, 0 waiting>"


@pytest.mark.expect_log("read of")
def test_failures(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    missing = MissingObjectError("no such object", key="objects/ab", origin="http://store")
    for error, code in (
        (missing, errno.EIO),
        (missing, errno.EIO),
        (TimedOutError("too long"), errno.EIO),
        (UsageError("what?"), errno.EINVAL),
    ):
        assert failures.errno_of(error, "read of page 5") == code
    assert [record.getMessage() for record in caplog.records] == [
        "read of page 5: http://store: objects/ab: no such object",
        "read of page 5: too long",
        "read of page 5: what?",
    ]
    assert all(record.levelno == logging.WARNING and not record.exc_info for record in caplog.records)
    caplog.clear()
    assert failures.errno_of(KeyError("x"), "read of page 6") == errno.EIO
    assert caplog.records[0].exc_info
