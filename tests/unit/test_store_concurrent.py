"""Several splits into one store at once: whatever becomes of one, the images of the others are whole.

The writers are threads with stores, locks and connections of their own, which the kernel and SQLite tell apart like
those of processes. Gates stop them at a put; nobody sleeps.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from imagefs.errors import UnavailableError
from imagefs.image.chunks import Codec
from imagefs.image.index import walk_chunks
from imagefs.store.base import object_key
from imagefs.store.catalogue import FILE_NAME
from imagefs.store.directory import DirectoryStore
from imagefs.store.lock import SplitLock
from imagefs.store.reader import ImageReader, load_image
from imagefs.store.verify import Verifier
from imagefs.store.writer import Written, write_image
from tests.unit.captures import capture_of, memory_of

SECONDS = 60.0
"""What a test waits for another thread at most; none takes one."""

SAME = memory_of(200, 51)
PARTLY = SAME[: len(SAME) // 2] + memory_of(100, 52)

CHUNKS, INDEX, METADATA, MANIFEST, NAME = range(1, 6)
"""The puts of a small image, in their order."""


class GatedStore(DirectoryStore):
    """Stops before its ``number``-th put until it is told to go on, or to fail."""

    def __init__(self, root: Path, number: int = 0) -> None:
        super().__init__(root, create=True)
        self.number = number
        self.puts = 0
        self.arrived = threading.Event()
        self.verdict: Future[None] = Future()

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.puts += 1
        if self.puts == self.number:
            self.arrived.set()
            self.verdict.result(SECONDS)
        super().put(key, data)

    def go_on(self) -> None:
        self.verdict.set_result(None)

    def fail(self) -> None:
        self.verdict.set_exception(RuntimeError("told to fail"))


class Writers:
    """Splits in threads, of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pool = ThreadPoolExecutor(8)
        self._gated: list[GatedStore] = []

    def start(self, name: str, memory: bytes, until: int) -> tuple[GatedStore, Future[Written]]:
        """A split that has come to a put, and waits there."""
        store = GatedStore(self.root, until)
        self._gated.append(store)
        future = self._pool.submit(write_image, store, name, capture_of(memory))
        assert store.arrived.wait(SECONDS)
        return store, future

    def split(self, name: str, memory: bytes) -> Written:
        return write_image(DirectoryStore(self.root, create=True), name, capture_of(memory))

    def close(self) -> None:
        for store in self._gated:
            if not store.verdict.done():
                store.fail()
        self._pool.shutdown()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    writers = Writers(tmp_path / "s")
    yield writers
    writers.close()


def keys(root: Path) -> set[str]:
    return set(DirectoryStore(root).keys())


def check(root: Path, name: str, memory: bytes) -> set[str]:
    """The image is whole; the keys of all that it consists of."""
    store = DirectoryStore(root)
    image = load_image(store, name, Codec())
    reader = ImageReader(store, image, Codec())
    assert reader.source("memory").read_at(0, len(memory)) == memory
    assert list(Verifier(store, image, Codec()).damage()) == []
    packs = {ref.root.place.pack for ref in image.manifest.streams.values() if ref.root is not None}
    for stream in image.manifest.streams.values():
        packs |= {chunk.place.pack for _, chunk in walk_chunks(stream, reader.block)}
    return {name, *(object_key(each.hex()) for each in (*packs, image.digest, image.manifest.metadata))}


def fails(future: Future[Written]) -> None:
    with pytest.raises(RuntimeError, match="told to fail"):
        future.result(SECONDS)


@pytest.mark.parametrize("until", [INDEX, METADATA, MANIFEST, NAME])
@pytest.mark.parametrize("memory", [SAME, PARTLY], ids=["same", "partly"])
def test_what_another_has_relied_on_stays(writers: Writers, until: int, memory: bytes) -> None:
    """A puts, B makes an image of the same data and is done, A fails: B's image is whole, and nothing else stays."""
    first, failing = writers.start("a", SAME, until)
    writers.split("b", memory)
    first.fail()
    fails(failing)
    assert check(writers.root, "b", memory) == keys(writers.root)


@pytest.mark.parametrize("until", [INDEX, METADATA, MANIFEST, NAME])
@pytest.mark.parametrize("reached", [CHUNKS, MANIFEST, NAME])
def test_what_another_may_rely_on_stays(writers: Writers, until: int, reached: int) -> None:
    """A fails while B is under way: nothing is taken away under B, and what A leaves is used by the next."""
    first, failing = writers.start("a", SAME, until)
    # What A has put is there already, so B's puts are only those that A has not come to.
    reached = max(1, reached - until + 1)
    second, going = writers.start("b", SAME, reached)
    first.fail()
    fails(failing)
    second.go_on()
    going.result(SECONDS)
    check(writers.root, "b", SAME)
    assert writers.split("c", SAME).new_bytes == 0


@pytest.mark.parametrize("until", [CHUNKS, INDEX, METADATA, MANIFEST, NAME])
def test_alone_a_failed_split_leaves_nothing(writers: Writers, until: int) -> None:
    store, failing = writers.start("a", SAME, until)
    store.fail()
    fails(failing)
    assert keys(writers.root) == set()
    writers.split("a", SAME)
    before = keys(writers.root)
    store, failing = writers.start("a", PARTLY, until)
    store.fail()
    fails(failing)
    assert keys(writers.root) == before == check(writers.root, "a", SAME)


def test_chunks_are_shared_once_the_image_is_there(writers: Writers) -> None:
    """Not before: B must not refer to packs of A that may go."""
    first, going = writers.start("a", SAME, NAME)
    of_first = keys(writers.root)
    writers.split("b", PARTLY)
    assert check(writers.root, "b", PARTLY).isdisjoint(of_first)
    first.go_on()
    going.result(SECONDS)
    half = writers.split("c", SAME[: len(SAME) // 2])
    assert half.new_bytes < half.stored_bytes / 10
    assert not check(writers.root, "c", SAME[: len(SAME) // 2]).isdisjoint(of_first)


def test_both_fail(writers: Writers) -> None:
    first, one = writers.start("a", SAME, MANIFEST)
    second, other = writers.start("b", PARTLY, MANIFEST)
    second.fail()
    fails(other)
    left = keys(writers.root)
    assert len(left) > 3
    first.fail()
    fails(one)
    assert keys(writers.root) < left, "the last one is alone and takes its own away"
    writers.split("b", PARTLY)
    check(writers.root, "b", PARTLY)


def test_a_catalogue_that_goes_away(writers: Writers) -> None:
    """Whoever deletes it must not so make an undo believe that nobody relies on anything."""
    first, one = writers.start("a", SAME, MANIFEST)
    second, other = writers.start("b", SAME, MANIFEST - METADATA)
    (writers.root / FILE_NAME).unlink()
    writers.split("c", SAME)
    second.go_on()
    other.result(SECONDS)
    first.fail()
    fails(one)
    check(writers.root, "b", SAME)
    check(writers.root, "c", SAME)
    assert writers.split("d", SAME).new_bytes == 0


def test_a_pack_that_is_deleted_under_a_split(writers: Writers) -> None:
    """By hand, say: then the image does not get its name."""
    writers.split("a", SAME)
    packs = check(writers.root, "a", SAME)
    store, going = writers.start("b", PARTLY, METADATA)
    for key in packs - {"a"}:
        store.delete(key)
    store.go_on()
    with pytest.raises(UnavailableError, match="was deleted while the split referred to it; split again"):
        going.result(SECONDS)
    assert "b" not in keys(writers.root)


def test_nobody_starts_while_something_is_deleted(writers: Writers) -> None:
    """A new split waits for the lock that is held alone, and then looks at what is there."""
    store = DirectoryStore(writers.root, create=True)
    held = SplitLock(store)
    assert held.settled == frozenset()
    with SplitLock(store) as other:
        assert other.settled is None
        assert not held.alone()
    assert held.alone()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(SplitLock, store)
        store.put("objects/ab/abcd", b"")
        assert not waiting.done()
        held.close()
        with waiting.result(SECONDS) as late:
            assert late.settled in (None, frozenset({"objects/ab/abcd"}))


def test_a_lock_file_that_is_replaced(writers: Writers) -> None:
    """The store goes with the failed split that it was made for; whoever waited for its lock makes it again."""
    store = DirectoryStore(writers.root, create=True)
    with SplitLock(store) as held:
        (writers.root / ".lock").unlink()
        assert not held.alone(), "others lock another file by now"
        with SplitLock(store) as other:
            assert other.alone()
    (writers.root / ".lock").unlink()
    writers.root.rmdir()
    with SplitLock(store):
        assert (writers.root / ".lock").exists()


def test_many_at_once(writers: Writers, rng: random.Random) -> None:
    """Splits of data that overlap, half of which fail at some put: every image that got its name is whole."""
    memories = [memory_of(60, seed) for seed in range(3)]
    jobs = [(f"{n}", b"".join(rng.sample(memories, 2)), rng.choice([0, rng.randint(1, 5)])) for n in range(60)]

    def job(name: str, memory: bytes, until: int) -> bytes | None:
        store = GatedStore(writers.root, until)
        store.fail()
        try:
            write_image(store, name, capture_of(memory))
        except RuntimeError:
            return None
        return memory

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda each: job(*each), jobs))
    assert 10 < sum(memory is not None for memory in done) < 60
    for (name, _, _), memory in zip(jobs, done, strict=True):
        if memory is None:
            assert name not in keys(writers.root)
        else:
            check(writers.root, name, memory)


@pytest.mark.parametrize("existed", [False, True])
def test_interrupted_when_the_name_is_there_already(tmp_path: Path, existed: bool) -> None:
    """Ctrl-C between the rename and what follows it: too late to take anything back."""

    class Interrupted(DirectoryStore):
        def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
            super().put(key, data)
            if key == "vm":
                raise KeyboardInterrupt

    if existed:
        write_image(DirectoryStore(tmp_path / "s", create=True), "vm", capture_of(PARTLY))
    with pytest.raises(KeyboardInterrupt):
        write_image(Interrupted(tmp_path / "s", create=True), "vm", capture_of(SAME))
    check(tmp_path / "s", "vm", SAME)
