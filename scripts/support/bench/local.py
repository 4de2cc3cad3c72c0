"""Resuming a guest whose image is fully cached on this host, beside QEMU that maps the flat memory file, and QEMU that
loads the whole migration stream; and the anonymous memory that each costs once the guest has touched all of its own.

All files are in the page cache, the same for every way. Seconds are from the start of the command to the guest's
answer; the image is mounted before, as it would be on a host that keeps it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bench.figures import Figure
from support.guest import Guest, build_guest
from support.mounts import mounted
from support.vm import Vm

MEMORY_MIB, FILL_MIB = 1280, 1024
RUNS = 5
PATIENCE = 300.0
DOORS = ("pager", "mmap", "postcopy")
FLAT, STREAM = "QEMU on the flat file", "QEMU loading the stream"


class Ways:
    """The same guest, resumed in different ways from what is in ``work``."""

    def __init__(self, work: Path, guest: Guest) -> None:
        self.work = work
        self.guest = guest
        self.mountpoint = work / "mnt"

    def vm(self, way: str) -> Vm:
        if way in DOORS:
            prefix = ["imagefs", "restore", str(self.mountpoint), "--door", way, "--"]
            return Vm(self.guest, memory_mib=MEMORY_MIB, prefix=prefix)
        if way == STREAM:
            return Vm(self.guest, memory_mib=MEMORY_MIB, extra=["-incoming", f"exec:cat {self.work}/stream"])
        backend = f"memory-backend-file,id=pc.ram,size={MEMORY_MIB}M,mem-path={self.work}/flat,share=off"
        return Vm(
            self.guest,
            memory_mib=MEMORY_MIB,
            machine="pc,memory-backend=pc.ram",
            extra=["-object", backend, "-incoming", f"exec:cat {self.work}/state"],
        )

    @contextmanager
    def answering(self, way: str) -> Iterator[tuple[Vm, float]]:
        """The resumed guest, and the seconds until it answered."""
        begun = time.monotonic()
        with self.vm(way) as vm:
            vm.go_on(PATIENCE)
            vm.ping(PATIENCE)
            yield vm, time.monotonic() - begun


def run(work: Path) -> Iterator[Figure]:
    guest = build_guest(fill_mib=FILL_MIB, kind="mixed")
    ways = Ways(work, guest)
    with Vm(guest, memory_mib=MEMORY_MIB) as vm:
        vm.expect("FILLED", PATIENCE)
        subprocess.run(["imagefs", "suspend", "-q", "--qmp", vm.qmp_socket, work / "store" / "vm"], check=True)
    with mounted(str(work / "store" / "vm"), ways.mountpoint, f"cache={work / 'cache'},prefetch=all"):
        for source, name in (("memory", "flat"), ("native", "stream"), ("state", "state")):
            shutil.copyfile(ways.mountpoint / source, work / name)
        daemon = _wait_complete(ways.mountpoint)
        everything = (*DOORS, FLAT, STREAM)
        seconds: dict[str, list[float]] = {way: [] for way in everything}
        for _ in range(RUNS):
            for way in everything:
                with ways.answering(way) as (_, taken):
                    seconds[way].append(taken)
        median = {way: statistics.median(times) for way, times in seconds.items()}
        memory = {way: _anonymous_when_touched(ways, way, daemon) for way in everything}
    what = f"{MEMORY_MIB} MiB guest, {FILL_MIB} MiB of it in use, all cached, median of {RUNS}"
    for door in DOORS:
        yield Figure(f"first answer, {door}", median[door], "s", FLAT, median[FLAT], 1.15, "lower", what)
        yield Figure(f"first answer, {door}", median[door], "s", STREAM, median[STREAM], 0.5, "lower", what)
    what = f"{MEMORY_MIB} MiB guest, all of its memory read; QEMU, helpers and daemon together"
    for door in DOORS:
        yield Figure(f"anonymous memory, {door}", memory[door], "bytes", STREAM, memory[STREAM], 1.1, "lower", what)


def _wait_complete(mountpoint: Path) -> int:
    """Until all pages are here; the daemon's process."""
    while not (status := json.loads((mountpoint / ".imagefs" / "status.json").read_text()))["memory"]["complete"]:
        time.sleep(0.2)
    return int(status["mount"]["pid"])


def _anonymous_when_touched(ways: Ways, way: str, daemon: int) -> int:
    """Bytes that the kernel could not drop, after the guest has checked all of its memory: with a door, the daemon's,
    too. The most of QEMU and its helpers together is at the end, since they only grow."""
    with ways.answering(way) as (vm, _):
        answer = vm.ask("check", PATIENCE)
        assert answer.startswith("ok "), answer
        processes = {vm.process.pid, *_descendants(vm.process.pid), *([daemon] if way in DOORS else [])}
        return sum(map(_anonymous, processes))


def _descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from _descendants(int(child))


def _anonymous(pid: int) -> int:
    """Anonymous and shared memory of a process, a page that several have counted by its share."""
    wanted = ("Pss_Anon:", "Pss_Shmem:")
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(wanted))
