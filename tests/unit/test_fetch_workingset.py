"""A mount's image fetches its working set by itself: published, local, damaged, interrupted, of another image."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from imagefs.cache.disk import DiskCache
from imagefs.cache.memory import MemoryCache
from imagefs.errors import MissingObjectError, StoreError, UnavailableError
from imagefs.fetch import foresight
from imagefs.fetch.opened import OpenedImage
from imagefs.fetch.options import FetchOptions
from imagefs.fetch.published import ATTEMPTS, PublishedSet
from imagefs.fetch.sink import PageSink
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.workingset import from_text
from tests.unit.scripted import ScriptedStore
from tests.unit.working_sets import SetImage

WINDOW = 16 * PAGE_SIZE
WANTED = [650, 3, 4, 5, 300, 17, 651, 90, 91, 92, 93, 699, 16]
SET_ONLY = FetchOptions(prefetch="ws")


class Setup:
    """An opened image over a store that does as it is told, its set published."""

    def __init__(self, path: Path, parts: bool) -> None:
        self.path = path
        self.made = SetImage.make(path / "store", parts=parts)
        self.made.publish(WANTED)
        self.store = ScriptedStore(self.made.store, piece=3000)

    @property
    def needed(self) -> list[int]:
        return [page for page in WANTED if not self.made.is_zero(page)]

    def disk(self) -> DiskCache:
        return DiskCache(self.path / "cache", self.made.image.digest, len(self.made.memory), boot_id="this")

    def get(self, key: str, start: int, length: int | None) -> bytes:
        return self.store.directory.get(key, start, length)

    def data_requests(self) -> list[str]:
        return [key for key, _, _ in self.store.gets if key != self.made.key]

    @asynccontextmanager
    async def open(self, options: FetchOptions = SET_ONLY, sink: PageSink | None = None) -> AsyncIterator[OpenedImage]:
        sink = sink or self.disk()
        published = PublishedSet(self.store, self.made.image.digest) if options.prefetch != "none" else None
        try:
            async with trio.open_nursery() as nursery:
                if published is not None:
                    nursery.start_soon(published.begin)
                opened = OpenedImage("store/vm", self.made.image, self.store, sink, options, published)
                nursery.start_soon(opened.run)
                yield opened
                opened.foresight.save()
                nursery.cancel_scope.cancel()
        finally:
            self.store.gate.set()
            sink.close()


@pytest.fixture(params=[True, False], ids=["parts", "no parts"])
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Setup:
    return Setup(tmp_path, request.param)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads, too
            await trio.sleep(0.001)


async def settled(opened: OpenedImage) -> str:
    published = opened.foresight.published
    assert published is not None
    await until(lambda: not published.under_way)
    return published.progress.state


@pytest.mark.parametrize("cached", [True, False])
async def test_the_set_is_here_before_anyone_asks(setup: Setup, cached: bool) -> None:
    sink = None if cached else MemoryCache(len(setup.made.memory), WINDOW)
    async with setup.open(sink=sink) as opened:
        _, cursor = opened.arrivals.read(0, 10_000)
        assert await settled(opened) == "complete"
        for page in setup.needed:
            assert opened.read_present("memory", page * PAGE_SIZE, PAGE_SIZE) == setup.made.page(page)
        runs, _ = opened.arrivals.read(cursor, 10_000)
        told = {page for run in runs for page in range(run.page, run.page + run.count)}
        assert told.issuperset(setup.needed)
        # No other request: also the index blocks came with it.
        assert await opened.read("memory", 17 * PAGE_SIZE, 9) == setup.made.page(17)[:9]
        assert setup.data_requests() == []
        status = opened.status()["working_set"]
        assert (status["state"], status["bytes_received"]) == ("complete", len(setup.made.store.get(setup.made.key)))


async def test_little_of_it_comes_before_the_metadata(setup: Setup) -> None:
    published = PublishedSet(setup.store, setup.made.image.digest)
    await published.begin()
    assert len(setup.store.gets) == 1
    assert published.under_way


async def test_prefetch_none_asks_for_no_set(setup: Setup) -> None:
    async with setup.open(FetchOptions(prefetch="none")) as opened:
        await opened.read("memory", 650 * PAGE_SIZE, 1)
        assert opened.status()["working_set"]["state"] == "none"
    assert all(key != setup.made.key for key, _, _ in setup.store.gets)


async def test_an_image_without_a_set(setup: Setup) -> None:
    setup.made.store.delete(setup.made.key)

    def stream(key: str, start: int, length: int | None) -> bytes | None:
        if key == setup.made.key:
            raise MissingObjectError("no such object", key=key, origin="test")
        return None

    setup.store.script = stream
    async with setup.open() as opened:
        assert await settled(opened) == "none"


async def test_a_touch_does_not_wait_for_the_stream(setup: Setup) -> None:
    def stuck(key: str, start: int, length: int | None) -> bytes | None:
        if key == setup.made.key and start:
            setup.store.gate.clear()
        return None

    setup.store.script = stuck
    async with setup.open() as opened:
        await until(lambda: not setup.store.gate.is_set())
        setup.store.script = lambda key, start, length: None
        last = setup.needed[-1]
        gate, setup.store.gate = setup.store.gate, type(setup.store.gate)()
        setup.store.gate.set()
        assert await opened.read("memory", last * PAGE_SIZE, PAGE_SIZE) == setup.made.page(last)
        gate.set()
        assert await settled(opened) == "complete"


async def test_an_interrupted_stream_goes_on_where_it_was(setup: Setup) -> None:
    asked: list[int] = []

    def script(key: str, start: int, length: int | None) -> bytes | None:
        if key == setup.made.key:
            asked.append(start)
            if asked.count(start) < 3:
                raise UnavailableError("reset", key=key, origin="test")
        return None

    setup.store.script = script
    async with setup.open() as opened:
        assert await settled(opened) == "complete"
        assert opened.status()["working_set"]["interruptions"] >= 4
    assert asked == sorted(asked)
    assert len(set(asked)) * 3 == len(asked), "every piece was had once, and asked for until then"


async def test_a_store_that_stays_away_leaves_the_rest_to_demand(
    setup: Setup, autojump_clock: trio.testing.MockClock
) -> None:
    def script(key: str, start: int, length: int | None) -> bytes | None:
        if key == setup.made.key and start:
            raise UnavailableError("reset", key=key, origin="test")
        return None

    setup.store.script = script
    async with setup.open() as opened:
        published = opened.foresight.published
        assert published is not None
        while published.under_way:  # noqa: ASYNC110 - on a clock that jumps
            await trio.sleep(0.1)
        assert (published.progress.state, published.progress.interruptions) == ("given up", ATTEMPTS)
        last = setup.needed[-1]
        assert await opened.read("memory", last * PAGE_SIZE, PAGE_SIZE) == setup.made.page(last)


@pytest.mark.expect_log("the rest of the working set is ignored")
@pytest.mark.parametrize("damage", ["bit", "cut", "other"])
async def test_a_set_that_is_wrong_is_left_with_a_warning(setup: Setup, tmp_path: Path, damage: str) -> None:
    stored = bytearray(setup.made.store.get(setup.made.key))
    if damage == "bit":
        stored[len(stored) // 2] ^= 4
    elif damage == "cut":
        del stored[-100:]
    else:
        stored[:] = SetImage.make(tmp_path / "other", seed=99).publish(WANTED)
    setup.made.store.put(setup.made.key, stored)
    async with setup.open() as opened:
        assert await settled(opened) == "given up"
        # What was put before the damage is right, and told.
        told = {page for run in opened.arrivals.read(0, 10_000)[0] for page in range(run.page, run.page + run.count)}
        here = {page for page in setup.needed if opened.read_present("memory", page * PAGE_SIZE, 1) is not None}
        assert here <= told
        for page in setup.needed:
            assert await opened.read("memory", page * PAGE_SIZE, PAGE_SIZE) == setup.made.page(page)


async def test_a_full_disk_ends_it(setup: Setup) -> None:
    class Full(DiskCache):
        def put(self, first: int, data: bytes | memoryview) -> bool:
            return False

    sink = Full(setup.path / "full", setup.made.image.digest, len(setup.made.memory))
    async with setup.open(sink=sink) as opened:
        assert await settled(opened) == "given up"
        assert await opened.read("memory", 650 * PAGE_SIZE, PAGE_SIZE) == setup.made.page(650)


async def test_nothing_is_guessed_beside_a_set(setup: Setup) -> None:
    page = next(page for page in range(400, 416) if not setup.made.is_zero(page))
    async with setup.open(FetchOptions()) as opened:
        assert await settled(opened) == "complete"
        await opened.read("memory", page * PAGE_SIZE, 1)
        await opened.scheduler.wait_until_idle()
        assert opened.scheduler.counters.chunks == 1
        # Who reads more than a window at a time is no guest.
        await opened.read("memory", 450 * PAGE_SIZE, 2 * WINDOW)
        await opened.scheduler.wait_until_idle()
        assert opened.scheduler.counters.chunks > 4


async def test_a_full_cache_needs_no_set(setup: Setup) -> None:
    async with setup.open(FetchOptions(prefetch="none")) as opened:
        await opened.read("memory", 0, len(setup.made.memory))
    async with setup.open() as opened:
        assert await settled(opened) == "not needed"
        assert opened.status()["working_set"]["pages_landed"] == 0


async def test_the_sweep_follows(setup: Setup, autojump_clock: trio.testing.MockClock) -> None:
    async with setup.open(FetchOptions()) as opened:
        while not opened.arrivals.complete:  # noqa: ASYNC110 - on a clock that jumps
            await trio.sleep(0.1)
        assert opened.read_present("memory", 0, len(setup.made.memory)) == setup.made.memory


async def test_a_guest_that_goes_ways_of_its_own(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has foretold ends the waiting for the guest's start: all the rest is fetched."""
    monkeypatch.setattr(foresight, "START_SECONDS", 1e9)
    async with setup.open(FetchOptions()) as opened:
        assert await settled(opened) == "complete"
        foretold = {page // 16 for page in WANTED}
        others = (next((p for p in range(w * 16, w * 16 + 16) if not setup.made.is_zero(p)), None) for w in range(43))
        pages = [page for page in others if page is not None and page // 16 not in foretold]
        missed = 0
        while opened.foresight.knows:
            missed += 1
            page = pages.pop()
            assert await opened.read("memory", page * PAGE_SIZE, PAGE_SIZE) == setup.made.page(page)
        assert missed >= foresight.UNFORETOLD
        await until(lambda: opened.arrivals.complete)


# --- recordings of this host


async def test_what_a_mount_recorded_is_fetched_by_the_next(setup: Setup) -> None:
    setup.made.store.delete(setup.made.key)
    async with setup.open(FetchOptions(prefetch="none")) as opened:
        for page in WANTED:
            await opened.read("memory", page * PAGE_SIZE, 100)
    kept = DiskCache(setup.path / "cache", setup.made.image.digest, len(setup.made.memory), boot_id="this")
    text = kept.working_set()
    kept.close()
    assert text is not None
    assert list(from_text(text, 700).pages) == WANTED
    for name in ("pages", "present"):
        (setup.path / "cache" / setup.made.image.digest.hex() / name).unlink()
    setup.store.gets.clear()
    async with setup.open() as opened:
        await until(lambda: all(opened.read_present("memory", p * PAGE_SIZE, 1, touch=False) for p in WANTED))
        assert opened.status()["working_set"]["local_pages"] == len(WANTED)
        await until(lambda: opened.scheduler.counters.background_requests > 0)
        assert opened.read_present("memory", 400 * PAGE_SIZE, PAGE_SIZE) in (None, bytes(PAGE_SIZE))


async def test_recordings_of_several_mounts_add_up(setup: Setup) -> None:
    for pages in ([650, 300], [300, 90]):
        async with setup.open(FetchOptions(prefetch="none")) as opened:
            for page in pages:
                await opened.read("memory", page * PAGE_SIZE, 100)
    kept = setup.disk()
    assert kept.working_set() == b"300 2\n650 1\n90 1\n"
    kept.close()


@pytest.mark.expect_log("recording of the working set is ignored: line 1: not PAGE RECORDINGS")
async def test_a_recording_that_is_damaged_is_ignored(setup: Setup) -> None:
    disk = setup.disk()
    disk.put_working_set(b"what is this\n")
    async with setup.open(sink=disk) as opened:
        assert await settled(opened) == "complete"


async def test_errors_of_the_store_while_local_windows_are_looked_up(setup: Setup) -> None:
    disk = setup.disk()
    disk.put_working_set(b"650 1\n")
    setup.made.store.delete(setup.made.key)

    def script(key: str, start: int, length: int | None) -> bytes | None:
        raise (MissingObjectError if key == setup.made.key else StoreError)("gone", key=key, origin="test")

    setup.store.script = script
    async with setup.open(sink=disk) as opened:
        assert await settled(opened) == "none"
        await until(lambda: len(opened.scheduler.table) == 0)
