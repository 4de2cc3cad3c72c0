"""Recording first touches of real guests: page by page, with the guest's own time between them.

The guest is suspended into a store, the image is fetched into a local cache, and the guest is resumed from there by the
door ``mmap``, which reads single pages (the pager installs whole windows, so it sees no touch of their rest). What
``.imagefs/trace`` says at the guest's first answer is the recording.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from support.commands import run
from support.guest import build_guest
from support.mounts import mounted
from support.resume.redis import DataSet, first_get
from support.resume.site import IMAGE, PATIENCE, Step, prepare
from support.vm import Vm

MEMORY_MIB = 768
FILL_MIB = 512
RECORDS = 300_000

TRACE = "trace"
"""In a recording's directory, beside ``store``."""


def record_quickstart(directory: Path, step: Step, *, memory_mib: int = MEMORY_MIB, fill_mib: int = FILL_MIB) -> None:
    """The guest of ``scripts/quickstart``, until it answers a ping."""
    guest = build_guest(fill_mib=fill_mib, kind="mixed")
    store = directory / "store"
    with step(f"booting the quickstart's guest, {fill_mib} MiB of pattern"), Vm(guest, memory_mib=memory_mib) as vm:
        vm.expect("FILLED", PATIENCE)
        vm.ping()
        run("imagefs", "suspend", "--qmp", str(vm.qmp_socket), str(store / IMAGE))

    def answer(vm: Vm) -> None:
        vm.ping(PATIENCE)

    with step("resuming it from a local cache, until it answers"):
        _record(directory, lambda prefix: Vm(guest, memory_mib=memory_mib, prefix=prefix), answer)


def record_redis(directory: Path, step: Step, *, memory_mib: int = MEMORY_MIB, records: int = RECORDS) -> None:
    """The guest of ``scripts/bench resume``, until its first GET."""
    data = DataSet(records)
    site = prepare(directory, data, memory_mib, step)

    def answer(_: Vm) -> None:
        first_get(site.port, data, data.draw(1, "first")[0], time.monotonic() + PATIENCE).close()

    with step("resuming it from a local cache, until its first GET"):
        _record(directory, lambda prefix: site.machine(prefix=prefix), answer)


GUESTS: dict[str, Callable[[Path, Step], None]] = {"quickstart": record_quickstart, "redis": record_redis}


def _record(directory: Path, machine: Callable[[list[str]], Vm], answer: Callable[[Vm], None]) -> None:
    options = f"cache={directory / 'cache'},prefetch=none"
    location, mountpoint = str(directory / "store" / IMAGE), directory / "mnt"
    with mounted(location, mountpoint, options):
        run("cp", str(mountpoint / "memory"), "/dev/null")
    # Mounted anew: the kernel has no page of it, and the trace is empty.
    with (
        mounted(location, mountpoint, options),
        machine(["imagefs", "restore", str(mountpoint), "--door", "mmap", "--"]) as vm,
    ):
        vm.go_on(PATIENCE)
        answer(vm)
        trace = (mountpoint / ".imagefs" / "trace").read_bytes()
    (directory / TRACE).write_bytes(trace)
