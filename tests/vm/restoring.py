"""What the tests of the doors share: guests suspended into a store, and looks at those that were restored."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.guest import Guest
from support.vm import PATIENCE, Vm

MEMORY_MIB = 192
EXIT_DEVICE = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")


@dataclass(frozen=True)
class SavedVm:
    """A guest that was suspended, as a directory that shows what a mount of its image shows a VMM."""

    directory: Path
    guest: Guest
    options: dict[str, Any]
    """With which :class:`support.vm.Vm` starts the same machine."""
    nonce: str
    count: int
    """The guest's, before it was suspended."""


@dataclass(frozen=True)
class Stored:
    """A guest that was suspended into a store."""

    store: Path
    guest: Guest
    options: dict[str, Any]
    nonce: str
    count: int


def suspend(imagefs: Sequence[str], vm: Vm, target: Path) -> None:
    command = [*imagefs, "suspend", "--quit", "--quiet", "--qmp", str(vm.qmp_socket), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert (done.returncode, done.stderr) == (0, "")
    assert vm.wait() == 0


def stored(guest: Guest, imagefs: list[str], store: Path, **options: Any) -> Stored:
    options = {"memory_mib": MEMORY_MIB, "extra": EXIT_DEVICE, **options}
    with Vm(guest, **options) as vm:
        vm.expect("FILLED")
        nonce, count = vm.ping()
        suspend(imagefs, vm, store / "vm1")
    return Stored(store, guest, options, nonce, count)


def restored(
    saved: Stored | SavedVm,
    imagefs: Sequence[str],
    mountpoint: Path,
    *extra: str,
    door: str,
    prefix: Sequence[str] = (),
) -> Vm:
    """The same machine by the same command line, behind ``imagefs restore``."""
    options = {**saved.options, "extra": (*saved.options.get("extra", ()), *extra)}
    command = [*imagefs, "restore", str(mountpoint), "--door", door, "--"]
    return Vm(saved.guest, prefix=command, **options)


def wait_until(condition: Callable[[], bool], vm: Vm) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, vm.said()
        time.sleep(0.01)


def children(vm: Vm) -> dict[int, bool]:
    """Of the restoring process: process, and whether it is QEMU."""
    pid = vm.process.pid
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found[child] = "qemu" in Path(f"/proc/{child}/exe").readlink().name
        except FileNotFoundError:
            continue
    return found


def checked(saved: Stored | SavedVm, writes: int = 0) -> str:
    return f"ok pages={saved.guest.fill_mib << 8} writes={writes} nonce={saved.nonce}"


def check_that_it_goes_on(vm: Vm, saved: Stored | SavedVm) -> None:
    nonce, count = vm.ping()
    assert nonce == saved.nonce
    assert saved.count <= count < saved.count + 600, "it did not go on counting where it stopped"


def kill(process: int) -> None:
    subprocess.run(["kill", "-KILL", str(process)], check=True)
