"""An opened image over a scripted store: waiting, promotion, retries, failures, cancellation."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from imagefs.cache.disk import DiskCache
from imagefs.cache.memory import MemoryCache
from imagefs.errors import (
    CorruptObjectError,
    MissingObjectError,
    StoreError,
    TimedOutError,
    UnavailableError,
    UsageError,
)
from imagefs.fetch.opened import OpenedImage
from imagefs.fetch.options import FetchOptions
from imagefs.fetch.sink import PageSink
from imagefs.fetch.view import Run
from imagefs.image.capture import PageKind
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import load_image
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of
from tests.unit.scripted import ScriptedStore

WINDOW = 16 * PAGE_SIZE
PAGES = 40 * 16 + 5
MEMORY = memory_of(PAGES, 11, 0.3)[: 16 * 20 * PAGE_SIZE] + bytes(16 * 4 * PAGE_SIZE) + memory_of(16 * 16 + 5, 12, 0.3)
USED = [page for page in range(PAGES) if any(MEMORY[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])]
AT = next(page for page in USED if page >= 9 * 16) * PAGE_SIZE
"""Of the first page of window 9 that is not zero: zero pages need no fetching."""
ESSENTIAL = next(page for page in range(5, 16) if any(MEMORY[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]))
DEMAND = FetchOptions(prefetch="none")


class Setup:
    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        store = DirectoryStore(tmp_path / "store", create=True)
        capture = capture_of(MEMORY, state=b"the device state", essential=(PageKind(ESSENTIAL, 1, "pml4"),))
        write_image(store, "vm", capture)
        self.store = ScriptedStore(store)
        self.image = load_image(self.store, "vm", Codec())
        self.store.gets.clear()

    def disk(self, boot_id: str = "this boot") -> DiskCache:
        return DiskCache(self.path / "cache", self.image.digest, len(MEMORY), boot_id=boot_id)

    @asynccontextmanager
    async def open(self, options: FetchOptions = DEMAND, sink: PageSink | None = None) -> AsyncIterator[OpenedImage]:
        sink = sink or self.disk()
        try:
            async with trio.open_nursery() as nursery:
                opened = OpenedImage("store/vm", self.image, self.store, sink, options)
                nursery.start_soon(opened.run)
                yield opened
                nursery.cancel_scope.cancel()
        finally:
            self.store.gate.set()
            sink.close()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads, too
            await trio.sleep(0.001)


@pytest.mark.parametrize("limit", [None, 64 * WINDOW, 2 * WINDOW])
async def test_every_byte_by_demand(setup: Setup, limit: int | None) -> None:
    sink = setup.disk() if limit is None else MemoryCache(len(MEMORY), WINDOW, limit)
    async with setup.open(sink=sink) as opened:
        for offset in range(0, len(MEMORY), 100_001):
            assert await opened.read("memory", offset, 70_000) == MEMORY[offset : offset + 70_000]
        assert await opened.read("state", 4, 100) == b"device state"
        assert await opened.read("memory", 0, len(MEMORY)) == MEMORY
        assert await opened.read("memory", len(MEMORY), 10) == b""


async def test_only_what_is_touched_is_fetched(setup: Setup) -> None:
    async with setup.open() as opened:
        await opened.read("memory", next(page for page in USED if page >= 3 * 16) * PAGE_SIZE + 5, 10)
        assert len(setup.store.gets) == 1
        assert opened.read_present("memory", 3 * WINDOW, WINDOW) == MEMORY[3 * WINDOW : 4 * WINDOW]
        assert opened.read_present("memory", 2 * WINDOW, WINDOW) is None
        # Zero windows and essential pages cost nothing.
        assert opened.read_present("memory", 21 * WINDOW, WINDOW) == bytes(WINDOW)
        assert opened.read_present("memory", ESSENTIAL * PAGE_SIZE, 9) == MEMORY[ESSENTIAL * PAGE_SIZE :][:9]
        assert await opened.read("memory", 22 * WINDOW, WINDOW) == bytes(WINDOW)
        assert len(setup.store.gets) == 1


async def test_readers_of_one_window_share_a_flight_and_may_leave(setup: Setup) -> None:
    results: list[bytes] = []
    async with setup.open() as opened, trio.open_nursery() as nursery:
        setup.store.gate.clear()

        async def read(scope: trio.CancelScope) -> None:
            with scope:
                results.append(await opened.read("memory", AT, 100))

        scopes = [trio.CancelScope() for _ in range(3)]
        for scope in scopes:
            nursery.start_soon(read, scope)
        await until(lambda: [f.waiters for f in opened.scheduler.table.flights()] == [3])
        scopes[0].cancel()
        await until(lambda: [f.waiters for f in opened.scheduler.table.flights()] == [2])
        setup.store.gate.set()
        await until(lambda: len(results) == 2)
    assert results == [MEMORY[AT : AT + 100]] * 2
    assert len(setup.store.gets) == 1


async def test_the_sweep_brings_everything_and_says_so(setup: Setup) -> None:
    async with setup.open(FetchOptions()) as opened:
        await until(lambda: opened.arrivals.complete)
        assert opened.read_present("memory", 0, len(MEMORY)) == MEMORY
        runs, cursor = opened.arrivals.read(0, 10_000)
        assert opened.arrivals.read(cursor, 10) == ([], cursor)
        await opened.arrivals.wait(cursor)
        covered = {page for run in runs for page in range(run.page, run.page + run.count)}
        assert covered == set(range(PAGES))
        assert opened.scheduler.counters.requests < opened.scheduler.counters.chunks


def likely_setup(setup: Setup, *likely: range) -> Setup:
    document = replace(setup.image.metadata.checked, likely=likely)
    setup.image = replace(setup.image, metadata=replace(setup.image.metadata, checked=document))
    return setup


async def test_what_is_likely_comes_before_the_rest_in_its_order(setup: Setup) -> None:
    likely_setup(setup, range(16 * 30 + 3, 16 * 31 + 1), range(16 * 9, 16 * 9 + 2))
    async with setup.open(FetchOptions(connections=1)) as opened:
        await until(lambda: opened.arrivals.complete)
        assert opened.read_present("memory", 0, len(MEMORY), touch=False) == MEMORY
        lines = [line.split() for line in opened.trace.text().decode().splitlines()]
    assert [(int(page), int(count), origin) for _, page, count, origin in lines] == [
        (16 * 30, 16, "likely"),
        (16 * 31, 16, "likely"),
        (16 * 9, 16, "likely"),
    ]
    offsets = [at for _, at, _ in setup.store.gets]
    assert offsets[0] > offsets[1] > offsets[2] == min(offsets), "windows 30 and 31, then 9, then the sweep"


@pytest.mark.parametrize("prefetch", ["none", "ws"])
async def test_what_is_likely_is_not_fetched_unless_all_is(
    setup: Setup, prefetch: Literal["none", "ws"], autojump_clock: trio.testing.MockClock
) -> None:
    likely_setup(setup, range(16 * 30, 16 * 31))
    async with setup.open(FetchOptions(prefetch=prefetch)):
        await trio.sleep(60)
    assert not setup.store.gets


async def test_what_is_likely_and_cannot_be_had_is_left_to_whoever_touches_it(setup: Setup) -> None:
    likely_setup(setup, range(PAGES))
    async with setup.open(FetchOptions()) as opened:
        assert await opened.read("memory", AT, 100) == MEMORY[AT : AT + 100]
        await until(lambda: opened.arrivals.complete)


async def test_arrivals_are_told_as_they_come(setup: Setup) -> None:
    async with setup.open() as opened:
        runs, cursor = opened.arrivals.read(0, 10_000)
        assert Run(ESSENTIAL, 1) in runs
        with trio.move_on_after(0.01) as scope:
            await opened.arrivals.wait(cursor)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened.arrivals.wait, cursor)
            await opened.read("memory", next(page for page in USED if page >= 7 * 16) * PAGE_SIZE, 1)
        runs, _ = opened.arrivals.read(cursor, 10)
        assert Run(7 * 16, 16) in runs


@pytest.mark.expect_log("trying again until it answers", "answers again")
async def test_an_outage_is_waited_out(setup: Setup) -> None:
    down = threading.Event()
    down.set()

    def script(key: str, start: int, length: int | None) -> bytes | None:
        if down.is_set():
            raise UnavailableError("connection refused", key=key, origin="test")
        return None

    setup.store.script = script
    async with setup.open() as opened, trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await opened.read("memory", AT, 10))

        nursery.start_soon(read)
        await until(lambda: opened.scheduler.counters.unavailable >= 3)
        assert opened.scheduler.in_outage
        assert not got
        down.clear()
        await until(lambda: got)
        assert got == [MEMORY[AT : AT + 10]]
        assert not opened.scheduler.in_outage


@pytest.mark.expect_log("trying again until it answers", "answers again")
async def test_soft_gives_up_but_the_flight_goes_on(setup: Setup) -> None:
    async with setup.open(FetchOptions(prefetch="none", timeout=0.05)) as opened:
        setup.store.gate.clear()
        with pytest.raises(TimedOutError, match=rf"memory at {AT:#x}: not here after 0\.05 s"):
            await opened.read("memory", AT, 10)
        setup.store.gate.set()
        await until(lambda: opened.read_present("memory", AT, 10))


@pytest.mark.expect_log("digest is not", "zstd")
async def test_corrupt_bytes_are_never_served(setup: Setup) -> None:
    def script(key: str, start: int, length: int | None) -> bytes | None:
        data = bytearray(setup.store.directory.get(key, start, length))
        data[len(data) // 2] ^= 1
        return bytes(data)

    setup.store.script = script
    async with setup.open() as opened:
        with pytest.raises(CorruptObjectError, match="memory window 9"):
            await opened.read("memory", AT, 10)
        assert len(setup.store.gets) == 3
        assert opened.read_present("memory", AT, 10) is None
        # The pack is mended: the next read sees the right bytes.
        setup.store.script = lambda key, start, length: None
        assert await opened.read("memory", AT, 10) == MEMORY[AT : AT + 10]


@pytest.mark.expect_log("digest is not", "zstd")
async def test_a_torn_transfer_is_made_again(setup: Setup) -> None:
    def script(key: str, start: int, length: int | None) -> bytes | None:
        return bytes(length or 0) if len(setup.store.gets) == 1 else None

    setup.store.script = script
    async with setup.open() as opened:
        assert await opened.read("memory", AT, 10) == MEMORY[AT : AT + 10]
    assert len(setup.store.gets) == 2


@pytest.mark.expect_log("gone")
async def test_a_missing_pack_is_an_error_at_once(setup: Setup) -> None:
    def script(key: str, start: int, length: int | None) -> bytes | None:
        raise MissingObjectError("gone", key=key, origin="test")

    setup.store.script = script
    async with setup.open(FetchOptions()) as opened:
        with pytest.raises(MissingObjectError):
            await opened.read("memory", AT, 10)
        await until(lambda: len(opened.scheduler.table) == 0)
        assert opened.read_present("memory", AT, 10) is None
        assert not opened.arrivals.complete


@pytest.mark.expect_log("internal error", "Traceback")
async def test_a_fault_of_ours_costs_a_chunk_not_the_mount(setup: Setup) -> None:
    def script(key: str, start: int, length: int | None) -> bytes | None:
        raise ZeroDivisionError("a bug")

    setup.store.script = script
    async with setup.open(FetchOptions()) as opened:
        with pytest.raises(StoreError, match="internal error: ZeroDivisionError"):
            await opened.read("memory", AT, 10)
        await until(lambda: len(opened.scheduler.table) == 0)
        setup.store.script = lambda key, start, length: None
        assert await opened.read("memory", AT, 10) == MEMORY[AT : AT + 10]


async def test_zero_pages_of_a_mixed_window_are_not_fetched(setup: Setup) -> None:
    page = next(p for p in range(9 * 16, 20 * 16) if not any(MEMORY[p * PAGE_SIZE : (p + 1) * PAGE_SIZE]))
    async with setup.open() as opened:
        await opened.page_info(0)
        assert opened.read_present("memory", page * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert opened.read_present("memory", page // 16 * WINDOW, WINDOW) is None
    assert setup.store.gets == []


async def test_demand_alone_completes_an_image_too(setup: Setup) -> None:
    async with setup.open() as opened:
        before = opened.arrivals.complete
        await opened.read("memory", 0, len(MEMORY))
        assert (before, opened.arrivals.complete) == (False, True)
    async with setup.open() as opened:
        assert opened.arrivals.complete


async def test_what_another_daemon_brought_is_told_in_the_end(setup: Setup) -> None:
    other = setup.disk()
    async with setup.open() as opened:
        _, cursor = opened.arrivals.read(0, 10_000)
        other.put(2 * 16, MEMORY[2 * WINDOW : 3 * WINDOW])
        assert opened.read_present("memory", 2 * WINDOW, WINDOW) == MEMORY[2 * WINDOW : 3 * WINDOW]
        await opened.read("memory", 0, len(MEMORY))
        seen: set[int] = set()
        while (found := opened.arrivals.read(cursor, 100))[0]:
            seen.update(p for run in found[0] for p in range(run.page, run.page + run.count))
            cursor = found[1]
        assert seen == set(range(PAGES))
    other.close()


async def test_a_sweep_that_another_daemon_has_overtaken_is_complete(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = setup.disk()

    def is_here(opened: OpenedImage, window: int) -> bool:
        other.put(0, MEMORY)
        return True

    monkeypatch.setattr(OpenedImage, "is_here", is_here)
    async with setup.open(FetchOptions()) as opened:
        await until(lambda: opened.arrivals.complete)
        assert opened.scheduler.counters.chunks == 0
    other.close()


class Full(DiskCache):
    """Keeps nothing."""

    def put(self, first: int, data: bytes | memoryview) -> bool:
        return False


async def test_what_could_not_be_kept_is_not_announced(setup: Setup) -> None:
    sink = Full(setup.path / "full", setup.image.digest, len(MEMORY))
    async with setup.open(sink=sink) as opened:
        assert await opened.read("memory", AT, 10) == MEMORY[AT : AT + 10]
        runs, _ = opened.arrivals.read(0, 10_000)
        pages = {p for run in runs for p in range(run.page, run.page + run.count)}
        assert all(sink.has(page, 1) for page in pages)
        assert not pages.issuperset(range(9 * 16, 10 * 16))


@pytest.mark.parametrize(
    "line", ["inf 1 1 x", "-1 1 1 x", "0 1 1 \x1b", "0 1 0 x", "0 0 99999 x", "0 1 1", "0 1 1 x y"]
)
async def test_a_bad_line_of_a_trace_takes_the_others_with_it(setup: Setup, line: str) -> None:
    async with setup.open() as opened:
        with pytest.raises(UsageError, match="trace: not SECONDS PAGE COUNT ORIGIN"):
            opened.trace.append_text(f"0.5 7 2 pager\n{line}\n".encode())
        assert opened.trace.text() == b""


async def test_the_cache_is_used_by_the_next_mount(setup: Setup) -> None:
    async with setup.open(FetchOptions()) as opened:
        await until(lambda: opened.arrivals.complete)
    setup.store.gets.clear()
    async with setup.open() as opened:
        assert opened.read_present("memory", 0, len(MEMORY)) == MEMORY
    assert setup.store.gets == []


async def test_after_a_crash_of_the_host_pages_are_verified_not_trusted(setup: Setup) -> None:
    async with setup.open(FetchOptions()) as opened:
        await until(lambda: opened.arrivals.complete)
    with (setup.path / "cache" / setup.image.digest.hex() / "pages").open("r+b") as pages:
        pages.seek(3 * WINDOW + 100)
        pages.write(b"torn")
    setup.store.gets.clear()
    sink = setup.disk("another boot")
    async with setup.open(sink=sink) as opened:
        assert opened.read_present("memory", 2 * WINDOW, 10) is None
        assert await opened.read("memory", 0, len(MEMORY)) == MEMORY
    assert len(setup.store.gets) == 1


async def test_page_info_and_trace(setup: Setup) -> None:
    async with setup.open() as opened:
        zero = MEMORY[22 * WINDOW :].find(bytes(PAGE_SIZE)) // PAGE_SIZE + 22 * 16
        assert (await opened.page_info(zero)).state == "zero"
        info = await opened.page_info(ESSENTIAL)
        assert (info.state, info.kind) == ("present", "pml4")
        page = next(p for p in range(9 * 16, 10 * 16) if any(MEMORY[p * PAGE_SIZE : (p + 1) * PAGE_SIZE]))
        before = await opened.page_info(page)
        await opened.read("memory", page * PAGE_SIZE, 1)
        after = await opened.page_info(page)
        assert (before.state, after.state) == ("remote", "present")
        assert before.digest == after.digest
        assert after.digest is not None
        opened.trace.append_text(b"0.5 7 2 pager\n")
        lines = [line.split()[1:] for line in opened.trace.text().decode().splitlines()]
        assert lines == [[str(page), "1", "read"], ["7", "2", "pager"]]


async def test_a_soft_mount_waits_for_an_index_block_no_longer_than_for_a_page(setup: Setup) -> None:
    setup.image = replace(setup.image, metadata=replace(setup.image.metadata, parts={}))
    setup.store.gate.clear()
    async with setup.open(FetchOptions(prefetch="none", timeout=0.05)) as opened:
        with pytest.raises(TimedOutError, match=r"index of page .*: not here after"):
            await opened.page_info(ESSENTIAL)
        setup.store.gate.set()
        await until(lambda: not len(opened.scheduler.table))
        assert (await opened.page_info(ESSENTIAL)).digest is not None
