"""A guest that is resumed over a link with a recorded working set, beside what the link and the host need at least; and
how fast a set is verified and landed.

The set is recorded by one resume over the same link with prefetch=none, from an empty cache, until the guest answers.
The yardstick for the time is the set's bytes at the link's bandwidth, three round trips, and the same guest's answer
from a full local cache by the same door; that for the bytes is the set and the metadata, which every mount fetches.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from imagefs import native
from imagefs.cache.disk import DiskCache
from imagefs.image.chunks import Codec
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.setobject import SetBlock, SetPages, SetParser
from imagefs.image.setverify import SetVerifier
from imagefs.image.streams import MEMORY
from imagefs.image.workingset import recorded
from imagefs.store.base import working_set_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import ImageReader, load_image
from imagefs.store.workingset import publish
from support.bench.figures import Figure
from support.guest import Guest, build_guest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx
from support.vm import Vm

MEMORY_MIB, FILL_MIB = 768, 512
MBIT, RTT_MS = 100.0, 40.0
RUNS = 3
DOORS = ("mmap", "pager")
PATIENCE = 300.0
WIRE_GBIT = 1.0
LANDED_PAGES = 16384


@dataclass(frozen=True)
class Answer:
    """Seconds from ``mount.imagefs`` to the guest's first answer, and bytes that had crossed the link by then."""

    seconds: float
    bytes_down: int


class Bench:
    def __init__(self, work: Path) -> None:
        self.work = work
        self.store = work / "store"
        self.guest: Guest = build_guest(fill_mib=FILL_MIB, kind="mixed")
        self.nonce = ""
        self._caches = 0

    def suspend(self) -> None:
        with Vm(self.guest, memory_mib=MEMORY_MIB) as vm:
            vm.expect("FILLED", PATIENCE)
            self.nonce, _ = vm.ping()
            subprocess.run(
                ["imagefs", "suspend", "--quit", "-q", "--qmp", vm.qmp_socket, self.store / "vm"], check=True
            )

    def resume(self, url: str, door: str, link: Link | None, cache: Path | None = None, *, then: str = "") -> Answer:
        """Once, from an empty cache unless one is given; then its recording is published (``save``), or the guest
        checks all of its memory (``check``)."""
        if cache is None:
            self._caches += 1
            cache = self.work / f"cache{self._caches}"
        begun, before = time.monotonic(), link.counters().bytes_down if link else 0
        options = f"cache={cache},prefetch={'none' if then == 'save' else 'all'}"
        with mounted(url, self.work / "mnt", options) as mountpoint:
            prefix = ["imagefs", "restore", str(mountpoint), "--door", door, "--"]
            with Vm(self.guest, memory_mib=MEMORY_MIB, prefix=prefix) as vm:
                vm.go_on(PATIENCE)
                nonce, _ = vm.ping(PATIENCE)
                seconds = time.monotonic() - begun
                down = link.counters().bytes_down - before if link else 0
                assert nonce == self.nonce
                if then == "save":
                    published = str(self.store / "vm")
                    subprocess.run(["imagefs", "trace", "save", "--new", "-q", str(mountpoint), published], check=True)
                elif then == "check":
                    answer = vm.ask("check", PATIENCE)
                    assert answer.startswith("ok "), answer
        return Answer(seconds, down)

    def fill(self, cache: Path) -> None:
        with mounted(str(self.store / "vm"), self.work / "mnt", f"cache={cache}") as mountpoint:
            status = mountpoint / ".imagefs" / "status.json"
            while not json.loads(status.read_text())["memory"]["complete"]:
                time.sleep(0.2)


def run(work: Path) -> Iterator[Figure]:
    bench = Bench(work)
    bench.suspend()
    full = work / "full"
    bench.fill(full)
    what = f"{MEMORY_MIB} MiB guest, {FILL_MIB} MiB of it filled, {MBIT:g} Mbit/s, {RTT_MS:g} ms, median of {RUNS}"
    with Nginx(work) as nginx, Link(nginx.address, MBIT, RTT_MS) as link:
        url = f"{link.url}/store/vm"
        for door in DOORS:
            first = bench.resume(url, door, link, then="save")
            size, metadata = _sizes(bench.store)
            local = [bench.resume(str(bench.store / "vm"), door, None, full).seconds for _ in range(RUNS)]
            with_set = [bench.resume(url, door, link, then="check" if last else "") for last in (0, 0, 1)]
            seconds = statistics.median(answer.seconds for answer in with_set)
            down = statistics.median(answer.bytes_down for answer in with_set)
            least = size * 8 / (MBIT * 1e6) + 3 * RTT_MS / 1e3 + statistics.median(local)
            yard = f"transfer of the set ({size} bytes), 3 round trips, and a resume from a full cache"
            yield Figure(f"first answer with a set, {door}", seconds, "s", yard, least, 1.25, "lower", what)
            yard = "the set and the metadata"
            yield Figure(
                f"bytes to first answer with a set, {door}", down, "bytes", yard, size + metadata, 1.15, "lower", what
            )
            yard = "the first resume, without a set"
            yield Figure(f"first answer, {door}", seconds, "s", yard, first.seconds, 1.0, "lower", what)
            (bench.store / _key(bench.store)).unlink()
    yield from _landing(bench)


def _key(store: Path) -> str:
    with closing(DirectoryStore(store)) as directory:
        return working_set_key(load_image(directory, "vm", Codec()).digest)


def _sizes(store: Path) -> tuple[int, int]:
    """Of the set, and of what every mount fetches beside it."""
    directory = DirectoryStore(store)
    image = load_image(directory, "vm", Codec())
    manifest = len(image.manifest.encode())
    return directory.size(working_set_key(image.digest)), image.manifest.metadata_size + manifest + directory.size("vm")


def _landing(bench: Bench) -> Iterator[Figure]:
    """Parsing, verifying and putting into a cache, of a set as large as they get, in pieces as they come.

    In seconds of one processor: it is what a thread does, whatever else the machine has to do.
    """
    store = DirectoryStore(bench.store)
    image = load_image(store, "vm", Codec())
    reader = ImageReader(store, image, Codec())
    pages = image.metadata.geometry.pages
    # Every third page, here and there: no whole windows.
    wanted = [page * 7919 % pages for page in range(0, 3 * LANDED_PAGES, 3)]
    publish(reader, recorded(wanted), Codec())
    key, chunk_pages = working_set_key(image.digest), image.manifest.chunk_pages
    data = store.get(key)
    best = 0.0
    landed = 0
    for number in range(RUNS):
        cache = DiskCache(bench.work / f"landing{number}", image.digest, image.metadata.geometry.size)
        begun = time.process_time()
        parser = SetParser(image.digest, chunk_pages, key=key, origin="")
        memory, parts = image.manifest.streams[MEMORY], image.metadata.parts
        verifier = SetVerifier(memory, chunk_pages, parts, Codec(), key=key, origin="")
        landed = 0
        for at in range(0, len(data), 1 << 16):
            for record in parser.feed(data[at : at + (1 << 16)]):
                if isinstance(record, SetBlock):
                    verifier.block(record)
                else:
                    for run in verifier.pages(record):
                        cache.put(run.first, run.data)
                    landed += record.pages
        best = max(best, len(data) * 8e-9 / (time.process_time() - begun))
        cache.close()
    what = f"{landed} pages in {len(data)} bytes, into a disk cache, by processor time; best of {RUNS}"
    least = min(_bare(data, image.digest, chunk_pages, bench.work / "bare") for _ in range(RUNS))
    seconds = len(data) * 8e-9 / best
    yield Figure(
        "processor time of landing a set", seconds, "s", "zstd, BLAKE3 and pwrite alone", least, 2.0, "lower", what
    )
    yield Figure("landing of a set", best, "Gbit/s on the wire", "1 Gbit/s", WIRE_GBIT, 1.0, "higher", what)


def _bare(data: bytes, manifest: bytes, chunk_pages: int, path: Path) -> float:
    """Seconds for what nobody can do without: decompress the pages, digest them, write them down."""
    records = SetParser(manifest, chunk_pages, key="", origin="").feed(data)
    codec = Codec()
    with path.open("wb", buffering=0) as file:
        begun = time.process_time()
        for record in records:
            if isinstance(record, SetPages):
                content = codec.decompress(record.frame, record.pages * PAGE_SIZE)
                native.page_digests(content)
                file.write(content)
        return time.process_time() - begun
