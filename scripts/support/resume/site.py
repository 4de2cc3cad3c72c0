"""What is resumed: a guest with a loaded Redis, suspended once, in every form that one of the ways takes.

| below ``root``  | what                                                                                      |
|-----------------|-------------------------------------------------------------------------------------------|
| store/vm1       | the split image                                                                           |
| recorded/vm1    | the same, with a recorded working set beside it                                           |
| vm1.save.zst    | QEMU's own save, ``zstd -3``                                                              |
| flat/memory     | the guest's RAM as a flat file, holes in place of its zero pages                          |
| flat/state.zst  | the device state that belongs to it                                                       |
| casync          | the flat file as casync's chunks, and their index                                         |
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from imagefs.restore.incoming import runnable
from support.commands import run
from support.guest import Guest
from support.mounts import mounted
from support.redis_guest import READY, build_redis_guest, network
from support.resume.redis import Client, DataSet, first_get
from support.vm import Vm

IMAGE = "vm1"
IDLE_SECONDS = 2.0
"""How long Redis has had nothing to do when it is suspended: its timers have all run by then."""
PATIENCE = 900.0

Step = Callable[[str], AbstractContextManager[None]]
"""Tells the user what is being done."""


@dataclass(frozen=True)
class Site:
    """The directory ``root`` is what a web server shows."""

    root: Path
    guest: Guest
    data: DataSet
    memory_mib: int
    port: int
    """Of this host, forwarded to Redis. It is part of the machine: the same on each of its command lines."""

    def machine(
        self,
        *,
        prefix: Sequence[str] = (),
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Vm:
        """The guest's machine, as Vm takes it."""
        extra = [*network(self.port), *extra]
        return Vm(self.guest, memory_mib=self.memory_mib, prefix=prefix, extra=extra, environment=environment)

    def sizes(self) -> dict[str, int]:
        """Bytes of each form, as they would be transferred whole, and of what a mount of the image fetches."""
        forms = {"image": "store", "save": "vm1.save.zst", "flat": "flat/memory", "casync": "casync"}
        there = {name: _size(self.root / path) for name, path in forms.items() if (self.root / path).exists()}
        info = json.loads(run("imagefs", "info", "--json", str(self.root / "store" / IMAGE)))
        return {**there, "metadata": int(info["metadata_bytes"])}

    def evict(self) -> None:
        """Have the kernel forget what it has cached of the site's files."""
        for path in _files(self.root):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(root: Path, data: DataSet, memory_mib: int, step: Step) -> Site:
    """Boot the guest, load ``data`` into it, suspend it into ``root``; other forms are made when they are wanted."""
    with step("building the guest: Debian's cloud kernel, and Redis out of its packages"):
        guest = build_redis_guest()
    site = Site(root, guest, data, memory_mib, _free_port())
    with step(f"booting it, and storing {data.count:,} records of it, {data.size / 1e6:.0f} MB"), site.machine() as vm:
        vm.expect(READY, PATIENCE)
        with Client(site.port, PATIENCE) as client:
            client.load(data, PATIENCE)
        time.sleep(IDLE_SECONDS)
        run("imagefs", "suspend", "--qmp", str(vm.qmp_socket), str(root / "store" / IMAGE))
    return site


def make_save(site: Site, work: Path) -> None:
    with mounted(str(site.root / "store" / IMAGE), work / "mnt", "nocache") as mountpoint:
        run("zstd", "-3", "-T2", "-q", str(mountpoint / "native"), "-o", str(site.root / "vm1.save.zst"))


def make_flat(site: Site, work: Path) -> None:
    flat = site.root / "flat"
    flat.mkdir()
    with mounted(str(site.root / "store" / IMAGE), work / "mnt", "nocache") as mountpoint:
        run("cp", "--sparse=always", str(mountpoint / "memory"), str(flat / "memory"))
        # As `imagefs restore` hands it to QEMU, which would otherwise leave the guest paused.
        state, _ = runnable((mountpoint / "state").read_bytes())
    (flat / "state").write_bytes(state)
    run("zstd", "-q", "--rm", str(flat / "state"))


def make_casync(site: Site, work: Path) -> None:
    """Of a directory: casync mounts nothing else."""
    tree, casync = work / "tree", site.root / "casync"
    tree.mkdir()
    casync.mkdir()
    os.link(site.root / "flat" / "memory", tree / "memory")
    run("casync", "make", f"--store={casync / 'chunks.castr'}", str(casync / "memory.caidx"), str(tree))


def make_recorded(site: Site, work: Path, seed: str) -> int:
    """Resume it once, until it has answered one GET, and publish what that touched first. Returns bytes published."""
    recorded = site.root / "recorded"
    shutil.copytree(site.root / "store", recorded)
    before = _size(recorded)
    options = f"cache={work / 'cache'},prefetch=none"
    with (
        mounted(str(recorded / IMAGE), work / "mnt", options) as mountpoint,
        site.machine(prefix=["imagefs", "restore", str(mountpoint), "--"]) as vm,
    ):
        vm.go_on(PATIENCE)
        first_get(site.port, site.data, site.data.draw(1, seed)[0], time.monotonic() + PATIENCE).close()
        run("imagefs", "trace", "save", str(mountpoint), str(recorded / IMAGE))
    return _size(recorded) - before


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in (_files(path) if path.is_dir() else [path]))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def fill_cache(site: Site, work: Path, cache: Path) -> None:
    """Fetch the whole image into ``cache``."""
    with mounted(str(site.root / "store" / IMAGE), work / "mnt", f"cache={cache}") as mountpoint:
        run("cp", str(mountpoint / "memory"), "/dev/null")
