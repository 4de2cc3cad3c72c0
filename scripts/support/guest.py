"""The test guest: Debian's cloud kernel, and an initramfs with busybox and the agent (``guest/agent.c``).

Both are built once into a cache directory ($XDG_CACHE_HOME/imagefs-guest, else ~/.cache/imagefs-guest) and found
there afterwards without a network. The initramfs is deterministic: the same sources give the same bytes, and its
name is made of their digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

METAPACKAGE = "linux-image-cloud-amd64"
AGENT_SOURCE = Path(__file__).with_name("guest") / "agent.c"
COMPILE = ("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s")
BUSYBOX = Path("/bin/busybox")

CONSOLE_OPTIONS = "console=ttyS0,115200 quiet panic=-1"
"""A panic is shown and ends QEMU (under ``-no-reboot``) instead of hanging."""

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
{insmod}exec /agent
"""


class GuestError(Exception):
    """The guest cannot be built here; says what is missing."""


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs, and what the agent is told on the kernel's command line."""

    kernel: Path
    initramfs: Path
    fill_mib: int = 0
    """MiB of pattern that the agent fills at boot, and can check."""
    kind: str = "random"
    """Of the pattern: ``random`` (incompressible), ``text``, or ``mixed`` (text, random and nearly empty pages)."""
    seed: int = 1
    append: str = ""
    """More of the kernel's command line."""

    @property
    def kernel_options(self) -> str:
        agent = f"imagefs.fill={self.fill_mib} imagefs.kind={self.kind} imagefs.seed={self.seed}"
        return f"{CONSOLE_OPTIONS} {agent} {self.append}".rstrip()


def build_guest(
    *,
    fill_mib: int = 0,
    kind: str = "random",
    seed: int = 1,
    append: str = "",
    modules: Sequence[str] = (),
    cache: Path | None = None,
) -> Guest:
    """The guest out of the cache, built (and its kernel downloaded) if it is not there.

    ``modules`` are kernel modules by name (``virtio_balloon``); they and what they depend on are put into the
    initramfs and loaded in order before the agent starts. Safe to call from several processes at once.
    """
    cache = cache or cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        tree = _kernel_tree(cache)
        return Guest(
            kernel=_only(tree / "boot", "vmlinuz-*"),
            initramfs=_initramfs(cache, tree, modules),
            fill_mib=fill_mib,
            kind=kind,
            seed=seed,
            append=append,
        )


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imagefs-guest"


# ---- kernel ----


def _kernel_tree(cache: Path) -> Path:
    """A directory with boot/vmlinuz-* and lib/modules/*: the kernel package, unpacked."""
    ready = sorted(cache.glob("linux-image-*-cloud-amd64"), key=lambda path: path.stat().st_mtime)
    if ready:
        return ready[-1]
    package = _kernel_package()
    work = Path(tempfile.mkdtemp(prefix="kernel-", dir=cache))
    try:
        # apt-get drops to the user _apt where it may write as that; this directory it may not, and says so.
        _run("apt-get", "-q", "download", package, cwd=work)
        _run("dpkg", "-x", str(_only(work, "*.deb")), str(work / "tree"))
        target = cache / package
        (work / "tree").rename(target)
        return target
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _kernel_package() -> str:
    """The versioned package that the metapackage depends on; fetches apt's lists where there are none."""
    for attempt in range(2):
        listed = _run("apt-cache", "depends", METAPACKAGE) if _knows_package() else ""
        found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)$", listed, re.MULTILINE)
        if found:
            return found[1]
        if attempt == 0:
            _run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update")
    raise GuestError(f"apt knows no package {METAPACKAGE}: the test guest needs Debian's package sources")


def _knows_package() -> bool:
    return bool(_run("apt-cache", "search", "--names-only", f"^{METAPACKAGE}$"))


# ---- modules ----


def _module_order(tree: Path, wanted: Sequence[str]) -> list[Path]:
    """Files of the modules and of what they depend on, each after its dependencies."""
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


# ---- initramfs ----


def _initramfs(cache: Path, tree: Path, modules: Sequence[str]) -> Path:
    if not BUSYBOX.exists():
        raise GuestError(f"{BUSYBOX} is missing: install busybox-static")
    ordered = _module_order(tree, modules)
    key = hashlib.sha256()
    for part in (AGENT_SOURCE.read_bytes(), BUSYBOX.read_bytes(), Path(__file__).read_bytes(), tree.name.encode()):
        key.update(hashlib.sha256(part).digest())
    key.update(" ".join(path.name for path in ordered).encode())
    target = cache / f"initramfs-{key.hexdigest()[:24]}.cpio"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix="initramfs-", dir=cache) as work:
        agent = Path(work) / "agent"
        _run(*COMPILE, "-o", str(agent), str(AGENT_SOURCE))
        built = Path(work) / "initramfs"
        built.write_bytes(_archive(agent.read_bytes(), ordered))
        built.rename(target)
    return target


def _archive(agent: bytes, modules: Sequence[Path]) -> bytes:
    insmod = "".join(f"/bin/busybox insmod /modules/{path.name}\n" for path in modules)
    directory, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries: list[tuple[str, int, bytes, int]] = [
        *((name, directory, b"", 0) for name in ("bin", "dev", "proc", "sys", "modules")),
        # The kernel opens it for init before devtmpfs is mounted.
        ("dev/console", stat.S_IFCHR | 0o600, b"", os.makedev(5, 1)),
        ("bin/busybox", program, BUSYBOX.read_bytes(), 0),
        ("agent", program, agent, 0),
        ("init", program, _INIT.format(insmod=insmod).encode(), 0),
        *((f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes(), 0) for path in modules),
        ("TRAILER!!!", 0, b"", 0),
    ]
    return b"".join(_cpio_entry(number, *entry) for number, entry in enumerate(entries, 1))


def _cpio_entry(number: int, name: str, mode: int, data: bytes, device: int) -> bytes:
    """One member of a "newc" archive (cpio(5)): root's, time zero. Not compressed: the guest unpacks it under TCG."""
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, os.major(device), os.minor(device), len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


# ---- small things ----


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise GuestError(f"{directory}: {len(found)} files match {pattern}, one was expected; remove the directory")
    return found[0]


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GuestError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise GuestError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
