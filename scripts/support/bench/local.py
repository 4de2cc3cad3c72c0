"""Resuming a service whose image is fully cached on this host, beside QEMU that maps the flat memory file, and QEMU
that loads the whole migration stream; and the anonymous memory that each costs once all of the guest's was touched.

The guest is the Redis of ``scripts/bench resume``. All files are in the page cache, alike for every way. Seconds are
from the start of the command that runs QEMU to the first correct GET; the image is mounted before, as it is on a host
that keeps it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from imagefs import native
from support.bench.figures import Figure
from support.mounts import mounted
from support.resume.redis import DataSet, first_get
from support.resume.site import IMAGE, Site, prepare
from support.vm import Vm, descendants

MEMORY_MIB, RECORDS = 1280, 600_000
RUNS = 7
PATIENCE = 300.0
DOORS = ("pager", "mmap", "postcopy")
FLAT, STREAM = "QEMU on the flat file", "QEMU loading the stream"
WAYS = (*DOORS, FLAT, STREAM)


def run(work: Path) -> Iterator[Figure]:
    def say(text: str) -> nullcontext[None]:
        print(f"  {text}", file=sys.stderr)
        return nullcontext()

    site = prepare(work, DataSet(RECORDS), MEMORY_MIB, say)
    with mounted(str(work / "store" / IMAGE), work / "mnt", f"cache={work / 'cache'},prefetch=all") as mountpoint:
        for source in ("memory", "native", "state"):
            shutil.copyfile(mountpoint / source, work / source)
        daemon = _wait_complete(mountpoint)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(RUNS):
            for way in WAYS:
                with _answering(site, way, turn) as (_, taken):
                    seconds[way].append(taken)
                say(f"{way}: {taken:.2f} s")
        median = {way: statistics.median(times) for way, times in seconds.items()}
        memory = {way: _anonymous_when_touched(site, way, daemon) for way in WAYS}
    guest = (
        f"Redis with {site.data.size / 1e6:.0f} MB, {MEMORY_MIB} MiB, {_used(work / 'memory') >> 20} MiB of it in use"
    )
    for door in DOORS:
        what = f"{guest}, all cached, median of {RUNS}"
        yield Figure(f"first GET, {door}", median[door], "s", FLAT, median[FLAT], 1.15, "lower", what)
        yield Figure(f"first GET, {door}", median[door], "s", STREAM, median[STREAM], 0.5, "lower", what)
    for door in DOORS:
        what = f"{guest}, all of it read; QEMU, helpers and daemon together"
        yield Figure(f"anonymous memory, {door}", memory[door], "bytes", STREAM, memory[STREAM], 1.1, "lower", what)


def _machine(site: Site, way: str) -> Vm:
    if way in DOORS:
        return site.machine(prefix=["imagefs", "restore", str(site.root / "mnt"), "--door", way, "--"])
    if way == STREAM:
        return site.machine(extra=["-incoming", f"exec:cat {site.root}/native"])
    backend = f"memory-backend-file,id=pc.ram,size={site.memory_mib}M,mem-path={site.root}/memory,share=off"
    state = f"exec:cat {site.root}/state"
    return site.machine(extra=["-machine", "memory-backend=pc.ram", "-object", backend, "-incoming", state])


@contextmanager
def _answering(site: Site, way: str, turn: int) -> Iterator[tuple[Vm, float]]:
    """The resumed guest, and the seconds until Redis answered."""
    begun = time.monotonic()
    with _machine(site, way) as vm:
        vm.go_on(PATIENCE)
        first_get(site.port, site.data, site.data.draw(1, str(turn))[0], begun + PATIENCE).close()
        yield vm, time.monotonic() - begun


def _used(flat: Path) -> int:
    """Bytes of the pages that are not zero."""
    with open(flat, "rb") as file:
        pieces = iter(lambda: file.read(1 << 20), b"")
        bitmaps = b"".join(map(native.scan, pieces))
    return native.bits_count(bitmaps, 0, 8 * len(bitmaps)) * native.PAGE_SIZE


def _wait_complete(mountpoint: Path) -> int:
    """Until all pages are here; the daemon's process."""
    while not (status := json.loads((mountpoint / ".imagefs" / "status.json").read_text()))["memory"]["complete"]:
        time.sleep(0.2)
    return int(status["mount"]["pid"])


def _anonymous_when_touched(site: Site, way: str, daemon: int) -> int:
    """Bytes that the kernel could not drop, once all of the guest's memory was read; a door's with the daemon's."""
    with _answering(site, way, 0) as (vm, _):
        whole = {"val": 0, "size": site.memory_mib << 20, "filename": "/dev/null"}
        vm.qmp.execute("pmemsave", whole, timeout=PATIENCE)
        processes = {vm.process.pid, *descendants(vm.process.pid), *([daemon] if way in DOORS else [])}
        return sum(map(_anonymous, processes))


def _anonymous(pid: int) -> int:
    """Anonymous and shared memory of a process, a page that several have counted by its share."""
    wanted = ("Pss_Anon:", "Pss_Shmem:")
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except ProcessLookupError:
        # What wrote the state to QEMU is about to be reaped.
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(wanted))
