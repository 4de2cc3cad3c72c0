"""An initramfs: a "newc" archive (cpio(5)) of members, and kernel modules in the order in which they load."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from support.debian import GuestError

BUSYBOX = Path("/bin/busybox")

BEGINNING = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
"""
"""How every /init of ours begins."""


@dataclass(frozen=True, slots=True)
class Program:
    """An executable file of the archive."""

    path: str
    """Absolute, in the guest."""
    data: bytes


def build_archive(init: str, programs: Iterable[Program], modules: Sequence[Path] = ()) -> bytes:
    """The archive, deterministic: the same content gives the same bytes.

    ``init`` is what /init does once the kernel's filesystems are mounted and the ``modules`` loaded, in their order.
    """
    insmod = "".join(f"/bin/busybox insmod /modules/{path.name}\n" for path in modules)
    files = {
        "bin/busybox": (BUSYBOX.read_bytes(), 0o755),
        "init": (f"{BEGINNING}{insmod}{init}".encode(), 0o755),
        **{program.path.lstrip("/"): (program.data, 0o755) for program in programs},
        **{f"modules/{path.name}": (path.read_bytes(), 0o644) for path in modules},
    }
    above = {str(parent) for name in files for parent in PurePosixPath(name).parents if parent.name}
    directories = sorted(above | {"dev", "proc", "sys"}, key=lambda name: (name.count("/"), name))
    entries: list[tuple[str, int, bytes, int]] = [
        *((name, stat.S_IFDIR | 0o755, b"", 0) for name in directories),
        # The kernel opens it for init before devtmpfs is mounted.
        ("dev/console", stat.S_IFCHR | 0o600, b"", os.makedev(5, 1)),
        *((name, stat.S_IFREG | mode, data, 0) for name, (data, mode) in files.items()),
        ("TRAILER!!!", 0, b"", 0),
    ]
    return b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))


def _entry(number: int, name: str, mode: int, data: bytes, device: int) -> bytes:
    """One member, root's, time zero. Not compressed: the guest unpacks it under TCG."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, os.major(device), os.minor(device), len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def module_order(tree: Path, wanted: Sequence[str]) -> list[Path]:
    """Files of the modules and of what they depend on, each after its dependencies; ``tree`` has lib/modules."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in (tree / "lib/modules").rglob("*.ko*")}
    order: dict[str, Path] = {}

    def visit(name: str, wanted_by: str) -> None:
        name = name.replace("-", "_")
        if name in order:
            return
        if name not in files:
            raise GuestError(f"{tree.name} has no module {name!r} ({wanted_by})")
        if files[name].suffix != ".ko":
            raise GuestError(f"{files[name]} is compressed, which is not supported")
        for dependency in _dependencies(files[name]):
            visit(dependency, f"needed by {name}")
        order[name] = files[name]

    for name in wanted:
        visit(name, "asked for")
    return list(order.values())


def _dependencies(module: Path) -> list[str]:
    """From the ``depends=`` string of the module's .modinfo section; what depmod would read."""
    found = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module.read_bytes())
    return [name for name in found[1].decode().split(",") if name] if found else []
